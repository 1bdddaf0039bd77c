"""Notebooks and jobs where people work: YARN with HDFS, a standalone cluster, an older Spark.

All run on this machine. The executors have the packages that `make pack` has packed, and nothing of
this repository but what Spark sends them.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from hadoop import hadoop
from kafka import KafkaConsumer
from processes import ROOT, arrange_spark, run_python, running, wait_until, without_make
from standalone import standalone

from conftest import compare_records
from helpers.notebook import find_notebook, record_in
from helpers.sinks import read_scored
from helpers.spark import CONNECTOR, spark_and_scala, spark_home

pytestmark = pytest.mark.cluster

JOB = ROOT / "examples" / "streaming_job.py"
SECONDS = 900
PYTHON = "./environment/bin/python"

LOOK = """
import os, sys
from helpers.spark import get_spark
from helpers.higgs import FEATURES

def look(_):
    import importlib.util, helpers.higgs, keras
    sys.path[:] = [path for path in sys.path if not path.endswith("helpers.zip")]
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.startswith("helpers")]:
        del sys.modules[name]
    yield sys.prefix, keras.__file__, importlib.util.find_spec("helpers") is None, os.listdir()

spark = get_spark(master=sys.argv[1], memory="512m")
for found in spark.sparkContext.parallelize(range(4), 4).mapPartitions(look).collect():
    print(*found, sep="|")
spark.stop()
"""


@pytest.fixture(scope="module")
def packed():
    """The archives that `make pack` writes."""
    make = ["make", "--no-print-directory", "pack"]
    subprocess.run(make, cwd=ROOT, env=without_make(), check=True, timeout=SECONDS)
    return ROOT / "build"


@pytest.fixture(scope="module")
def yarn(packed, tmp_path_factory):
    """A YARN with two NodeManagers and an HDFS that has the packed environment."""
    with hadoop(tmp_path_factory.mktemp("cluster") / "hadoop") as cluster:
        cluster.upload(packed / "environment.tar.gz", "/environment.tar.gz")
        yield cluster


@pytest.fixture(scope="module")
def on_yarn(yarn):
    """The variables for a program on YARN, as docs/clusters.md sets them."""
    archives = f"--archives {yarn.uri}/environment.tar.gz#environment pyspark-shell"
    return {**yarn.environment, "PYSPARK_PYTHON": PYTHON, "PYSPARK_SUBMIT_ARGS": archives}


def run_notebook(name, folder, environment, **parameters):
    """Run a notebook, and return what it records."""
    settings = [f"{key.upper()}={value}" for key, value in parameters.items()]
    page = ["--html", str(folder)]
    run = run_python(
        "-m", "helpers.notebook", name, *settings, *page, env=environment, seconds=SECONDS
    )
    assert run.returncode == 0, run.stderr[-6000:]
    words = re.findall(r"(\w+)=(\S+)", run.stdout.splitlines()[-1])
    return {key: float(value) if "." in value else int(value) for key, value in words}


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("1_walkthrough", {"events": 2_000, "sample_events": 500}),
        ("2_structured_streaming", {"events": 2_000}),
        ("3_train_and_serve", {"events": 2_000, "epochs": 2}),
    ],
)
def test_a_notebook_has_the_same_results_on_yarn(
    kafka, spark, yarn, on_yarn, tmp_path, name, parameters
):
    """A notebook records the same on YARN and here, and stores each event once on HDFS."""
    servers = {"bootstrap_servers": kafka.bootstrap_servers, "memory": "1g"}
    here = run_notebook(name, tmp_path, None, **parameters, **servers, topic=f"Here_{name}")
    topic, results = f"Yarn_{name}", f"{yarn.uri}/results/{name}"
    there = run_notebook(
        name, tmp_path, on_yarn, **parameters, **servers, topic=topic, master="yarn",
        results=results,
    )  # fmt: skip
    compare_records(here, there)
    if name == "1_walkthrough":
        yarn.download(results, tmp_path / "results")
        assert ids_scored(spark, tmp_path / "results", topic) == ids_in(kafka, topic)


@pytest.mark.parametrize(
    "version, name",
    [
        ("3.5.7", "1_walkthrough"),
        ("3.5.7", "2_structured_streaming"),
        ("3.5.7", "3_train_and_serve"),
        ("4.0.0", "1_walkthrough"),
        ("4.1.1", "2_structured_streaming"),
    ],
)
def test_a_notebook_has_the_same_results_on_a_sites_older_spark(tmp_path, version, name):
    """A notebook records on the Spark of SPARK_HOME what is stored in it, all else as it is."""
    home = arrange_spark(Path(sys.prefix) / f"spark-{version}" / "pyspark", tmp_path)
    record = run_notebook(name, tmp_path, {**os.environ, "SPARK_HOME": str(home)})
    cells = nbformat.read(find_notebook(name), as_version=4).cells
    stored = next(cell for cell in cells if "record" in cell.metadata.get("tags", []))
    compare_records(record_in(stored.outputs), record)


def ids_scored(spark, folder, topic):
    """Return the sorted ids of a topic's events in the sinks of a folder."""
    ids = []
    for sink in folder.iterdir():
        scored = read_scored(spark, str(sink)).filter(f"topic = '{topic}'")
        ids += [row.EventId for row in scored.select("EventId").collect()]
    return sorted(ids)


