"""The plans of a stream with a checkpoint: which offsets each batch has, written before its use."""

from __future__ import annotations

import bisect
from dataclasses import astuple, dataclass, field

from pyspark.sql import SparkSession

from helpers.spark import JsonFolder
from helpers.streaming.offsets import OffsetRange, TopicAndPartition


@dataclass(frozen=True)
class Plan:
    """What was decided for a batch.

    Attributes
    ----------
    ranges : list of OffsetRange
        The batch's offsets.
    positions : dict of TopicAndPartition to int
        Where the batch after it begins in each partition.
    topic_ids : dict of str to str
        The ids of the topics, by their names.
    """

    ranges: list[OffsetRange]
    positions: dict[TopicAndPartition, int]
    topic_ids: dict[str, str] = field(default_factory=dict)


class PlanLog:
    """A folder with a file for each batch, on any file system that Spark's Hadoop client knows.

    Batches without records have no file, other than the first, which says where the stream began.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client is used.
    folder : str
        The folder's path or URI; it is made if it isn't there.

    Examples
    --------
    >>> log = PlanLog(spark, str(getfixture("tmp_path") / "plans"))
    >>> ends = {TopicAndPartition("events", 0): 10}
    >>> log.write(1_000, Plan([OffsetRange("events", 0, 0, 10)], ends))
    >>> log.read(1_000).ranges
    [OffsetRange(topic='events', partition=0, fromOffset=0, untilOffset=10)]
    """

    def __init__(self, spark: SparkSession, folder: str) -> None:
        self._files = JsonFolder(spark, folder)
        self._batch_ids = sorted(int(name) for name in self._files.names())

    def write(self, batch_id: int, plan: Plan) -> None:
        """Keep the plan of a batch that has none yet, or the same one: a second try does no harm.

        Parameters
        ----------
        batch_id : int
            The batch's time, in milliseconds since 1970.
        plan : Plan
            What was decided.
        """
        content = {
            "ranges": [astuple(part) for part in plan.ranges],
            "positions": [[*astuple(part), offset] for part, offset in plan.positions.items()],
            "topic_ids": plan.topic_ids,
        }
        try:
            self._files.write(str(batch_id), content)
        except FileExistsError:
            # The file system may have done what it said it could not.
            if self._read(batch_id) != plan:
                raise
        bisect.insort(self._batch_ids, batch_id)

    def read(self, batch_id: int) -> Plan | None:
        """Return the plan of a batch; None if it has none, which is so if it had no records."""
        return self._read(batch_id) if batch_id in self._batch_ids else None

    def last(self) -> Plan | None:
        """Return the plan of the last batch; None if there is none."""
        return self.read(self._batch_ids[-1]) if self._batch_ids else None

    def forget(self, before: int) -> None:
        """Remove the plans of batches before a time, but not the last plan.

        Parameters
        ----------
        before : int
            Milliseconds since 1970.
        """
        old = bisect.bisect_left(self._batch_ids, before, hi=max(0, len(self._batch_ids) - 1))
        for batch_id in self._batch_ids[:old]:
            self._files.delete(str(batch_id))
        del self._batch_ids[:old]

    def _read(self, batch_id: int) -> Plan:
        content = self._files.read(str(batch_id))
        ranges = [OffsetRange(*part) for part in content["ranges"]]
        positions = {
            TopicAndPartition(topic, partition): offset
            for topic, partition, offset in content["positions"]
        }
        return Plan(ranges, positions, content.get("topic_ids", {}))
