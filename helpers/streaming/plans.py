"""The plans of a stream with a checkpoint: which offsets each batch has, written before its use."""

from __future__ import annotations

import bisect
import json
import re
from dataclasses import astuple, dataclass

from py4j.java_gateway import JavaObject
from pyspark.sql import SparkSession

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
    """

    ranges: list[OffsetRange]
    positions: dict[TopicAndPartition, int]


class PlanLog:
    """A folder with a file for each batch, on any file system that Spark's Hadoop client knows.

    A file is written under another name and then renamed, so that it is there whole or not at all;
    it never replaces one that is there. Batches without records have no file.

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
        self._jvm, self._gateway = spark._jvm, spark.sparkContext._gateway
        configuration = spark._jsc.hadoopConfiguration()
        path = self._jvm.org.apache.hadoop.fs.Path(folder)
        self._files = path.getFileSystem(configuration)
        self._folder = self._files.makeQualified(path)
        self._files.mkdirs(self._folder)
        self._context = self._jvm.org.apache.hadoop.fs.FileContext.getFileContext(
            self._folder.toUri(), configuration
        )
        names = [status.getPath().getName() for status in self._files.listStatus(self._folder)]
        found = [re.fullmatch(r"(\d+)\.json", name) for name in names]
        self._batch_ids = sorted(int(name[1]) for name in found if name)

    def write(self, batch_id: int, plan: Plan) -> None:
        """Keep the plan of a batch that has none yet.

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
        }
        draft = self._path(f".{batch_id}.draft")
        file = self._files.create(draft, True)
        try:
            file.write(json.dumps(content).encode())
            file.hsync()
        finally:
            file.close()
        # Without options a rename fails where the name is taken.
        no_options = self._gateway.new_array(
            getattr(self._jvm.org.apache.hadoop.fs, "Options$Rename"), 0
        )
        self._context.rename(draft, self._path(f"{batch_id}.json"), no_options)
        bisect.insort(self._batch_ids, batch_id)

    def read(self, batch_id: int) -> Plan | None:
        """Return the plan of a batch; None if it has none, which is so if it had no records."""
        if batch_id not in self._batch_ids:
            return None
        file = self._files.open(self._path(f"{batch_id}.json"))
        try:
            content = json.loads(bytes(file.readAllBytes()))
        finally:
            file.close()
        ranges = [OffsetRange(*part) for part in content["ranges"]]
        positions = {
            TopicAndPartition(topic, partition): offset
            for topic, partition, offset in content["positions"]
        }
        return Plan(ranges, positions)

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
            self._files.delete(self._path(f"{batch_id}.json"), False)
        del self._batch_ids[:old]

    def _path(self, name: str) -> JavaObject:
        return self._jvm.org.apache.hadoop.fs.Path(self._folder, name)
