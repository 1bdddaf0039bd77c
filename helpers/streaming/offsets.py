"""Offset ranges, which batches consist of, each in one partition of a topic."""

from __future__ import annotations

from collections.abc import Mapping
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
        Kafka's id of the topic, if known: a topic that is deleted and created again has the same
        name but another id, and its offsets refer to other records. Comparisons ignore it.

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
        """Return the partition of the range."""
        return TopicAndPartition(self.topic, self.partition)

    def count(self) -> int:
        """Return the number of offsets in the range.

        This is the number of records, unless compaction has removed some, or transactions have left
        markers between them.
        """
        return self.untilOffset - self.fromOffset


@dataclass(frozen=True)
class PlannedBatch:
    """A batch of a stream.

    Attributes
    ----------
    batch_id : int
        Spark's number of the batch; for a DStream, its time in milliseconds since 1970.
    ranges : list of OffsetRange
        Its offsets, with the ids of their topics.
    records : pyspark.sql.DataFrame
        Its records, with the columns of Spark's Kafka source.
    planned_at : int or None
        When Spark began it, in milliseconds since 1970, if its id is not a time.
    """

    batch_id: int
    ranges: list[OffsetRange]
    records: DataFrame
    planned_at: int | None = None


def ends_of(ranges: list[OffsetRange]) -> dict[TopicAndPartition, int]:
    """Return the end of each range, by partition.

    Examples
    --------
    >>> ends_of([OffsetRange("events", 0, 10, 25)])
    {TopicAndPartition(topic='events', partition=0): 25}
    """
    return {part.topicAndPartition(): part.untilOffset for part in ranges}


def is_another(before: str | None, now: str | None) -> bool:
    """Return whether a topic's id has changed; without an id, as before Kafka 2.8, that's unknown.

    Examples
    --------
    >>> is_another("id-1", "id-2"), is_another("id-1", ""), is_another(None, "id-2")
    (True, False, False)
    """
    return bool(before and now) and before != now


def by_topic(offsets: Mapping[TopicAndPartition, int]) -> dict[str, dict[str, int]]:
    """Return offsets by topic and partition number, as in Spark's JSON.

    Examples
    --------
    >>> by_topic({TopicAndPartition("events", 0): 25})
    {'events': {'0': 25}}
    """
    topics: dict[str, dict[str, int]] = {}
    for partition, offset in offsets.items():
        topics.setdefault(partition.topic, {})[str(partition.partition)] = offset
    return topics


def by_partition(topics: Mapping[str, Mapping[str, int]]) -> dict[TopicAndPartition, int]:
    """Return offsets by partition, the inverse of `by_topic`.

    Examples
    --------
    >>> by_partition({"events": {"0": 25}})
    {TopicAndPartition(topic='events', partition=0): 25}
    """
    return {
        TopicAndPartition(topic, int(number)): offset
        for topic, numbers in topics.items()
        for number, offset in numbers.items()
    }
