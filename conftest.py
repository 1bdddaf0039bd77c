"""Shared fixtures and hooks: one real broker, one real Spark session, topics, events and models.

They are not in tests/, because docstring examples and notebooks are tests as well.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import nbval.kernel
import orjson
import pytest
from jupyter_client.manager import KernelManager
from kafka import KafkaProducer
from pyspark.ml.functions import array_to_vector
from pyspark.ml.linalg import Vectors
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.functions import array, lit, struct, to_json

from helpers.broker import LocalKafka
from helpers.higgs import EVENT_ID, FEATURES, generate_events
from helpers.model import build_model
from helpers.notebook import folder_for_sockets, record_in
from helpers.records import parse_events
from helpers.serving import Contract, ServingModel, save_serving_model, scaled_network
from helpers.spark import available_memory, get_spark
from helpers.streaming import KafkaUtils, new_streaming_context, stop_streaming

# By how many events a count may differ on another processor. Sums are rounded differently there, so
# an event whose two probabilities are almost equal can change class.
TOLERANCE_EVENTS = 20

# By how much accuracy and AUC may differ between trainings: differences in rounding add up over
# hundreds of updates. Ten runs here were within 0.004.
TOLERANCE_METRICS = 0.015

# Streamed events are scored by the same network; only the rounding may differ.
TOLERANCE_STREAMED = 0.001

# Memory of a process that runs tests, including its broker, Spark and workers.
PROCESS_MEMORY = 2.5e9
MOST_PROCESSES = 3  # they wait half of the time; on 2 cores, a fourth doesn't help

# Files that take minutes, in the order in which they begin, so that all processes end together.
LONGEST = (
    "4_experiments.ipynb", "3_train_and_serve.ipynb", "1_walkthrough.ipynb", "test_training.py",
    "2_structured_streaming.ipynb", "test_readme.py", "test_kafka_producer.py",
    "test_structured.py", "test_exactly_once.py", "test_transformers.py",
)  # fmt: skip

# The tests start about fifty JVMs that run for a minute or less. In that time, the second compiler
# of Java costs more than it saves: 5 to 10 %. Spark passes this option to the driver's JVM.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1")

# A shell's background job ignores SIGINT, and so do its children; tests send SIGINT to programs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def kafka() -> Iterator[LocalKafka]:
    """One broker for all tests; each test uses separate topics."""
    with LocalKafka() as broker:
        yield broker


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """One Spark session for all tests."""
    # With Spark's 200 partitions, a query that groups events takes 200 tasks per batch.
    session = get_spark(cores=2, config={"spark.sql.shuffle.partitions": 2})
    yield session
    session.stop()


@pytest.fixture(scope="session")
def produce(kafka: LocalKafka) -> Iterator[Callable]:
    """A function that writes records to a topic with kafka-python, unlike the stream."""
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all", linger_ms=50)

    def write(topic: str, values: list[bytes | None], keys: list[bytes | None] | None = None):
        pairs = zip(values, keys or [b"key"] * len(values), strict=True)
        futures = [producer.send(topic, value=value, key=key) for value, key in pairs]
        producer.flush(30)
        return [future.get(10) for future in futures]

    yield write
    producer.close(timeout=5)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A function that imports a program of examples/ by its name."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "examples")
    return importlib.import_module


_NUMBERS = itertools.count()


@pytest.fixture
def topic(kafka: LocalKafka) -> str:
    """A new, empty topic with two partitions."""
    name = f"topic-{next(_NUMBERS)}"
    kafka.create_topic(name, partitions=2)
    return name


@pytest.fixture
def one(kafka: LocalKafka) -> str:
    """A new topic with one partition."""
    name = f"one-{uuid.uuid4()}"
    kafka.create_topic(name, partitions=1)
    return name


@pytest.fixture
def settings(kafka: LocalKafka) -> dict[str, str]:
    """A stream's settings: from the beginning, in a new consumer group."""
    return {
        "bootstrap.servers": kafka.bootstrap_servers,
        "group.id": f"group-{uuid.uuid4()}",
        "auto.offset.reset": "earliest",
    }


@pytest.fixture(scope="session")
def event_values() -> list[bytes]:
    """The JSON of 1,000 generated events."""
    events = generate_events(1_000, seed=1)[[EVENT_ID, *FEATURES]]
    return [orjson.dumps(event) for event in events.to_dict("records")]


