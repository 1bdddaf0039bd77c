"""Measure the walkthrough's stream (throughput, small batches, latency), or the trainers.

    python examples/benchmark.py compare
    python examples/benchmark.py drain
    python examples/benchmark.py small
    python examples/benchmark.py latency
    python examples/benchmark.py train
    python examples/benchmark.py train --csv atlas-higgs-challenge-2014-v2.csv.gz --runs 5

`compare` scores one topic with the kit's two engines and with other programs (`peers`), in turns,
and writes the results to ``build/bench.json``. It needs the packages in requirements-bench.txt.
Name entries to measure only these: ``compare dstream confluent_loop``.

`drain` starts a local broker and fills a topic with events. The walkthrough's stream, with the
notebook's functions, then drains the topic several times: each time, a new consumer group reads all
events, scores them, and writes the scores. Before and after each drain, NumPy multiplies
matrices on the same cores. The network needs 2.036 million floating-point operations per event,
nearly all of them in matrix products, so this is the upper limit for any implementation with this
precision.

`small` writes 500 events per second to a topic of four partitions while a stream with an interval
of one second scores them, with each engine. It reports how long a batch takes, from the call of its
function to its commit, and how many cores are busy, not counting the broker and the producer.

`latency` does the same with 2,000 events per second and intervals of one and five seconds. It
reports the time from an event's timestamp, which the producer sets, until its batch is committed.

Both measure the second half of each run, after Java has compiled its code.

`train` trains with `SingleTrainer`, and with `AveragingTrainer` on two workers, on 60 % of the
events, with the parameters of the notebook on training, and evaluates on the rest. Each run uses a
different split of the events; the splits are reproducible.

The results are printed as JSON objects, one per line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

import numpy as np
import peers
import psutil
from pyspark.ml import Pipeline
from pyspark.ml.feature import OneHotEncoder, StandardScaler, StringIndexer, VectorAssembler
from pyspark.ml.functions import vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from sklearn import metrics

from helpers.broker import LocalKafka, count_records
from helpers.higgs import EVENT_ID, FEATURES, LABEL, generate_events, read_events_in_spark
from helpers.model import build_model, normalized_network
from helpers.monitor import Batch, Monitor
from helpers.notebook import definitions, find_notebook, parameters
from helpers.records import to_columns
from helpers.scoring import Score, score_stream
from helpers.sinks import ParquetSink, read_scored
from helpers.spark import available_cores, get_spark, scratch_folder
from helpers.streaming import (
    KafkaQuery,
    KafkaUtils,
    new_streaming_context,
    run_stream,
    spark_options,
)
from helpers.training import AveragingTrainer, SingleTrainer, Trainer
from helpers.transformers import ModelPredictor

if TYPE_CHECKING:
    import keras

TOPIC = "benchmark"
ROWS = 4_096  # of the matrices, and events in an Arrow batch
SGEMM_SECONDS = 2.0
WARM_UPS = 2  # for Java's just-in-time compiler; the third drain is about as fast as the tenth
INTERVAL_SECONDS = 1.0
DRAIN_SECONDS = 600
WORKERS = 2
TRAINING_SHARE = 6  # of ten
ENGINES = ("dstream", "structured")
PARTITIONS = 4
LEAST_SECONDS = 5  # of a steady run, whose second half needs some samples
WARM_UP_EVENTS = 1_000  # before a steady run, which would otherwise queue behind its first batch
SAMPLE_SECONDS = 1.0  # between samples of the processor time, which take some themselves
SMALL_RATE = 500  # events per second
LATENCY_RATE = 2_000
COMPARISON = Path(__file__).resolve().parent.parent / "build" / "bench.json"
KINDS = ("compare", "drain", "small", "latency", "train")
BOUNDARY_SHARE = 2e-4  # of events whose two probabilities differ by less than rounding does
LATENCY_INTERVALS = (1.0, 5.0)  # seconds


def limit_events_per_s(model: keras.Model, seconds: float = SGEMM_SECONDS) -> float:
    """Return how many events per second all cores could score if they only multiplied.

    Parameters
    ----------
    model : keras.Model
        A network of dense layers.
    seconds : float
        How long to measure.

    Returns
    -------
    float
        The speed of NumPy's float32 matrix product (SGEMM) with the shape of the network's largest
        layer, divided by the network's operations per event: a multiplication and an addition per
        parameter.

    Examples
    --------
    >>> from helpers.model import build_model, normalized_network
    >>> limit_events_per_s(build_model(), seconds=0.1) > 0
    True
    """
    matrices = (tuple(weights.shape) for weights in model.weights if len(weights.shape) == 2)
    shape = max(matrices, key=np.prod)
    generator = np.random.default_rng(0)
    left = generator.random((ROWS, shape[0]), dtype="float32")
    right = generator.random(shape, dtype="float32")
    products = 0
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        left @ right
        products += 1
    flops = 2 * products * ROWS * shape[0] * shape[1]
    return flops / (time.perf_counter() - started) / (2 * model.count_params())


def drain(
    spark: SparkSession, bootstrap_servers: str, score: Score, engine: str
) -> tuple[dict[str, int], float]:
    """Stream the topic from its beginning to its end into a new sink.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session.
    bootstrap_servers : str
        The broker's address.
    score : callable
        Converts a batch's records to scored events.
    engine : str
        One of `ENGINES`.

    Returns
    -------
    dict of str to int
        The monitor's totals.
    float
        Seconds from the planning of the first batch until the last one was committed; for
        Structured Streaming, from the start of the query to its end.
    """
    settings = {
        "bootstrap.servers": bootstrap_servers,
        "group.id": f"benchmark-{uuid.uuid4()}",
        "auto.offset.reset": "earliest",
    }
    monitor, folder = Monitor(), f"{scratch_folder()}/drain-{uuid.uuid4()}"
    with ParquetSink(spark, f"{folder}/scored", signal_index=0) as sink:
        if engine == "structured":
            query = KafkaQuery(spark, [TOPIC], settings, f"{folder}/checkpoint")
            with query:
                score_stream(query, score, sink, monitor)
                began = time.time()
                query.run(timeout=DRAIN_SECONDS)
            return monitor.totals(), time.time() - began
        ended = 0.0

        def is_drained() -> bool:
            nonlocal ended
            ended = time.time()
            return stream.lag() == 0

        ssc = new_streaming_context(spark, INTERVAL_SECONDS)
        stream = KafkaUtils.createDirectStream(ssc, [TOPIC], settings)
        score_stream(stream, score, sink, monitor)
        run_stream(ssc, until=is_drained, timeout=DRAIN_SECONDS)
    return monitor.totals(), ended - monitor.batches[0].batch_id / 1000


def measure(engine: str, events: int, runs: int) -> dict[str, Any]:
    """Run the `drain` benchmark, and return its result.

    Parameters
    ----------
    engine : str
        One of `ENGINES`.
    events : int
        Number of events in the topic.
    runs : int
        Number of drains after the warm-up.

    Returns
    -------
    dict
        ``engine``, ``events``, ``cores``, ``limit_events_per_s`` (the median of measurements before
        and after each drain), ``drain_events_per_s`` (``min``, ``median``, ``max``), and ``ratio``:
        the median drain divided by the limit.

    Raises
    ------
    RuntimeError
        If a drain scored a different number of events.
    """
    walkthrough = definitions("1_walkthrough", "pipeline")
    score, model = walkthrough["process_instances"], walkthrough["model"]
    with LocalKafka() as kafka, _stopped_at_the_end(get_spark()) as spark:
        _produce(kafka.bootstrap_servers, TOPIC, events, sys.stderr)
        for _ in range(WARM_UPS):
            drain(spark, kafka.bootstrap_servers, score, engine)
        limits, speeds = [limit_events_per_s(model)], []
        for _ in range(runs):
            totals, seconds = drain(spark, kafka.bootstrap_servers, score, engine)
            if totals["events"] != events:
                raise RuntimeError(f"{totals['events']} events were scored, not {events}.")
            speeds.append(events / seconds)
            limits.append(limit_events_per_s(model))
    limit, speed = statistics.median(limits), statistics.median(speeds)
    drained = {"min": min(speeds), "median": speed, "max": max(speeds)}
    return {
        "engine": engine,
        "events": events,
        "cores": available_cores(),
        "limit_events_per_s": round(limit),
        "drain_events_per_s": {name: round(value) for name, value in drained.items()},
        "ratio": round(speed / limit, 3),
    }


def compare(names: list[str], events: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Run the `compare` benchmark; yield a result per entry, and write all to ``build/bench.json``.

    Parameters
    ----------
    names : list of str
        Entries to measure, among the keys of `ENTRIES`.
    events : int
        Number of events in the topic.
    rounds : int
        How often each entry is measured, in turns.

    Raises
    ------
    RuntimeError
        If an entry scored a different number of events, or found another number of signal events.
    """
    model = normalized_network(definitions("1_walkthrough", "pipeline")["model"])
    speeds: dict[str, list[float]] = {name: [] for name in names}
    with LocalKafka() as kafka, _stopped_at_the_end(get_spark()) as spark:
        _produce(kafka.bootstrap_servers, TOPIC, events, sys.stderr)
        file = f"{scratch_folder()}/compared.keras"
        model.save(file)
        ends = count_records(kafka.bootstrap_servers, TOPIC)
        task = peers.Task(kafka.bootstrap_servers, TOPIC, ends, file)
        expected = peers.keras_in_memory(task).signal
        for name in set(names) & {*ENGINES, "original_functions", "spark_documentation"}:
            for _ in range(WARM_UPS):
                ENTRIES[name](spark, task)
        limits = []
        for round_number in range(rounds):
            limits.append(limit_events_per_s(model))
            for name in names:
                if name == "row_by_row" and round_number:
                    continue  # it takes minutes, and its speed needs no third digit
                print(f"round {round_number + 1}: {name}", file=sys.stderr)
                scored = ENTRIES[name](spark, task)
                _check_counts(name, scored, events, expected)
                speeds[name].append(scored.events / scored.seconds)
    limit = statistics.median(limits)
    results = [
        {
            "name": name,
            "events_per_s": [round(speed, 1) for speed in speeds[name]],
            "ratio_to_limit": round(statistics.median(speeds[name]) / limit, 4),
        }
        for name in names
    ]
    _write_comparison(results, limit)
    yield from results


