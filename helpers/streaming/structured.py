"""What Structured Streaming needs to share a sink with DStreams: offset ranges, and where to go on.

Spark plans the batches of a query itself, and writes them down in the checkpoint before it runs
them: there a batch's offset ranges are found.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession

from helpers.files import folder_names, read_file
from helpers.streaming.offsets import OffsetRange, TopicAndPartition
from helpers.streaming.planner import OffsetPlanner
from helpers.streaming.reader import source_options
from helpers.streaming.settings import modern_settings

_EARLIEST = -2  # what Spark's source calls a partition's beginning


class CheckpointRanges:
    """The offset ranges of a query's batches, by their ids, as its checkpoint has them.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session that the query runs in.
    checkpoint : str
        The query's ``checkpointLocation``. The query has Kafka as its only source.

    Examples
    --------
    >>> checkpoint = str(getfixture("tmp_path"))
    >>> settings = {"bootstrap.servers": kafka.bootstrap_servers, "auto.offset.reset": "earliest"}
    >>> writer = read_stream(spark, ["events"], settings).writeStream.format("noop")
    >>> writer = writer.option("checkpointLocation", checkpoint).trigger(availableNow=True)
    >>> writer.start().awaitTermination(60)
    True
    >>> CheckpointRanges(spark, checkpoint)(0)
    [OffsetRange(topic='events', partition=0, fromOffset=0, untilOffset=100)]
    """

    def __init__(self, spark: SparkSession, checkpoint: str) -> None:
        self._spark, self._checkpoint = spark, checkpoint.rstrip("/")

    def __call__(self, batch_id: int) -> list[OffsetRange]:
        """Return the ranges of a batch that Spark has planned.

        Raises
        ------
        FileNotFoundError
            If the checkpoint has no such batch.
        """
        ends = self._offsets(f"offsets/{batch_id}")
        before = f"offsets/{batch_id - 1}" if batch_id else "sources/0/0"
        starts = self._offsets(before)
        # A partition that is new in a batch is read from its beginning.
        return sorted(
            OffsetRange(part.topic, part.partition, starts.get(part, 0), end)
            for part, end in ends.items()
            if end > starts.get(part, 0)
        )

    def finished(self) -> dict[TopicAndPartition, int]:
        """Return where the query's last finished batch ended, in each partition it has read."""
        batches = [int(name) for name in self._names("commits") if name.isdigit()]
        if not batches:
            return {}
        starts = self._offsets("sources/0/0")
        ends = self._offsets(f"offsets/{max(batches)}")
        return {part: end for part, end in ends.items() if end > starts.get(part, 0)}

    def _names(self, folder: str) -> list[str]:
        return folder_names(self._spark, f"{self._checkpoint}/{folder}")

    def _offsets(self, name: str) -> dict[TopicAndPartition, int]:
        """Return the offsets in one of the checkpoint's files, whose last line they are."""
        try:
            text = read_file(self._spark, f"{self._checkpoint}/{name}")
        except Py4JJavaError:
            raise FileNotFoundError(f"the checkpoint {self._checkpoint} has no {name}") from None
        offsets = json.loads(text.strip().splitlines()[-1])
        return {
            TopicAndPartition(topic, int(partition)): offset
            for topic, partitions in offsets.items()
            for partition, offset in partitions.items()
        }


def read_stream(
    spark: SparkSession,
    topics: Iterable[str],
    settings: Mapping[str, str],
    positions: Mapping[TopicAndPartition, int] | None = None,
    max_offsets: int | None = None,
) -> DataFrame:
    """Return a streaming DataFrame of Kafka's records, with the settings that a DStream takes.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        A session with the Kafka connector.
    topics : iterable of str
        The topics.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names. Spark keeps the offsets in the query's
        checkpoint, so a ``group.id`` has no effect; ``auto.offset.reset`` says where a new query
        begins.
    positions : mapping of TopicAndPartition to int, optional
        Where a query with a new checkpoint goes on, as a sink says; partitions that are left out
        are read from their beginning. If it is empty, ``auto.offset.reset`` says where.
    max_offsets : int, optional
        The most offsets in a batch.

    Returns
    -------
    pyspark.sql.DataFrame
        The columns of Spark's Kafka source.

    Examples
    --------
    >>> settings = {"bootstrap.servers": kafka.bootstrap_servers}
    >>> read_stream(spark, ["events"], settings).isStreaming
    True
    """
    topics, settings = list(topics), modern_settings(kafka_params=settings)
    stream = (
        spark.readStream.format("kafka")
        .options(**source_options(settings))
        .option("subscribe", ",".join(topics))
        .option("startingOffsets", _starting_offsets(spark, topics, settings, positions))
    )
    if max_offsets:
        stream = stream.option("maxOffsetsPerTrigger", max_offsets)
    return stream.load()


def _starting_offsets(
    spark: SparkSession,
    topics: list[str],
    settings: Mapping[str, str],
    positions: Mapping[TopicAndPartition, int] | None,
) -> str:
    """Return where a new query begins, as Spark's source wants it: all partitions, or a word."""
    # The planner finds out whether Kafka can be reached, and says it clearly if not.
    asked = {name: value for name, value in settings.items() if name != "group.id"}
    planner = OffsetPlanner(spark, topics, asked, positions=positions)
    try:
        partitions = planner.positions()
    finally:
        planner.close()
    if not positions:
        return settings["auto.offset.reset"]
    starts: dict[str, dict[str, int]] = {}
    for part in partitions:
        start = positions.get(part, _EARLIEST)
        starts.setdefault(part.topic, {})[str(part.partition)] = start
    return json.dumps(starts)
