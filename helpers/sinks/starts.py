"""The offsets at which a sink's streams began, recorded before the first batch is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from pyspark.sql import SparkSession

from helpers.spark import JsonFolder
from helpers.streaming import TopicAndPartition, is_another

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
        starts = {}
        for topic, content in self._kept.items():
            is_new = self._differs(topic, topic_ids)
            for partition, offset in content["offsets"].items():
                starts[TopicAndPartition(topic, int(partition))] = 0 if is_new else offset
        return starts

    def changed(self, topic_ids: Mapping[str, str]) -> list[str]:
        """Return the topics whose ids have changed since a stream began above offset 0."""
        return [
            topic
            for topic, content in self._kept.items()
            if self._differs(topic, topic_ids) and any(content["offsets"].values())
        ]

    def _differs(self, topic: str, topic_ids: Mapping[str, str]) -> bool:
        return is_another(self._kept[topic]["topic_id"], topic_ids.get(topic))

    def keep(self, starts: Mapping[TopicAndPartition, int], topic_ids: Mapping[str, str]) -> None:
        """Record where a stream begins, unless an earlier one began in the same topic."""
        for topic, topic_id in topic_ids.items():
            kept = self._kept.get(topic)
            if kept and not is_another(kept["topic_id"], topic_id):
                continue
            if kept:
                self._files.delete(_file_of(topic))
            start = {
                "topic": topic,
                "topic_id": topic_id,
                "offsets": {
                    str(part.partition): offset
                    for part, offset in starts.items()
                    if part.topic == topic
                },
            }
            self._files.write(_file_of(topic), start)
            self._kept[topic] = start


def _file_of(topic: str) -> str:
    """Return the name of a topic's file; a hash stands for the end of a long name."""
    end = topic[_LONGEST:] and hashlib.sha256(topic.encode()).hexdigest()[:32]
    return _PREFIX + topic[:_LONGEST] + end
