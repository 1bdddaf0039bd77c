"""Reads offset ranges as DataFrames, independently of any consumer group."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping

from pyspark.sql import DataFrame, SparkSession

from helpers.kafka_settings import ClientSettings
from helpers.streaming.client import CLIENT_SETTINGS
from helpers.streaming.offsets import OffsetRange, by_topic, ends_of
from helpers.streaming.settings import use_added_jars

# Spark's source rejects these, because it takes offsets instead, or only the planner uses them.
_NOT_FOR_THE_READER = {"auto.offset.reset", "group.id", *CLIENT_SETTINGS}

_READER_SETTINGS = {
    # At a partition's end, a consumer asks the broker to wait half a second for more records, and
    # gets nothing else from that broker meanwhile. 100,000 records took 1.3 s, and 0.4 s with this.
    "fetch.max.wait.ms": "10",
    # How much one poll may decompress into Java's memory: 250 records or 64 MB, whichever is less.
    # Kafka limits only the compressed size of a fetch, and lz4 packs 255 bytes into one, zstd
    # thousands. Compared with 10,000 records and 16 MB, this costs 2 microseconds per event.
    "max.poll.records": "250",
    "max.partition.fetch.bytes": str(256 * 1024),
    # Spark's driver, which queries Kafka before a batch, waits as long as the planner, not a
    # minute.
    "request.timeout.ms": "15000",
}

# How many records make a task worth starting.
RECORDS_PER_TASK = 1_000

# The columns behind a stream's elements. The record's time isn't one of them: it may be a date that
# Python lacks.
ELEMENT_COLUMNS = ("key", "value", "topic", "partition", "offset")

# How long a task waits for a broker that is away before it fails and is retried.
POLL_SECONDS = 30


def spark_options(settings: Mapping[str, str]) -> ClientSettings:
    """Return a Kafka client's settings as options of Spark's Kafka source and sink.

    Parameters
    ----------
    settings : mapping
        Settings by Kafka's names; those that Spark's source rejects are left out.

    Examples
    --------
    >>> spark_options({"bootstrap.servers": "127.0.0.1:9092", "auto.offset.reset": "earliest"})
    {'kafka.bootstrap.servers': '127.0.0.1:9092'}
    """
    return ClientSettings({
        f"kafka.{name}": value
        for name, value in settings.items()
        if name not in _NOT_FOR_THE_READER
    })


def source_options(settings: Mapping[str, str]) -> ClientSettings:
    """Return a Kafka client's settings as options of Spark's Kafka source.

    Parameters
    ----------
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names.

    Examples
    --------
    >>> source_options({"bootstrap.servers": "127.0.0.1:9092"})["kafka.bootstrap.servers"]
    '127.0.0.1:9092'
    >>> source_options({"allow.auto.create.topics": "true"})["kafka.allow.auto.create.topics"]
    'false'
    """
    merged = {**_READER_SETTINGS, **settings}
    # Kafka rejects a time-out for a whole call that is shorter than the one for a request.
    merged.setdefault("default.api.timeout.ms", merged["request.timeout.ms"])
    return spark_options(merged) | {
        "kafkaConsumer.pollTimeoutMs": str(POLL_SECONDS * 1000),
        # By default, a task that asks for a deleted topic creates it again.
        "kafka.allow.auto.create.topics": CLIENT_SETTINGS["allow.auto.create.topics"],
    }


class RangeReader:
    """Reads offset ranges with Spark's Kafka source.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        A session with the Kafka connector.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names.
    skip_deleted : bool
        Whether offsets that retention has deleted are left out; otherwise, they are an error.

    Examples
    --------
    >>> reader = RangeReader(spark, {"bootstrap.servers": kafka.bootstrap_servers})
    >>> reader.read([OffsetRange("events", 0, 0, 100)]).count()
    100
    """

    def __init__(
        self, spark: SparkSession, settings: Mapping[str, str], skip_deleted: bool = False
    ) -> None:
        self._spark = spark
        quieten(spark)
        # Spark keeps consumers and their prefetched records for five minutes, by group. By default,
        # each read has a new group, so they would pile up until Java's memory is full. The
        # consumers neither join this group nor commit to it.
        self._options = source_options(settings) | {
            "kafka.group.id": f"spark-kafka-reader-{uuid.uuid4()}",
            "failOnDataLoss": str(not skip_deleted).lower(),
        }

    def read(self, ranges: Iterable[OffsetRange]) -> DataFrame:
        """Return the records of the ranges.

        Parameters
        ----------
        ranges : iterable of OffsetRange
            At least one, and at most one per partition.

        Returns
        -------
        pyspark.sql.DataFrame
            The columns of Spark's Kafka source: key, value (binary), topic, partition, offset,
            timestamp, timestampType. Nothing is read until an action needs it.
        """
        ranges = list(ranges)
        starts = by_topic({part.topicAndPartition(): part.fromOffset for part in ranges})
        assigned = {topic: sorted(map(int, numbers)) for topic, numbers in starts.items()}
        use_added_jars(self._spark)
        return (
            self._spark.read.format("kafka")
            .options(**self._options)
            .option("assign", json.dumps(assigned))
            .option("startingOffsets", json.dumps(starts))
            .option("endingOffsets", json.dumps(by_topic(ends_of(ranges))))
            .load()
        )


def quieten(spark: SparkSession) -> None:
    """Keep Spark from writing a warning per batch, or per record, for as long as a stream runs.

    Spark warns of each read with a group and of each batch that takes longer than the interval, and
    before 4.0 of each record that goes to Python.

    Examples
    --------
    >>> quieten(spark)
    """
    log4j = spark._jvm.org.apache.logging.log4j
    names = ["kafka010.KafkaSourceProvider"]
    # Newer versions of Spark have this class in another package.
    names += [f"execution.streaming.{place}ProcessingTimeExecutor" for place in ("", "runtime.")]
    if spark.version.startswith("3."):
        names.append("kafka010.consumer.KafkaDataConsumer")
    for name in names:
        logger = f"org.apache.spark.sql.{name}"
        log4j.core.config.Configurator.setLevel(logger, log4j.Level.ERROR)


def few_tasks(records: DataFrame, ranges: Iterable[OffsetRange]) -> DataFrame:
    """Return a batch's records, read in no more tasks than are worth starting.

    Spark reads each Kafka partition in a separate task. A task costs 0.05 s or more, mostly in
    Python, whether it has one record or a thousand.

    Parameters
    ----------
    records : pyspark.sql.DataFrame
        The records of the ranges.
    ranges : iterable of OffsetRange
        The batch's ranges.

    Examples
    --------
    >>> ranges = [OffsetRange("events", partition, 0, 100) for partition in range(4)]
    >>> few_tasks(spark.range(400, numPartitions=4), ranges).rdd.getNumPartitions()
    1
    """
    counts = [part.count() for part in ranges]
    tasks = -(-sum(counts) // RECORDS_PER_TASK)
    return records.coalesce(tasks) if 0 < tasks < len(counts) else records