def _drained(engine: str) -> Callable[[SparkSession, peers.Task], peers.Scored]:
    """Return an entry that scores with the kit."""

    def entry(spark: SparkSession, task: peers.Task) -> peers.Scored:
        score = definitions("1_walkthrough", "pipeline")["process_instances"]
        totals, seconds = drain(spark, task.bootstrap_servers, score, engine)
        return peers.Scored(totals["events"], totals["signal"], seconds)

    return entry


def original_functions(spark: SparkSession, task: peers.Task) -> peers.Scored:
    """Score with the three functions of 2016 on columns, which cross to Python twice.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session.
    task : peers.Task
        The topic. The network is the walkthrough's, and a stage of Spark prepares the features.
    """
    names = definitions("1_walkthrough", "pipeline")
    settings = {"bootstrap.servers": task.bootstrap_servers, "auto.offset.reset": "earliest"}
    planned: list[int] = []
    ended: list[float] = []
    counts: list[tuple[int, int]] = []

    def process_batch(records: DataFrame, batch_id: int) -> None:
        planned.append(batch_id)
        scored = names["predict"](names["prepare_dataframe"](to_columns(records)))
        is_signal = F.col("predicted_index") == 0
        scored = names["post_process"](scored).agg(F.count("*"), F.count_if(is_signal))
        counts.append(tuple(scored.first()))
        ended.append(time.time())

    ssc = new_streaming_context(spark, INTERVAL_SECONDS)
    stream = KafkaUtils.createDirectStream(ssc, [task.topic], settings)
    stream.foreachBatch(process_batch)
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=DRAIN_SECONDS)
    events, signal = (sum(numbers) for numbers in zip(*counts, strict=True))
    return peers.Scored(events, signal, ended[-1] - planned[0] / 1000)  # as with the other streams


