"""A sink's progress: the stored offsets, the topics they belong to, and where streams began."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from pyspark.sql import SparkSession

from helpers.sinks.errors import SinkError
from helpers.spark import JsonFolder
from helpers.streaming import OffsetRange, TopicAndPartition, by_partition, by_topic, is_another

# Kafka allows topic names that begin with "_" or ".", which mark files to ignore.
_PREFIX = "topic-"
_LONGEST = 200  # characters of a topic in a file's name, which may have 255 with the rest


@dataclass(frozen=True)
class Progress:
    """The next offset of each partition with stored records, and the ids of the topics.

    A topic that is deleted and recreated keeps its name but gets a new id. The old topic's offsets
    are meaningless in the new one.

    Attributes
    ----------
    positions : dict of TopicAndPartition to int
        The next offset of each partition.
    topic_ids : dict of str to str
        Kafka's topic ids by topic name. Topics for which Kafka gave none are
        missing until their next batch.

    Examples
    --------
    >>> progress = Progress().after([OffsetRange("events", 0, 0, 10, "id-1")])
    >>> progress.left([OffsetRange("events", 0, 5, 15, "id-1")])
    [OffsetRange(topic='events', partition=0, fromOffset=10, untilOffset=15)]
    >>> progress.changed({"events": "id-2"})
    ['events']
    """

    positions: dict[TopicAndPartition, int] = field(default_factory=dict)
    topic_ids: dict[str, str] = field(default_factory=dict)

    def changed(self, topic_ids: Mapping[str, str | None]) -> list[str]:
        """Return the topics whose id has changed since their last batch was stored."""
        return [
            topic
            for topic, topic_id in topic_ids.items()
            if is_another(self.topic_ids.get(topic), topic_id)
        ]

    def restarted(self, topic_ids: Mapping[str, str]) -> Progress:
        """Return the progress with changed topics reset to offset 0, under their new ids."""
        changed = self.changed(topic_ids)
        positions = {
            part: 0 if part.topic in changed else offset for part, offset in self.positions.items()
        }
        new_ids = {topic: topic_ids[topic] for topic in changed}
        return Progress(positions, self.topic_ids | new_ids)

    def left(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return ranges without the offsets that are already stored."""
        left = []
        for part in ranges:
            start = max(part.fromOffset, self.positions.get(part.topicAndPartition(), 0))
            if start < part.untilOffset:
                left.append(replace(part, fromOffset=start))
        return left

    def after(self, ranges: Iterable[OffsetRange]) -> Progress:
        """Return the progress after ranges are stored as well."""
        ranges = list(ranges)
        topic_ids = {part.topic: part.topic_id for part in ranges if part.topic_id}
        changed, positions = self.changed(topic_ids), dict(self.positions)
        for part in ranges:
            key = part.topicAndPartition()
            before = 0 if part.topic in changed else positions.get(key, 0)
            positions[key] = max(before, part.untilOffset)
        return Progress(positions, self.topic_ids | topic_ids)


class StartLog:
    """A file per topic with the offsets at which its first stream began.

    Otherwise a stream that begins at a topic's end and dies before its first batch would restart at
    the new end, and skip the records in between.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client is used.
    path : str
        The sink's path.

    Examples
    --------
    >>> log = StartLog(spark, str(getfixture("tmp_path")))
    >>> log.keep({TopicAndPartition("events", 0): 7}, {"events": "id-1"})
    >>> log.starts({})
    {TopicAndPartition(topic='events', partition=0): 7}
    >>> log.starts({"events": "id-2"})
    {TopicAndPartition(topic='events', partition=0): 0}
    """

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._files = JsonFolder(spark, f"{path}/starts")
        self._kept = {}
        for name in self._files.names():
            start = self._files.read(name)
            # Earlier versions of the kit had the topic only in the name.
            self._kept[start.get("topic", name.removeprefix(_PREFIX))] = start

    def starts(self, topic_ids: Mapping[str, str]) -> dict[TopicAndPartition, int]:
        """Return where streams began; 0 in topics whose ids have changed."""
        return self._begun().restarted(topic_ids).positions

    def changed(self, topic_ids: Mapping[str, str]) -> list[str]:
        """Return the topics whose ids have changed since a stream began above offset 0."""
        changed = self._begun().changed(topic_ids)
        return [topic for topic in changed if any(self._kept[topic]["offsets"].values())]

    def keep(self, starts: Mapping[TopicAndPartition, int], topic_ids: Mapping[str, str]) -> None:
        """Record where a stream begins, unless an earlier one began in the same topic."""
        changed, offsets = self._begun().changed(topic_ids), by_topic(starts)
        for topic, topic_id in topic_ids.items():
            if topic in changed:
                self._files.delete(_file_of(topic))
            elif topic in self._kept:
                continue
            start = {"topic": topic, "topic_id": topic_id, "offsets": offsets.get(topic, {})}
            self._files.write(_file_of(topic), start)
            self._kept[topic] = start

    def _begun(self) -> Progress:
        """Return where streams began, and the ids of their topics."""
        kept = self._kept.items()
        offsets = {topic: start["offsets"] for topic, start in kept}
        return Progress(by_partition(offsets), {topic: start["topic_id"] for topic, start in kept})


def check_ranges(ranges: list[OffsetRange]) -> None:
    """Raise `SinkError` if a batch's ranges are invalid.

    Examples
    --------
    >>> check_ranges([])
    Traceback (most recent call last):
    ...
    helpers.sinks.errors.SinkError: a batch without offset ranges can't be stored: it is unknown
    which records it has.
    """
    if not ranges:
        raise SinkError(
            "a batch without offset ranges can't be stored: it is unknown which records it has."
        )
    seen: set[TopicAndPartition] = set()
    for part in ranges:
        name = f"{part.topic}, partition {part.partition}"
        if part.topicAndPartition() in seen:
            raise SinkError(
                f"a batch has two offset ranges of {name}: a sink takes the batches of one source, "
                "and each partition once."
            )
        if not 0 <= part.fromOffset < part.untilOffset:
            raise SinkError(
                f"a batch has offsets {part.fromOffset} to {part.untilOffset} of {name}: a range "
                "must end after it begins."
            )
        seen.add(part.topicAndPartition())


def check_topics(ranges: Iterable[OffsetRange], topic_ids: Mapping[str, str]) -> None:
    """Raise `SinkError` if a topic was deleted since its ranges were planned.

    Parameters
    ----------
    ranges : iterable of OffsetRange
        A batch's offset ranges.
    topic_ids : mapping of str to str
        The current Kafka ids of the topics, by topic name; empty where Kafka gives none.

    Examples
    --------
    >>> check_topics([OffsetRange("events", 0, 0, 10, "id-1")], {"events": "id-1"})
    """
    for part in ranges:
        if part.topic_id and topic_ids.get(part.topic) not in (part.topic_id, ""):
            raise SinkError(
                f"topic {part.topic} was deleted while a batch was read from it, so the batch may "
                "lack records and is not stored. Start the stream again, with a new output path, "
                "or with ParquetSink(..., from_beginning=True) if the topic was created again."
            )


def _file_of(topic: str) -> str:
    """Return the name of a topic's file; a hash stands for the end of a long name."""
    end = topic[_LONGEST:] and hashlib.sha256(topic.encode()).hexdigest()[:32]
    return _PREFIX + topic[:_LONGEST] + end