def ids_in(kafka, topic):
    """Return the sorted ids of a topic's events, which are the keys."""
    with KafkaConsumer(
        topic, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest",
        consumer_timeout_ms=5_000,
    ) as consumer:  # fmt: skip
        return sorted(int(record.key) for record in consumer)


@pytest.fixture(params=["yarn", "standalone"])
def cluster(request, tmp_path):
    """A cluster's master, the variables of a program that uses it, and where it stores results."""
    if request.param == "yarn":
        found = request.getfixturevalue("yarn")
        yield "yarn", request.getfixturevalue("on_yarn"), f"{found.uri}/{tmp_path.name}"
        return
    packed = request.getfixturevalue("packed")
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": PYTHON}
    archives = f"--archives {packed}/environment.tar.gz#environment pyspark-shell"
    with standalone(tmp_path, workers=2) as address:
        yield address, {**environment, "PYSPARK_SUBMIT_ARGS": archives}, str(tmp_path / "results")
    for work in tmp_path.glob("work-*"):
        shutil.rmtree(work)


def test_executors_need_no_file_of_the_driver(cluster):
    """Executors have the packed Python and `helpers`, and can't find either on their own."""
    master, environment, _ = cluster
    run = run_python("-c", LOOK, master, env=environment, seconds=SECONDS, cwd="/")
    assert run.returncode == 0, run.stderr[-6000:]
    found = [line.split("|") for line in run.stdout.splitlines()]
    assert len(found) == 4
    for prefix, keras, is_hidden, files in found:
        assert prefix.endswith("/environment") and keras.startswith(prefix)
        assert not prefix.startswith(str(ROOT))
        assert is_hidden == "True"
        assert "environment" in files


class Submitted:
    """A job started by spark-submit, and what it has printed."""

    def __init__(self, process, stdout):
        self.process = process
        self._stdout = stdout

    def events(self):
        """Return how many events the printed batches have."""
        lines = self._stdout().splitlines()
        figures = [line.split() for line in lines if re.match(r"\d\d:\d\d:\d\d ", line)]
        return sum(int(words[1].replace(",", "")) for words in figures)

    def wait_for(self, events):
        """Wait until a number of events is scored."""

        def is_done():
            assert self.process.poll() is None, f"the job has ended: {self._stdout()[-6000:]}"
            return self.events() >= events

        wait_until(is_done, SECONDS)


