"""Other ways to score a topic, each in its best form, for `benchmark.py compare`.

All use the same network, saved to a file with its preparation as first layer, and count the events
of class 0. Their times leave out starting processes, imports and compiling the network.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import queue
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where `helpers` isn't installed

import numpy as np
import orjson
from kafka import KafkaConsumer, TopicPartition
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, FloatType

from helpers.higgs import FEATURES, SCHEMA
from helpers.spark import available_cores

if TYPE_CHECKING:
    import keras

BATCH = 4_096  # events per call of the network
ROWS_OF_2016 = 2_000  # events that are scored one by one
DEADLINE_SECONDS = 300
QUIET_SECONDS = 5  # Quix Streams ends when no record has come for this long

Predict = Callable[[np.ndarray], np.ndarray]
Read = Callable[["Task", list[int]], Iterator[list[bytes]]]


class Scored(NamedTuple):
    """The counts of a program that scored a topic, and its time."""

    events: int
    signal: int
    seconds: float


class Task(NamedTuple):
    """The records of a topic, and the file of the network that scores them."""

    bootstrap_servers: str
    topic: str
    ends: dict[int, int]  # the number of records in each partition
    model: str


def row_by_row(task: Task) -> Scored:
    """Score the first events one at a time, as in 2016.

    Raises
    ------
    RuntimeError
        If the network counts another signal in all of them at once.
    """
    network = _load(task.model)
    records = (value for chunk in _kafka_python(task, list(task.ends)) for value in chunk)
    network.predict(np.zeros((1, len(FEATURES)), dtype="float32"), verbose=0)
    rows, signal, began = [], 0, time.perf_counter()
    for value in itertools.islice(records, ROWS_OF_2016):
        event = json.loads(value)
        features = np.array([[event[name] for name in FEATURES]], dtype="float32")
        signal += int(network.predict(features, verbose=0)[0].argmax() == 0)
        rows.append(features)
    seconds = time.perf_counter() - began
    together = _signal(np.concatenate(rows), _compiled(task.model))
    if abs(together - signal) > 1:  # an event on the boundary may differ
        raise RuntimeError(f"{signal} events are signal one by one, but {together} together.")
    return Scored(len(rows), signal, seconds)


def keras_in_memory(task: Task) -> Scored:
    """Score events that are already in memory, on all cores."""
    values = [value for chunk in _kafka_python(task, list(task.ends)) for value in chunk]
    features, predict = _matrix(values), _compiled(task.model)
    began = time.perf_counter()
    signal = _signal(features, predict)
    return Scored(len(features), signal, time.perf_counter() - began)


def kafka_python_loop(task: Task) -> Scored:
    """Score with a loop around kafka-python's consumer, in one process per core."""
    return _score_with_loop(_kafka_python, task)


def confluent_loop(task: Task) -> Scored:
    """Score with a loop around Kafka's C client, as one would write it by hand."""
    return _score_with_loop(_confluent, task)


def quix_streams(task: Task) -> Scored:
    """Score with Quix Streams, in one process per core, with the network in a batching sink.

    The time is that from the first record of any process to the last batch, because a process can't
    know when its consumer group is ready, and looks out for more records at the end.
    """
    cores, group = _cores(task), f"peer-{uuid.uuid4()}"
    counts, _ = _in_processes(_score_in_quix, [(task, group)] * cores)
    events, signal, first, last = zip(*(part for part in counts if part[0]), strict=True)
    return Scored(sum(events), sum(signal), max(last) - min(first))


def spark_documentation(spark: SparkSession, task: Task, folder: str) -> Scored:
    """Score with Spark as its documentation shows it, into Spark's file sink."""
    spark.sparkContext.addPyFile(__file__)  # so that workers can import this module
    score = predict_batch_udf(
        lambda: _compiled(task.model), return_type=ArrayType(FloatType()), batch_size=BATCH,
        input_tensor_shapes=[[len(FEATURES)]],
    )  # fmt: skip
    records = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", task.bootstrap_servers)
        .option("subscribe", task.topic)
        .option("startingOffsets", "earliest")
        .load()
    )
    event = F.from_json(F.col("value").cast("string"), SCHEMA).alias("event")
    features = F.array(*FEATURES).cast(ArrayType(FloatType()))
    scored = records.select(event).select("event.*").select("EventId", score(features).alias("p"))
    index = F.when(F.col("p")[0] >= F.col("p")[1], 0).otherwise(1)
    writer = scored.withColumn("predicted_index", index).writeStream.format("parquet")
    writer = writer.option("checkpointLocation", f"{folder}/checkpoint").trigger(availableNow=True)
    began = time.perf_counter()
    query = writer.start(f"{folder}/scored")
    if not query.awaitTermination(DEADLINE_SECONDS):
        query.stop()
        raise TimeoutError(f"Spark's file sink was not done after {DEADLINE_SECONDS} s.")
    seconds = time.perf_counter() - began
    stored = spark.read.parquet(f"{folder}/scored")
    return Scored(stored.count(), stored.filter("predicted_index = 0").count(), seconds)


def _load(model: str) -> keras.Model:
    import keras

    return keras.saving.load_model(model, compile=False)


def _compiled(model: str) -> Predict:
    """Return a function that computes the probabilities of a matrix of features."""
    import tensorflow as tf

    network = _load(model)
    call = tf.function(
        lambda features: network(features, training=False),
        input_signature=[tf.TensorSpec((None, len(FEATURES)), tf.float32)],
    )
    call(np.zeros((BATCH, len(FEATURES)), dtype="float32"))
    return lambda features: call(features).numpy()