def _alone(score: Callable[[peers.Task], peers.Scored]) -> Callable[..., peers.Scored]:
    """Return an entry that needs no Spark."""
    return lambda spark, task: score(task)


# The entries of `compare`, by name.
ENTRIES: dict[str, Callable[[SparkSession, peers.Task], peers.Scored]] = {
    **{engine: _drained(engine) for engine in ENGINES},
    "original_functions": original_functions,
    "spark_documentation": lambda spark, task: peers.spark_documentation(
        spark, task, f"{scratch_folder()}/documentation-{uuid.uuid4()}"
    ),
    "kafka_python_loop": _alone(peers.kafka_python_loop),
    "confluent_loop": _alone(peers.confluent_loop),
    "quix_streams": _alone(peers.quix_streams),
    "keras_in_memory": _alone(peers.keras_in_memory),
    "row_by_row": _alone(peers.row_by_row),
}


def _check_counts(name: str, scored: peers.Scored, events: int, signal: int) -> None:
    """Raise `RuntimeError` if an entry's counts are wrong; an event on the boundary may differ."""
    if name == "row_by_row":
        return  # it scores the first events only, and checks its count itself
    if scored.events != events or abs(scored.signal - signal) > events * BOUNDARY_SHARE:
        raise RuntimeError(
            f"{name} scored {scored.events} events, {scored.signal} of them signal, instead of "
            f"{events} and {signal}."
        )


