"""Keeps a stream's plans in its checkpoint, and finds them again after a crash."""

from __future__ import annotations

import bisect
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field, replace

from helpers.kafka_settings import is_secret
from helpers.spark import JsonFolder, get_spark, protect_folder, summary
from helpers.streaming.errors import PASSING_ERRORS, StreamError, insist
from helpers.streaming.listener import ContextListener
from helpers.streaming.offsets import OffsetRange, TopicAndPartition

_LOGGER = logging.getLogger(__name__)

# Spark writes its checkpoint some time after a batch. If the driver dies before that, the next one
# asks for the batch again, so plans are kept this long after their commit. Wall-clock time counts,
# because a stream that catches up goes through hours of intervals in a minute.
KEPT_SECONDS = 600


@dataclass(frozen=True)
class StreamDefinition:
    """The definition of a stream; Spark's checkpoint keeps it to recreate the stream after a crash.

    Attributes
    ----------
    topics : list of str
        The topics to read.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names.
    interval : float
        The interval of the micro-batches, in seconds.
    from_offsets : mapping of TopicAndPartition to int, optional
        The partitions to read, and where each starts.
    positions : mapping of TopicAndPartition to int, optional
        Where to resume, as `OffsetPlanner` takes it.
    shares : bool
        Whether later streams of the same context and group take over its topics.
    stream_id : str
        The name of the folder with the stream's plans.
    plans : str or None
        The path of that folder, if Spark has recovered the stream from its checkpoint.
    begun : bool
        Whether the folder has had a plan.
    """

    topics: list[str]
    settings: Mapping[str, str] = field(repr=False)  # may hold passwords
    interval: float
    from_offsets: Mapping[TopicAndPartition, int] | None = None
    positions: Mapping[TopicAndPartition, int] | None = None
    shares: bool = False
    stream_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    plans: str | None = None
    begun: bool = False


@dataclass(frozen=True)
class Plan:
    """A planned batch, and where the next one begins.

    Attributes
    ----------
    ranges : list of OffsetRange
        The batch's offsets.
    positions : dict of TopicAndPartition to int
        Where the next batch begins in each partition.
    topic_ids : dict of str to str
        The ids of the topics by name.
    """

    ranges: list[OffsetRange]
    positions: dict[TopicAndPartition, int]
    topic_ids: dict[str, str] = field(default_factory=dict)


