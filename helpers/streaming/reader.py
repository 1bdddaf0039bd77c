"""Offset ranges as DataFrames: read with Spark's own Kafka source, apart from any group."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping

from pyspark.sql import DataFrame, SparkSession

from helpers.streaming.client import CLIENT_SETTINGS
from helpers.streaming.offsets import OffsetRange
from helpers.streaming.settings import use_added_jars

# Spark's source refuses these (it is told the offsets), or they are the planner's business.
_NOT_FOR_THE_READER = {"auto.offset.reset", "group.id", *CLIENT_SETTINGS}

_READER_SETTINGS = {
    # A consumer that has come to a partition's end asks the broker to wait half a second for more,
    # and gets nothing else from that broker meanwhile: 100,000 records took 1.3 s so, 0.4 s here.
    "fetch.max.wait.ms": "10",
    # What one poll may unpack into Java's memory. Kafka bounds a fetch in compressed bytes only,
    # and lz4 packs 255 bytes into one, zstd thousands: 250 records or 64 MB, whichever is less. It
    # costs 2 microseconds an event against 10,000 records and 16 MB.
    "max.poll.records": "250",
    "max.partition.fetch.bytes": str(256 * 1024),
    # What Spark's driver asks Kafka before a batch: as long as the planner waits, not a minute.
    "request.timeout.ms": "15000",
}

# Of the group that a reader's consumers are in. They neither join it nor commit to it.
_GROUP_PREFIX = "spark-kafka-reader"

# What a task should have, at least, to be worth its start.
RECORDS_PER_TASK = 1_000

# How long a task waits for records of a broker that is away, before it fails and is tried again.
POLL_SECONDS = 30


def source_options(settings: Mapping[str, str]) -> dict[str, str]:
    """Return a Kafka client's settings as options of Spark's Kafka source.

    Parameters
    ----------
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names.

    Examples
    --------
    >>> source_options({"bootstrap.servers": "127.0.0.1:9092"})["kafka.bootstrap.servers"]
    '127.0.0.1:9092'
    """
    merged = {**_READER_SETTINGS, **settings}
    # Kafka refuses to wait for a whole answer for a shorter time than for a part of it.
    merged.setdefault("default.api.timeout.ms", merged["request.timeout.ms"])
    options = {
        f"kafka.{name}": value
        for name, value in merged.items()
        if name not in _NOT_FOR_THE_READER
    }
    return options | {"kafkaConsumer.pollTimeoutMs": str(POLL_SECONDS * 1000)}


class RangeReader:
    """Reads offset ranges with Spark's own Kafka source.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        A session with the Kafka connector.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names.

    Examples
    --------
    >>> reader = RangeReader(spark, {"bootstrap.servers": kafka.bootstrap_servers})
    >>> reader.read([OffsetRange("events", 0, 0, 100)]).count()
    100
    """

    def __init__(self, spark: SparkSession, settings: Mapping[str, str]) -> None:
        self._spark = spark
        # Spark keeps consumers, and what they have fetched ahead, by group for five minutes. With a
        # group for each read, as it makes them otherwise, they pile up until Java's memory is full.
        group = f"{_GROUP_PREFIX}-{uuid.uuid4()}"
        self._options = source_options(settings) | {"kafka.group.id": group}

    def read(self, ranges: Iterable[OffsetRange]) -> DataFrame:
        """Return the records of the ranges.

        Parameters
        ----------
        ranges : iterable of OffsetRange
            At least one, at most one a partition.

        Returns
        -------
        pyspark.sql.DataFrame
            The columns of Spark's Kafka source: key, value (binary), topic, partition, offset,
            timestamp, timestampType. Nothing is read before an action asks for it.
        """
        starts: dict[str, dict[str, int]] = defaultdict(dict)
        ends: dict[str, dict[str, int]] = defaultdict(dict)
        for part in ranges:
            starts[part.topic][str(part.partition)] = part.fromOffset
            ends[part.topic][str(part.partition)] = part.untilOffset
        assigned = {topic: sorted(map(int, partitions)) for topic, partitions in starts.items()}
        use_added_jars(self._spark)
        return (
            self._spark.read.format("kafka")
            .options(**self._options)
            .option("assign", json.dumps(assigned))
            .option("startingOffsets", json.dumps(starts))
            .option("endingOffsets", json.dumps(ends))
            .load()
        )


def few_tasks(records: DataFrame, ranges: Iterable[OffsetRange]) -> DataFrame:
    """Return a batch's records in no more tasks than it deserves.

    Spark reads each Kafka partition in a task of its own. A task costs 0.05 s or more, mostly in
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
