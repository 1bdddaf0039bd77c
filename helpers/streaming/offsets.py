"""What a batch is made of: ranges of offsets, each in one partition of a topic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


@dataclass(frozen=True, order=True)
class Broker:
    """The address of a Kafka broker.

    Examples
    --------
    >>> Broker("127.0.0.1", 9092)
    Broker(host='127.0.0.1', port=9092)
    """

    host: str
    port: int


@dataclass(frozen=True, order=True)
class TopicAndPartition:
    """One partition of a topic.

    Examples
    --------
    >>> TopicAndPartition("Machine_Learning", 0)
    TopicAndPartition(topic='Machine_Learning', partition=0)
    """

    topic: str
    partition: int


@dataclass(frozen=True, order=True)
class OffsetRange:
    """The records of a partition from one offset up to, but not including, another.

    Attributes
    ----------
    topic : str
    partition : int
    fromOffset, untilOffset : int
    topic_id : str or None
        Kafka's id of the topic, where it is known: a topic that is deleted and created again has
        the old name and another id, and its offsets are other records. It takes no part in
        comparisons.

    Examples
    --------
    >>> OffsetRange("Machine_Learning", 0, fromOffset=10, untilOffset=25).count()
    15
    """

    topic: str
    partition: int
    fromOffset: int  # noqa: N815 (the name that the API had)
    untilOffset: int  # noqa: N815
    topic_id: str | None = field(default=None, compare=False, repr=False)

    def topicAndPartition(self) -> TopicAndPartition:  # noqa: N802
        """Return the partition that the range is of."""
        return TopicAndPartition(self.topic, self.partition)

    def count(self) -> int:
        """Return the number of offsets in the range.

        It is the number of records, unless compaction has removed some, or transactions have left
        marks between them.
        """
        return self.untilOffset - self.fromOffset


@dataclass(frozen=True)
class PlannedBatch:
    """A batch of a stream.

    Attributes
    ----------
    batch_id : int
        What Spark calls it; of a DStream, its time in milliseconds since 1970.
    ranges : list of OffsetRange
        Its offsets, with the ids of their topics.
    records : pyspark.sql.DataFrame
        Its records, with the columns of Spark's Kafka source.
    """

    batch_id: int
    ranges: list[OffsetRange]
    records: DataFrame


def ends_of(ranges: list[OffsetRange]) -> dict[TopicAndPartition, int]:
    """Return where ranges end, by their partitions.

    Examples
    --------
    >>> ends_of([OffsetRange("events", 0, 10, 25)])
    {TopicAndPartition(topic='events', partition=0): 25}
    """
    return {part.topicAndPartition(): part.untilOffset for part in ranges}
