"""Measure the throughput of the walkthrough's stream, or the quality and speed of training.

    python examples/benchmark.py drain
    python examples/benchmark.py train
    python examples/benchmark.py train --csv atlas-higgs-challenge-2014-v2.csv.gz --runs 5

`drain` starts a local broker and fills a topic with events. The walkthrough's stream, with the
notebook's own functions, then drains the topic several times: each time, a new consumer group reads
all events, scores them, and writes the scores. Before and after each drain, NumPy multiplies
matrices on the same cores. The network needs 2.036 million floating-point operations per event,
nearly all of them in matrix products, so this is the upper limit for any implementation in this
precision.

`train` trains with `SingleTrainer`, and with `AveragingTrainer` on two workers, on 60 % of the
events, with the parameters of the notebook on training, and evaluates on the rest. Each run uses a
different split of the events; the splits are reproducible.

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

import numpy as np
from pyspark.ml import Pipeline
from pyspark.ml.feature import OneHotEncoder, StandardScaler, StringIndexer, VectorAssembler
from pyspark.ml.functions import vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from sklearn import metrics

from helpers.broker import LocalKafka
from helpers.higgs import EVENT_ID, FEATURES, LABEL, generate_events, read_events_in_spark
from helpers.model import build_model
from helpers.monitor import Monitor
from helpers.notebook import definitions, find_notebook, parameters
from helpers.scoring import Score, score_stream
from helpers.sinks import ParquetSink
from helpers.spark import get_spark, scratch_folder
from helpers.streaming import KafkaUtils, new_streaming_context, run_stream
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
    >>> from helpers.model import build_model
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
    spark: SparkSession, bootstrap_servers: str, score: Score
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

    Returns
    -------
    dict of str to int
        The monitor's totals.
    float
        Seconds from the planning of the first batch until the last one was committed.
    """
    settings = {
        "bootstrap.servers": bootstrap_servers,
        "group.id": f"benchmark-{uuid.uuid4()}",
        "auto.offset.reset": "earliest",
    }
    ended = 0.0

    def is_drained() -> bool:
        nonlocal ended
        ended = time.time()
        return stream.lag() == 0

    monitor, folder = Monitor(), f"{scratch_folder()}/scored-{uuid.uuid4()}"
    ssc = new_streaming_context(spark, INTERVAL_SECONDS)
    stream = KafkaUtils.createDirectStream(ssc, [TOPIC], settings)
    with ParquetSink(spark, folder, signal_index=0) as sink:
        score_stream(stream, score, sink, monitor)
        run_stream(ssc, until=is_drained, timeout=DRAIN_SECONDS)
    planned = monitor.batches[0].batch_id / 1000
    return monitor.totals(), ended - planned


def measure(events: int, runs: int) -> dict[str, Any]:
    """Run the `drain` benchmark, and return its result.

    Parameters
    ----------
    events : int
        Number of events in the topic.
    runs : int
        Number of drains after the warm-up.

    Returns
    -------
    dict
        ``events``, ``cores``, ``limit_events_per_s`` (the median of measurements before and after
        each drain), ``drain_events_per_s`` (``min``, ``median``, ``max``), and ``ratio``: the
        median drain divided by the limit.

    Raises
    ------
    RuntimeError
        If a drain scored a different number of events.
    """
    walkthrough = definitions("1_walkthrough", "pipeline")
    score, model = walkthrough["process_instances"], walkthrough["model"]
    with LocalKafka() as kafka, _stopped_at_the_end(get_spark()) as spark:
        _produce(kafka.bootstrap_servers, events)
        for _ in range(WARM_UPS):
            drain(spark, kafka.bootstrap_servers, score)
        limits, speeds = [limit_events_per_s(model)], []
        for _ in range(runs):
            totals, seconds = drain(spark, kafka.bootstrap_servers, score)
            if totals["events"] != events:
                raise RuntimeError(f"{totals['events']} events were scored, not {events}.")
            speeds.append(events / seconds)
            limits.append(limit_events_per_s(model))
    limit, speed = statistics.median(limits), statistics.median(speeds)
    drained = {"min": min(speeds), "median": speed, "max": max(speeds)}
    return {
        "events": events,
        "cores": os.cpu_count(),
        "limit_events_per_s": round(limit),
        "drain_events_per_s": {name: round(value) for name, value in drained.items()},
        "ratio": round(speed / limit, 3),
    }


def measure_training(events: int, csv: str | None, runs: int) -> dict[str, Any]:
    """Run the `train` benchmark, and return its result.

    Parameters
    ----------
    events : int
        Number of events to generate, if there is no file.
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
        table = table.cache()
        found = {}
        for split in range(runs):
            trainers = {
                "SingleTrainer": SingleTrainer(build_model(), **recipe),
                "AveragingTrainer": AveragingTrainer(build_model(), num_workers=WORKERS, **recipe),
            }
            for name, trainer in trainers.items():
                found.setdefault(name, []).append(judge(trainer, table, split))
        result = {"events": table.count(), "cores": os.cpu_count()}
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
    options = _options(arguments)
    try:
        # The monitor prints to stderr, so that stdout has only the result.
        with contextlib.redirect_stdout(sys.stderr):
            if options.what == "drain":
                result = measure(options.events, options.runs)
            else:
                result = measure_training(options.events, options.csv, options.runs)
    except (RuntimeError, ValueError, OSError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result))
    return 0


@contextlib.contextmanager
def _stopped_at_the_end(spark: SparkSession) -> Iterator[SparkSession]:
    try:
        yield spark
    finally:
        spark.stop()


def _produce(bootstrap_servers: str, events: int) -> None:
    """Fill the topic with the producer from the README."""
    program = Path(__file__).resolve().parent / "kafka_producer.py"
    command = [sys.executable, str(program), bootstrap_servers, "--topic", TOPIC]
    subprocess.run([*command, "--events", str(events)], stdout=sys.stderr, check=True)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="drain|train")
    drains = what.add_parser("drain", help="how fast the walkthrough's stream is")
    drains.add_argument("--events", type=int, default=200_000, help="default: %(default)s")
    drains.add_argument("--runs", type=int, default=3, help="default: %(default)s")
    trains = what.add_parser("train", help="how well and how fast networks are trained")
    trains.add_argument("--events", type=int, default=60_000, help="default: %(default)s")
    trains.add_argument("--csv", help="the challenge's file (.csv or .csv.gz) instead")
    trains.add_argument("--runs", type=int, default=1, help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