class Recovery:
    """Keeps a stream's plans in its checkpoint, each in a file, and finds them after a crash.

    Any file system of Spark's Hadoop client will do. Without a checkpoint, nothing is kept.

    Parameters
    ----------
    definition : StreamDefinition
        What defines the stream.
    listener : ContextListener
        Knows the context, and with it the checkpoint.
    stopped : threading.Event
        Set when the stream stops, which ends the retries.
    """

    def __init__(
        self, definition: StreamDefinition, listener: ContextListener, stopped: threading.Event
    ) -> None:
        self._definition, self._listener, self._stopped = definition, listener, stopped
        self._recovered_at = None if definition.plans is None else time.time() * 1000
        self._files: JsonFolder | None = None
        self._intervals: list[int] = []  # those with a file, sorted
        self._committed: deque[tuple[float, int]] = deque()  # the time, and the interval

    def definition(self) -> StreamDefinition:
        """Return what Spark's checkpoint keeps of the stream's definition."""
        begun = self._definition.begun or bool(self._intervals)
        return replace(self._definition, plans=self._folder(), begun=begun)

    def last(self) -> Plan | None:
        """Return the last plan made before a crash; None if the stream is new.

        Raises
        ------
        StreamError
            If there were plans, but the folder has none; or if the last one is of the future.
        """
        if self._definition.plans is None:
            return None
        self._open(self._definition.plans)
        if self._definition.begun and not self._intervals:
            raise StreamError(
                f"the stream resumes from a checkpoint whose plans are missing: "
                f"{self._definition.plans} is empty. If the checkpoint was moved or copied, put it "
                "back where it was; otherwise begin with a new checkpoint."
            )
        if not self._intervals:
            return None
        # Spark asks for it only when its time has come, and the stream would be past it by then.
        ahead = self._intervals[-1] / 1000 - time.time()
        if ahead > self._definition.interval:
            raise StreamError(
                f"the last batch of the checkpoint is planned {ahead:.0f} s in the future: the "
                "clock was set back. Set it right, wait that long, or begin with a new checkpoint."
            )
        return self._read(self._intervals[-1])

    def remembered(self) -> int | None:
        """Return how long Spark remembers intervals, in ms; None until the context is known.

        Windows read earlier intervals.
        """
        if self._listener.context is None:
            return None
        return self._listener.context.graph().getMaxInputStreamRememberDuration().milliseconds()

    def known(self, interval: int) -> Plan | None:
        """Return the plan of an interval that was planned or missed before a crash."""
        if self._recovered_at is None:
            return None
        if interval in self._intervals:
            return insist(lambda: self._read(interval), self._stopped)
        # Nothing was planned while no driver was alive: the next interval has these records.
        return Plan([], {}) if interval < self._recovered_at else None

    def keep(self, interval: int, plan: Plan) -> None:
        """Write a plan before it is used, with retries while the file system is away.

        Plans without records are not written, except the first, which records where the stream
        began.
        """
        insist(lambda: self._write(interval, plan), self._stopped)

    def forget(self, committed: Iterable[int]) -> None:
        """Remove the plans that no checkpoint needs any more.

        Parameters
        ----------
        committed : iterable of int
            The intervals that were just committed.
        """
        if self._files is None or self._listener.context is None:
            return
        now, old = time.monotonic(), None
        self._committed.extend((now, interval) for interval in committed)
        while self._committed and self._committed[0][0] <= now - KEPT_SECONDS:
            _, old = self._committed.popleft()
        if old is not None:
            try:
                self._remove(old - self.remembered())
            except PASSING_ERRORS as error:
                _LOGGER.warning("old plans can't be removed: %s", summary(error))

    def _folder(self) -> str | None:
        """Return the folder of the plans; None without a checkpoint."""
        checkpoint = self._listener.checkpoint()
        beside = f"{checkpoint}/kafka-plans/{self._definition.stream_id}" if checkpoint else None
        return self._definition.plans or beside

    def _open(self, folder: str) -> None:
        files = JsonFolder(get_spark(), folder)
        self._intervals, self._files = sorted(int(name) for name in files.names()), files

    def _read(self, interval: int) -> Plan:
        content = self._files.read(str(interval))
        ranges = [OffsetRange(*part) for part in content["ranges"]]
        positions = {
            TopicAndPartition(topic, partition): offset
            for topic, partition, offset in content["positions"]
        }
        return Plan(ranges, positions, content["topic_ids"])

    def _write(self, interval: int, plan: Plan) -> None:
        """Write a plan, unless the same one has already been written, as on a retry."""
        if self._files is None and (folder := self._folder()) is not None:
            if any(map(is_secret, self._definition.settings)):  # they are in Spark's checkpoint
                protect_folder(get_spark(), self._listener.checkpoint())
            self._open(folder)
        if self._files is None or (self._intervals and not plan.ranges):
            return
        content = {
            "ranges": [astuple(part) for part in plan.ranges],
            "positions": [[*astuple(part), offset] for part, offset in plan.positions.items()],
            "topic_ids": plan.topic_ids,
        }
        try:
            self._files.write(str(interval), content)
        except FileExistsError:
            # The file system may have written the file, although it reported an error.
            if self._read(interval) != plan:
                raise
        bisect.insort(self._intervals, interval)

    def _remove(self, before: int) -> None:
        """Remove the plans of intervals before a time, but not the last plan."""
        old = bisect.bisect_left(self._intervals, before, hi=max(0, len(self._intervals) - 1))
        for interval in self._intervals[:old]:
            self._files.delete(str(interval))
        del self._intervals[:old]
