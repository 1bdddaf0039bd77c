"""The offsets at which a sink's streams began, recorded before the first batch is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pyspark.sql import SparkSession

from helpers.sinks.progress import Progress
from helpers.spark import JsonFolder
from helpers.streaming import TopicAndPartition, by_partition, by_topic

# Kafka allows topic names that begin with "_" or ".", which mark files to ignore.
_PREFIX = "topic-"
_LONGEST = 200  # characters of a topic in a file's name, which may have 255 with the rest


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


def _file_of(topic: str) -> str:
    """Return the name of a topic's file; a hash stands for the end of a long name."""
    end = topic[_LONGEST:] and hashlib.sha256(topic.encode()).hexdigest()[:32]
    return _PREFIX + topic[:_LONGEST] + end