@contextlib.contextmanager
def submitted(master, environment, folder, mode, arguments, logs=None):
    """Run the streaming job with spark-submit."""
    command = [str(spark_home() / "bin" / "spark-submit"), "--master", master]
    command += ["--deploy-mode", mode, "--num-executors", "2", "--executor-memory", "1g"]
    # In a notebook, PYSPARK_SUBMIT_ARGS names the environment.
    command += environment["PYSPARK_SUBMIT_ARGS"].split()[:2]
    environment = {name: environment[name] for name in environment if name != "PYTHONPATH"}
    if mode == "cluster":
        spark, scala = spark_and_scala()
        command += ["--packages", CONNECTOR.format(spark=spark, scala=scala)]
        command += ["--conf", f"spark.jars.ivy={folder}/ivy"]
        command += ["--py-files", str(ROOT / "build" / "helpers.zip")]
    else:
        environment["PYSPARK_DRIVER_PYTHON"] = sys.executable
    output, errors = folder / f"{mode}.stdout", folder / f"{mode}.stderr"
    with output.open("w") as stdout, errors.open("w") as stderr:
        process = subprocess.Popen(
            [*command, str(JOB), *arguments], env=environment, cwd=folder, stdout=stdout,
            stderr=stderr, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield Submitted(process, logs or output.read_text)
    except BaseException:
        print(output.read_text()[-3000:], errors.read_text()[-6000:])
        raise
    finally:
        process.kill()
        process.wait(60)


def driver_output(cluster):
    """Return what a driver in the newest YARN application has printed."""
    application = cluster.applications()[-1]
    pattern = f"**/{application}/container_*_000001/stdout"
    return "".join(file.read_text(errors="replace") for file in cluster.logs.glob(pattern))


def executors():
    """Return the Java processes of executors that this process has started indirectly."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if process.name() == "java" and "CoarseGrained" in " ".join(process.cmdline()):
                found.append(process)
    return found


@contextlib.contextmanager
def filling(kafka, topic, job):
    """Run a producer, once a job has executors, until the block ends."""
    wait_until(lambda: job.process.poll() is not None or len(executors()) > 1, SECONDS)
    producer = [sys.executable, str(ROOT / "examples" / "kafka_producer.py")]
    producer += [kafka.bootstrap_servers, "--topic", topic, "--rate", "300"]
    with running([*producer, "--events", "5000000"]) as process:  # more than come to be sent
        yield
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)


def kill_an_executor(job, kafka, topic):
    """Kill an executor while events come in, and wait until all of them are scored."""
    with filling(kafka, topic, job):
        job.wait_for(1)
        executors()[0].kill()
        job.wait_for(job.events() + 1)
    job.wait_for(len(ids_in(kafka, topic)))


def arguments_of(kafka, topic, results, engine="structured"):
    """Return the job's arguments."""
    return [
        "--engine", engine, "--bootstrap-servers", kafka.bootstrap_servers, "--topic", topic,
        "--output", f"{results}/scored", "--checkpoint", f"{results}/checkpoint",
        "--on-bad-record", "skip",
    ]  # fmt: skip


def test_a_job_on_yarn_loses_nothing_when_an_executor_is_killed(
    kafka, spark, yarn, on_yarn, topic, tmp_path
):
    """A killed executor changes no total; SIGTERM ends the job after its batch, with code 0."""
    results = f"{yarn.uri}/{tmp_path.name}"
    with submitted("yarn", on_yarn, tmp_path, "client", arguments_of(kafka, topic, results)) as job:
        kill_an_executor(job, kafka, topic)
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(SECONDS) == 0
    yarn.download(f"{results}/scored", tmp_path / "sinks" / "scored")
    assert ids_scored(spark, tmp_path / "sinks", topic) == ids_in(kafka, topic)


def test_a_killed_application_is_resumed_by_the_next(kafka, spark, yarn, on_yarn, topic, tmp_path):
    """With the driver on YARN, a job continues after ``yarn application -kill`` of another."""
    results = f"{yarn.uri}/{tmp_path.name}"
    arguments = arguments_of(kafka, topic, results)

    def start(*more):
        logs = functools.partial(driver_output, yarn)
        return submitted("yarn", on_yarn, tmp_path, "cluster", [*arguments, *more], logs)

    with start() as job, filling(kafka, topic, job):
        job.wait_for(1)
        yarn.kill(yarn.applications()[-1])
        assert job.process.wait(SECONDS) != 0
    with start("--available-now") as job:
        assert job.process.wait(SECONDS) == 0
    yarn.download(f"{results}/scored", tmp_path / "sinks" / "scored")
    assert ids_scored(spark, tmp_path / "sinks", topic) == ids_in(kafka, topic)


def test_a_job_on_a_standalone_cluster_loses_nothing(kafka, spark, packed, topic, tmp_path):
    """With Spark's own cluster, a DStream stores each event once, though an executor is killed."""
    environment = {
        **os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYSPARK_PYTHON": PYTHON,
        "PYSPARK_SUBMIT_ARGS": f"--archives {packed}/environment.tar.gz#environment pyspark-shell",
    }  # fmt: skip
    arguments = arguments_of(kafka, topic, tmp_path / "sinks", "dstream")
    with (
        standalone(tmp_path, workers=2) as address,
        submitted(address, environment, tmp_path, "client", arguments) as job,
    ):
        kill_an_executor(job, kafka, topic)
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(SECONDS) == 0
    shutil.rmtree(tmp_path / "sinks" / "checkpoint", ignore_errors=True)
    assert ids_scored(spark, tmp_path / "sinks", topic) == ids_in(kafka, topic)