def _matrix(values: list[bytes]) -> np.ndarray:
    """Return the features in JSON records."""
    events = map(orjson.loads, values)
    return np.array([[event[name] for name in FEATURES] for event in events], dtype="float32")


def _signal(features: np.ndarray, predict: Predict) -> int:
    """Return how many rows have class 0."""
    parts = (features[start : start + BATCH] for start in range(0, len(features), BATCH))
    return sum(int((predict(part).argmax(axis=1) == 0).sum()) for part in parts)


def _kafka_python(task: Task, partitions: list[int]) -> Iterator[list[bytes]]:
    """Yield the records of some partitions, as kafka-python returns them."""
    left = sum(task.ends[partition] for partition in partitions)
    with KafkaConsumer(
        bootstrap_servers=task.bootstrap_servers, enable_auto_commit=False, max_poll_records=BATCH,
        max_partition_fetch_bytes=8 * 2**20,
    ) as consumer:  # fmt: skip
        consumer.assign([TopicPartition(task.topic, partition) for partition in partitions])
        consumer.seek_to_beginning()
        while left:
            polled = consumer.poll(timeout_ms=1_000)
            values = [record.value for records in polled.values() for record in records]
            left -= len(values)
            yield values


def _confluent(task: Task, partitions: list[int]) -> Iterator[list[bytes]]:
    """Yield the records of some partitions, as Kafka's C client returns them."""
    import confluent_kafka

    consumer = confluent_kafka.Consumer(
        {
            "bootstrap.servers": task.bootstrap_servers,
            "group.id": f"peer-{uuid.uuid4()}",
            "enable.auto.commit": False,
            "check.crcs": False,
        }
    )
    assigned = [confluent_kafka.TopicPartition(task.topic, number, 0) for number in partitions]
    consumer.assign(assigned)
    left = sum(task.ends[partition] for partition in partitions)
    while left:
        values = [message.value() for message in consumer.consume(BATCH, timeout=0.2)]
        left -= len(values)
        yield values
    consumer.close()


def _score_with_loop(read: Read, task: Task) -> Scored:
    """Score a topic in one process per core, each with a share of the partitions."""
    cores, partitions = _cores(task), sorted(task.ends)
    shares = [(read, task, partitions[number::cores]) for number in range(cores)]
    counts, seconds = _in_processes(_score_share, shares)
    events, signal = (sum(numbers) for numbers in zip(*counts, strict=True))
    return Scored(events, signal, seconds)


def _cores(task: Task) -> int:
    """Return how many processes can share the partitions, one per core."""
    return min(available_cores(), len(task.ends))


def _in_processes(function: Callable, arguments: list[tuple]) -> tuple[list[tuple], float]:
    """Call a function in a process for each of its arguments, also with a barrier and a queue.

    Return what the processes put into the queue, and the seconds since all were at the barrier.

    Raises
    ------
    RuntimeError
        If a process fails, or isn't done within `DEADLINE_SECONDS`.
    """
    context = multiprocessing.get_context("spawn")
    results, ready = context.Queue(), context.Barrier(len(arguments) + 1)
    processes = [
        context.Process(target=function, args=(*each, ready, results), daemon=True)
        for each in arguments
    ]
    for process in processes:
        process.start()
    try:
        ready.wait(DEADLINE_SECONDS)
        began = time.perf_counter()
        counts = []
        while len(counts) < len(processes):
            with contextlib.suppress(queue.Empty):
                counts.append(results.get(timeout=1))
                continue
            if any(process.exitcode for process in processes):
                raise RuntimeError("a process failed; its error is printed above.")
            if time.perf_counter() - began > DEADLINE_SECONDS:
                raise RuntimeError(f"a process was not done after {DEADLINE_SECONDS} s.")
        return counts, time.perf_counter() - began
    finally:
        for process in processes:
            process.kill()
            process.join()


def _score_share(read, task: Task, partitions: list[int], ready, results) -> None:
    """Score some partitions on one core, once all processes are ready."""
    predict, events, signal = _compiled_for_one_core(task.model), 0, 0
    ready.wait(DEADLINE_SECONDS)
    for values in read(task, partitions):
        if values:
            events += len(values)
            signal += _signal(_matrix(values), predict)
    results.put((events, signal))


def _score_in_quix(task: Task, group: str, ready, results) -> None:
    """Score the partitions that a consumer group assigns, once all processes are ready."""
    from quixstreams import Application
    from quixstreams.sinks import BatchingSink, SinkBatch

    predict = _compiled_for_one_core(task.model)

    class Scores(BatchingSink):
        """Scores the records between two commits, and counts them."""

        events = signal = 0
        first = last = 0.0

        def add(self, *record, **others) -> None:
            self.first = self.first or time.time()
            super().add(*record, **others)

        def write(self, batch: SinkBatch) -> None:
            self.events += batch.size
            self.signal += _signal(_matrix([item.value for item in batch]), predict)
            self.last = time.time()

    with tempfile.TemporaryDirectory() as folder:  # of each process, because two can't create one
        application = Application(
            task.bootstrap_servers, consumer_group=group, auto_offset_reset="earliest",
            commit_every=BATCH, loglevel="WARNING", state_dir=folder,
        )  # fmt: skip
        scores, topic = Scores(), application.topic(task.topic, value_deserializer="bytes")
        application.dataframe(topic).sink(scores)
        ready.wait(DEADLINE_SECONDS)
        application.run(timeout=QUIET_SECONDS, collect=False)
    results.put((scores.events, scores.signal, scores.first, scores.last))


def _compiled_for_one_core(model: str) -> Predict:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    return _compiled(model)