@pytest.fixture(scope="session")
def make_serving_model(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """A function that makes and saves serving models with random weights."""
    features = generate_events(1_000, seed=1)[list(FEATURES)]

    def make(seed: int = 1, **parts) -> ServingModel:
        contract = Contract(
            **{
                "feature_names": FEATURES, "means": tuple(features.mean()),
                "scales": tuple(features.std()), "class_names": ("background", "signal"),
                "signal_index": 1, "threshold": 0.5, "training_data": "none", "metrics": {},
                **parts,
            }
        )  # fmt: skip
        network = scaled_network(build_model(seed), contract.means, contract.scales)
        path = tmp_path_factory.mktemp("models") / "model.keras"
        return save_serving_model(ServingModel(network, contract), path)

    return make


@pytest.fixture(scope="session")
def serving_model(make_serving_model: Callable) -> ServingModel:
    """A serving model with random weights."""
    return make_serving_model()


_WITH_SPARK = (
    "higgs", "monitor", "records", "scoring", "serving", "sinks", "spark", "streaming", "training",
    "transformers",
)  # fmt: skip


def _scored_event(spark: SparkSession) -> DataFrame:
    """Return a scored event, as a scoring function passes it to a sink."""
    columns = (
        "EventId long, predicted_index double, topic string, partition int, offset long, "
        "timestamp timestamp, bad struct<key: binary, value: binary, reason: string>, "
        "unused array<string>"
    )
    row = (100_000, 0.0, "events", 0, 0, datetime.now(), None, None)
    event = spark.createDataFrame([row], columns)
    return event.withColumn("prediction", array_to_vector(array(lit(0.75), lit(0.25))))


@pytest.fixture(autouse=True)
def names_in_docstrings(
    request: pytest.FixtureRequest, doctest_namespace: dict[str, object]
) -> Iterator[None]:
    """Provide the names that docstring examples use."""
    if not isinstance(request.node, pytest.DoctestItem):
        yield
        return
    module = request.node.name.split(".")[1]
    words = {word for example in request.node.dtest.examples
             for word in re.findall(r"\w+", example.source)}  # fmt: skip
    doctest_namespace["Vectors"] = Vectors
    if module in _WITH_SPARK and words & {"spark", "scored"}:
        spark = doctest_namespace["spark"] = request.getfixturevalue("spark")
    if module == "serving" and words & {"serving_model", "model_path", "events"}:
        model = doctest_namespace["serving_model"] = request.getfixturevalue("serving_model")
        doctest_namespace["model_path"] = request.getfixturevalue("tmp_path") / "model.keras"
        save_serving_model(model, doctest_namespace["model_path"])
        rows = request.getfixturevalue("spark").createDataFrame(generate_events(3, seed=1))
        records = rows.select(to_json(struct("*")).cast("binary").alias("value"))
        doctest_namespace["events"] = parse_events(records, model.schema).select("event")
    if module == "sinks" and "scored" in words:
        doctest_namespace["scored"] = _scored_event(spark)
    needs_kafka = module in ("scoring", "sinks", "streaming")
    if not needs_kafka or not words & {"kafka", "ssc", "stream"}:
        yield
        return
    kafka = doctest_namespace["kafka"] = request.getfixturevalue("kafka")
    if "events" not in kafka.topics():
        kafka.create_topic("events", partitions=1)
        request.getfixturevalue("produce")("events", [b"{}"] * 100)
    if not words & {"ssc", "stream"}:
        yield
        return
    ssc = new_streaming_context(request.getfixturevalue("spark"), 1)
    settings = {"bootstrap.servers": kafka.bootstrap_servers, "auto.offset.reset": "earliest"}
    stream = KafkaUtils.createDirectStream(ssc, ["events"], settings)
    doctest_namespace.update(ssc=ssc, stream=stream)
    yield
    stop_streaming(ssc, gracefully=False)


def pytest_xdist_auto_num_workers() -> int:
    """Start as many processes as fit in the free memory; `make test WORKERS=2` starts two."""
    return processes_for(available_memory())


def over_sockets(folder: str | Path) -> dict[str, str]:
    """Return a kernel manager's settings for sockets in a folder instead of ports."""
    return {"transport": "ipc", "ip": f"{folder}/kernel"}


def processes_for(free_memory: float) -> int:
    """Return how many processes may run tests in an amount of memory, in bytes."""
    return max(1, min(MOST_PROCESSES, int(free_memory / PROCESS_MEMORY)))


@pytest.hookimpl(trylast=True)  # the terminal's plugin comes first
def pytest_configure(config: pytest.Config) -> None:
    """Give nbval kernels without ports, and report progress per file if processes share the tests.

    A port that Jupyter finds free can be taken when the kernel binds it a second later. Three
    kernels that started at the same time lost one in 25 runs.
    """
    folder = TemporaryDirectory(prefix="kernel-", dir=folder_for_sockets())
    config.add_cleanup(folder.cleanup)
    nbval.kernel.KernelManager = partial(KernelManager, **over_sockets(folder.name))
    if config.option.numprocesses:
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        config.pluginmanager.register(FileProgress(terminal))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


class FileProgress:
    """Reports each file when its tests are done, and each failed test at once."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal
        self._tests: Counter[str] = Counter()
        self._done: Counter[str] = Counter()
        self._started = time.monotonic()

    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        """Count each file's tests; all processes collect the same ones."""
        self._tests = Counter(map(_file_of, ids))

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self) -> Iterator[None]:
        """Omit the dots, but keep the words for the summary."""
        category, _, word = yield
        return category, "", word

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Name a failed test."""
        if report.failed:
            self._terminal.write_line(f"FAILED {report.nodeid}", red=True)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        """After a file's last test, show the file, its number of tests, and the progress."""
        file = _file_of(nodeid)
        self._done[file] += 1
        if self._done[file] == self._tests[file]:
            percent = 100 * self._done.total() // self._tests.total()
            minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
            so_far = f"{percent:3} %  {minutes:2}:{seconds:02}"
            self._terminal.write_line(f"{so_far}  {file} ({self._done[file]})")


def _file_of(nodeid: str) -> str:
    """Return the file that a test is in."""
    return nodeid.partition("::")[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> object:
    """Compare the numbers recorded by a notebook's last cell with the stored ones."""
    result = yield
    cell = getattr(item, "cell", None)  # nbval's items have one
    if cell is not None and "record" in cell.metadata.get("tags", []):
        compare_records(record_in(cell.outputs), record_in(item.test_outputs))
    return result


def compare_records(stored: dict[str, object], now: dict[str, object]) -> None:
    """Fail unless both have the same names and, within tolerances, the same values."""
    assert now.keys() == stored.keys()
    assert now["events"] == stored["events"]
    for name in now.keys() - {"events", "batches"}:
        tolerance = TOLERANCE_EVENTS if name == "signal" else TOLERANCE_METRICS
        assert abs(now[name] - stored[name]) <= tolerance, name
    for name in ("accuracy", "auc"):
        if name in now:
            assert abs(now[name] - now[f"streamed_{name}"]) <= TOLERANCE_STREAMED
    assert now.get("batches", 1) >= 1