def _write_comparison(results: list[dict[str, Any]], limit: float) -> None:
    """Print the results as a table, and write them to a file."""
    print(f"{'':20} events/s (median)  of the limit of {limit:,.0f}")
    for result in results:
        speed = statistics.median(result["events_per_s"])
        print(f"{result['name']:20} {speed:17,.0f}  {result['ratio_to_limit']:.3f}")
    packages = ("pyspark", "keras", "numpy", "kafka-python", "confluent-kafka")
    versions = {name: _version(name) for name in packages}
    machine = {"processor": platform.processor() or platform.machine(), "cores": available_cores()}
    comparison = {"results": results, "limit_events_per_s": round(limit), "machine": machine}
    COMPARISON.parent.mkdir(exist_ok=True)
    COMPARISON.write_text(json.dumps({**comparison, "versions": versions}, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class StoredTimes(Monitor):
    """A monitor that also records when each batch was stored, and how long that took."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[tuple[float, float]] = []

    def add(self, batch: Batch, unused: Iterable[str] = ()) -> None:
        """Record a batch."""
        self.stored.append((time.time(), batch.seconds))
        super().add(batch, unused)


@dataclass
class Processes:
    """The processor time of this process and its children, except for some of them."""

    excluded: set[int] = field(default_factory=set)  # process ids
    samples: list[tuple[float, float]] = field(default_factory=list)  # times, processor seconds

    def sample(self) -> None:
        """Record the processor time so far, unless that was done within `SAMPLE_SECONDS`."""
        if self.samples and time.time() - self.samples[-1][0] < SAMPLE_SECONDS:
            return
        seconds = 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.pid not in self.excluded:
                    times = process.cpu_times()
                    seconds += times.user + times.system
        self.samples.append((time.time(), seconds))

    def busy(self, since: float) -> float:
        """Return how many cores were busy, on average, between a time and the last sample."""
        began = next(sample for sample in self.samples if sample[0] >= since)
        (start, before), (end, after) = began, self.samples[-1]
        return (after - before) / (end - start)


@dataclass(frozen=True)
class SteadyRun:
    """Measurements of a stream in the second half of a run at a steady rate."""

    seconds: list[float]  # for each batch
    events: list[int]  # in each batch
    latencies: list[float]  # for each event, in seconds
    cores_busy: float


def run_steadily(
    spark: SparkSession, kafka: LocalKafka, engine: str, rate: int, interval: float, seconds: float
) -> SteadyRun:
    """Score a topic while events are written to it at a steady rate, after some at once.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session.
    kafka : LocalKafka
        The broker.
    engine : str
        One of `ENGINES`.
    rate : int
        Events per second.
    interval : float
        Seconds between batches.
    seconds : float
        For how many seconds events are written.

    Raises
    ------
    ValueError
        If this is less than `LEAST_SECONDS`.
    """
    if seconds < LEAST_SECONDS:
        raise ValueError(f"a steady run takes at least {LEAST_SECONDS} s, not {seconds:g}.")
    score = definitions("1_walkthrough", "pipeline")["process_instances"]
    topic, folder = f"steady-{uuid.uuid4()}", f"{scratch_folder()}/steady-{uuid.uuid4()}"
    settings = {"bootstrap.servers": kafka.bootstrap_servers, "auto.offset.reset": "earliest"}
    kafka.create_topic(topic, partitions=PARTITIONS)
    _produce(kafka.bootstrap_servers, topic, WARM_UP_EVENTS, subprocess.DEVNULL)
    records = spark.read.format("kafka").option("subscribe", topic)
    records = records.options(**spark_options(settings)).load()
    score(records).write.format("noop").mode("overwrite").save()  # gives the workers the model
    monitor, sink = StoredTimes(), ParquetSink(spark, f"{folder}/scored", signal_index=0)
    with sink, contextlib.ExitStack() as at_the_end:
        if engine == "dstream":
            ssc = new_streaming_context(spark, interval)
            stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
        else:
            stream = KafkaQuery(spark, [topic], settings, f"{folder}/checkpoint")
            at_the_end.enter_context(stream)
        scoring, events = score_stream(stream, score, sink, monitor), round(rate * seconds)
        producer = _start_producer(kafka.bootstrap_servers, topic, events, rate)
        at_the_end.callback(producer.kill)
        processes = Processes(excluded={kafka.pid, producer.pid})

        def is_done() -> bool:
            if producer.poll() is None:
                processes.sample()
                return False
            if producer.returncode:
                raise subprocess.CalledProcessError(producer.returncode, producer.args)
            # Not the lag, which is that of the last interval: more events may have come since.
            return scoring.offsets_done >= WARM_UP_EVENTS + events

        if engine == "dstream":
            run_stream(ssc, until=is_done, timeout=DRAIN_SECONDS)
        else:
            stream.run(until=is_done, timeout=DRAIN_SECONDS, interval=interval)
    half = processes.samples[-1][0] - seconds / 2
    event_time = (F.unix_micros("event_time") / 1e6).alias("event_time")
    scored = read_scored(spark, f"{folder}/scored").select("batch", event_time).toPandas()
    written = [times for _, times in scored.groupby("batch")["event_time"]]  # sorted, as `stored`
    stored = list(zip(monitor.stored, written, strict=True))
    late = [(at, took, times) for (at, took), times in stored if at >= half]
    return SteadyRun(
        seconds=[took for _, took, _ in late],
        events=[len(times) for _, _, times in late],
        latencies=[at - event_time for at, _, times in late for event_time in times],
        cores_busy=processes.busy(since=half),
    )


def measure_small(seconds: float) -> Iterator[dict[str, Any]]:
    """Run the `small` benchmark; yield a result per engine.

    Parameters
    ----------
    seconds : float
        For how many seconds events are written per engine.
    """
    for engine, _, run in _steady_runs(SMALL_RATE, [INTERVAL_SECONDS], seconds):
        taken = {"min": min(run.seconds), "median": statistics.median(run.seconds)}
        taken["max"] = max(run.seconds)
        yield {
            "engine": engine,
            "events_a_batch": round(statistics.median(run.events)),
            "partitions": PARTITIONS,
            "seconds": {name: round(value, 3) for name, value in taken.items()},
            "cores_busy": round(run.cores_busy, 2),
        }


def measure_latency(seconds: float) -> Iterator[dict[str, Any]]:
    """Run the `latency` benchmark; yield a result per engine and interval.

    Parameters
    ----------
    seconds : float
        For how many seconds events are written per result.
    """
    for engine, interval, run in _steady_runs(LATENCY_RATE, LATENCY_INTERVALS, seconds):
        quantiles = np.quantile(run.latencies, [0.5, 0.95, 0.99])
        yield {
            "engine": engine,
            "interval": interval,
            "events_per_s": LATENCY_RATE,
            **dict(zip(("p50", "p95", "p99"), quantiles.round(3).tolist(), strict=True)),
        }


def _steady_runs(
    rate: int, intervals: Iterable[float], seconds: float
) -> Iterator[tuple[str, float, SteadyRun]]:
    """Yield a run with each engine and interval, all on one broker and in one session."""
    with LocalKafka() as kafka, _stopped_at_the_end(get_spark()) as spark:
        for engine in ENGINES:
            for interval in intervals:
                yield engine, interval, run_steadily(spark, kafka, engine, rate, interval, seconds)


def measure_training(events: int, csv: str | None, runs: int) -> dict[str, Any]:
    """Run the `train` benchmark, and return its result.

    Parameters
    ----------
    events : int
        Number of events to generate if no file is given.
    csv : str, optional
        A file of the challenge.
    runs : int
        Number of different splits of the events.

    Returns
    -------
    dict
        ``events``, ``cores``, and for each trainer, by name, its ``seconds`` (per run, including
        Spark's work), mean ``accuracy`` and ``auc``, and the ``aucs`` of the runs.
    """
    recipe = training_recipe()
    with _stopped_at_the_end(get_spark()) as spark:
        if csv:
            table = read_events_in_spark(spark, csv)
        else:
            table = spark.createDataFrame(generate_events(events, seed=1))
        if LABEL not in table.columns:
            raise ValueError(f"{csv} has no column {LABEL}, which training needs.")
        table = table.cache()
        found = {}
        for split in range(runs):
            trainers = {
                "SingleTrainer": SingleTrainer(build_model(), **recipe),
                "AveragingTrainer": AveragingTrainer(build_model(), num_workers=WORKERS, **recipe),
            }
            for name, trainer in trainers.items():
                found.setdefault(name, []).append(judge(trainer, table, split))
        result = {"events": table.count(), "cores": available_cores()}
    for name, rows in found.items():
        seconds, accuracies, aucs = zip(*rows, strict=True)
        result[name] = {
            "seconds": [round(value, 1) for value in seconds],
            "accuracy": round(statistics.mean(accuracies), 4),
            "auc": round(statistics.mean(aucs), 4),
            "aucs": [round(value, 4) for value in aucs],
        }
    return result


def training_recipe() -> dict[str, Any]:
    """Return the number of epochs and the batch size from the notebook on training."""
    given = parameters(find_notebook("3_train_and_serve"))
    return {"num_epoch": given["epochs"], "batch_size": given["batch_size"]}


def judge(trainer: Trainer, table: DataFrame, split: int) -> tuple[float, float, float]:
    """Train on part of the events; return the seconds, and accuracy and AUC on the rest."""
    place = F.pmod(F.xxhash64(EVENT_ID, F.lit(split)), F.lit(10))
    stages = Pipeline(
        stages=[
            VectorAssembler(inputCols=list(FEATURES), outputCol="raw"),
            StandardScaler(inputCol="raw", outputCol="features", withMean=True),
            StringIndexer(inputCol=LABEL, outputCol="index", stringOrderType="alphabetAsc"),
            OneHotEncoder(inputCol="index", outputCol="label", dropLast=False),
        ]
    ).fit(table.where(place < TRAINING_SHARE))
    model = trainer.train(stages.transform(table.where(place < TRAINING_SHARE)))
    unseen = stages.transform(table.where(place >= TRAINING_SHARE))
    scored = ModelPredictor(keras_model=model).predict(unseen)
    rows = scored.select("index", vector_to_array("prediction")[1].alias("score")).toPandas()
    accuracy = metrics.accuracy_score(rows["index"] == 1, rows["score"] > 0.5)
    auc = metrics.roc_auc_score(rows["index"], rows["score"])
    return trainer.get_training_time(), accuracy, auc


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark given on the command line, and return the exit code."""
    options, stdout = _options(arguments), sys.stdout
    try:
        # The monitor prints to stderr, so that stdout has only the results.
        with contextlib.redirect_stdout(sys.stderr):
            for result in _results(options):
                print(json.dumps(result), file=stdout, flush=True)
    except ImportError as error:
        print(f"{error}: ./setup.sh -r requirements-bench.txt installs it.", file=sys.stderr)
        return 1
    except (RuntimeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _results(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Run the chosen benchmark, and return its results."""
    if options.what == "compare":
        return compare(options.entry or list(ENTRIES), options.events, options.rounds)
    if options.what == "drain":
        return [measure(options.engine, options.events, options.runs)]
    if options.what == "small":
        return measure_small(options.seconds)
    if options.what == "latency":
        return measure_latency(options.seconds)
    return [measure_training(options.events, options.csv, options.runs)]


@contextlib.contextmanager
def _stopped_at_the_end(spark: SparkSession) -> Iterator[SparkSession]:
    try:
        yield spark
    finally:
        spark.stop()


def _produce(bootstrap_servers: str, topic: str, events: int, output: int | TextIO) -> None:
    """Write events to a topic with the producer from the README."""
    producer = _start_producer(bootstrap_servers, topic, events, output=output)
    if producer.wait():
        raise subprocess.CalledProcessError(producer.returncode, producer.args)


def _start_producer(
    bootstrap_servers: str,
    topic: str,
    events: int,
    rate: int | None = None,
    output: int | TextIO = subprocess.DEVNULL,
) -> subprocess.Popen:
    """Start the producer from the README."""
    program = Path(__file__).resolve().parent / "kafka_producer.py"
    command = [sys.executable, str(program), bootstrap_servers, "--topic", topic]
    command += ["--events", str(events), *(("--rate", str(rate)) if rate else ())]
    return subprocess.Popen(command, stdout=output)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="|".join(KINDS))
    compares = what.add_parser("compare", help="the kit beside other programs")
    # Not `choices`: with `*`, argparse would compare the empty list with them.
    compares.add_argument("entry", nargs="*", help=f"default: all of {', '.join(ENTRIES)}")
    compares.add_argument("--events", type=int, default=500_000, help="default: %(default)s")
    compares.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    drains = what.add_parser("drain", help="how fast the walkthrough's stream is")
    drains.add_argument("--events", type=int, default=200_000, help="default: %(default)s")
    drains.add_argument("--runs", type=int, default=3, help="default: %(default)s")
    drains.add_argument("--engine", choices=ENGINES, default="dstream", help="default: %(default)s")
    kinds = {"small": "how long small batches take", "latency": "how old an event's score is"}
    for name, text in kinds.items():
        steady = what.add_parser(name, help=text)
        steady.add_argument("--seconds", type=float, default=60, help="per run; default: 60")
    trains = what.add_parser("train", help="how well and how fast the trainers train")
    trains.add_argument("--events", type=int, default=60_000, help="default: %(default)s")
    trains.add_argument("--csv", help="use the challenge's file (.csv or .csv.gz)")
    trains.add_argument("--runs", type=int, default=1, help="default: %(default)s")
    options = parser.parse_args(arguments)
    unknown = set(getattr(options, "entry", ())) - set(ENTRIES)
    if unknown:
        parser.error(f"no entry {', '.join(sorted(unknown))}: choose from {', '.join(ENTRIES)}")
    for name in ("events", "rounds", "runs"):
        if not 0 < getattr(options, name, 1) < math.inf:
            parser.error(f"--{name} must be a number above 0.")
    if not LEAST_SECONDS <= getattr(options, "seconds", LEAST_SECONDS) < math.inf:
        parser.error(f"--seconds must be a number of at least {LEAST_SECONDS}.")
    return options


if __name__ == "__main__":
    sys.exit(main())
