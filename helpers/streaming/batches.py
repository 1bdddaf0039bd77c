"""The batches of a stream: planned each interval, handed on, committed in order when they are done.

Plans survive the driver where the context has a checkpoint: a plan is written down before its use,
and Spark keeps in its checkpoint what makes a `Batches` again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from py4j.java_gateway import JavaObject
from pyspark import RDD, SparkContext
from pyspark.streaming import StreamingContext

from helpers.spark import summary
from helpers.streaming.errors import StreamError, insist, remedy, without_secrets
from helpers.streaming.ledger import Ledger
from helpers.streaming.listener import ContextListener
from helpers.streaming.offsets import PlannedBatch
from helpers.streaming.reader import few_tasks
from helpers.streaming.recovery import Recovery, StreamDefinition
from helpers.streaming.source import Source

_LOGGER = logging.getLogger(__name__)

# How long a stop waits for the running batch's function, once its jobs are cancelled.
ABANDON_SECONDS = 10

# The streams of this process that aren't closed.
_LIVE: list[Batches] = []


class Batches:
    """Plans the batches of a stream, hands on their records, and commits them.

    1. `plan` enters an interval's offsets in the ledger.
    2. `run` and `elements` hand a batch's records on.
    3. `completed` commits a batch that has succeeded, or stops the stream.

    Parameters
    ----------
    definition : StreamDefinition
        What the stream is made from.

    Attributes
    ----------
    ledger : Ledger
        What is planned, done and committed.
    listener : ContextListener
        Knows the streaming context.
    source : Source or None
        What the stream asks Kafka; None until Kafka has answered in this process.
    group : str or None
        The consumer group that offsets are committed to.
    error : str or None
        Why the stream has stopped by itself; None while it has not.
    """

    def __init__(self, definition: StreamDefinition) -> None:
        self.listener = ContextListener(self)
        self.error: str | None = None
        self._planning = threading.Lock()
        self._finishing = False  # nothing more is to be planned
        self._stopped = threading.Event()  # nothing more is to begin, or to be committed
        self._abandoned = False  # and that is so because somebody asked for it
        self._running = 0  # functions of `foreachBatch`
        self._has_planned = False
        self._job_group = f"kafka-stream-{definition.stream_id}"
        self._define(definition)

    def _define(self, definition: StreamDefinition) -> None:
        """Become the stream of a definition; nothing is planned yet."""
        self.definition = definition
        settings = definition.settings
        self.group = settings.get("group.id") or None
        self.ledger = Ledger(bool(self.group) and settings.get("enable.auto.commit") == "false")
        self.source: Source | None = None
        self._recovery = Recovery(definition, self.listener, self._stopped)

    def __reduce__(self) -> tuple:
        """Return what Spark's checkpoint keeps: all that is needed to resume the stream."""
        return _recovered, (self._recovery.definition(),)

    def connect(self, ssc: StreamingContext) -> None:
        """Talk to Kafka for the first time, as a part of a context that hasn't started yet.

        Raises
        ------
        StreamError
            If a topic doesn't exist, or Kafka can't be reached, or refuses.
        """
        _close_ended()
        self._open()
        self.listener.join(ssc._jssc.ssc())
        if self.definition.shares:
            for batches in batches_of(ssc):
                if batches.definition.shares and batches.group == self.group:
                    batches._leave_topics_to(self)
        _LIVE.append(self)

    @property
    def is_waiting(self) -> bool:
        """Whether the broker is away, and the stream waits for it, for 60 s at most."""
        is_away = self.source is not None and self.source.away_since is not None
        return is_away and not self._stopped.is_set()

    def plan(self, batch_time: datetime, ticks: RDD) -> RDD:
        """Plan the batch of an interval; Spark calls this through the DStream of ticks."""
        with self._planning:
            if not self._stopped.is_set() and not self._finishing:
                try:
                    insist(self._open, self._stopped)
                    self._refuse_company()
                    self.source.plan(batch_id_of(batch_time))
                    self.source.commit_when_idle()
                except Exception as error:
                    # Without its plan an interval's records would be left out of all batches.
                    self._fail(f"the next batch can't be planned: {summary(error)}")
                    raise
        return ticks

    def elements(self, batch_time: datetime, to_element: Callable[[Any], Any]) -> RDD:
        """Return an interval's records as Python objects."""
        ranges = self.ledger.ranges(batch_id_of(batch_time))
        if not ranges:
            return SparkContext._active_spark_context.emptyRDD()
        try:
            return self.source.read(ranges).rdd.map(to_element)
        except Exception as error:
            self._fail(f"batch {batch_id_of(batch_time)} can't be read: {summary(error)}")
            raise

    def run(self, function: Callable[[PlannedBatch], None], batch_time: datetime) -> None:
        """Call a function with a batch; if it fails, once more; then let no later batch begin."""
        batch_id = batch_id_of(batch_time)
        ranges = self.ledger.ranges(batch_id)
        if not ranges or self._stopped.is_set():
            return
        SparkContext._active_spark_context.setJobGroup(self._job_group, f"batch {batch_id}")
        self._running += 1
        try:
            for is_last_try in (False, True):
                try:
                    records = few_tasks(self.source.read(ranges), ranges)
                    function(PlannedBatch(batch_id, ranges, records))
                    return
                except Exception:
                    if is_last_try:
                        self._stopped.set()
                    if self._stopped.is_set():
                        raise
                    _LOGGER.warning("batch %s failed and is tried again", batch_id, exc_info=True)
        finally:
            self._running -= 1

    def completed(self, batch_id: int, failure: str | None, *times: int) -> None:
        """Commit what can be committed now that a batch has ended.

        Parameters
        ----------
        batch_id : int
            The batch's time in milliseconds since 1970.
        failure : str or None
            Why one of its outputs failed.
        *times : int
            When it ended, how long it took and how long it waited, as `RateLimit.completed` takes
            them, if these are known.
        """
        if self._abandoned or (self._stopped.is_set() and failure is None):
            return
        if failure is not None:
            self._fail(f"batch {batch_id} failed: {failure}{remedy(failure)}")
            return
        records = self.ledger.complete(batch_id)
        try:
            self.source.commit()
        except Exception as error:
            self._fail(f"batch {batch_id} can't be committed: {summary(error)}")
        if times:
            self.source.limit.completed(records, *times)

    def finish(self, seconds: float) -> bool:
        """Plan no more, wait until the planned batches are committed, and return if they are."""
        with self._planning:
            self._finishing = True
        deadline = time.monotonic() + seconds
        while not self.ledger.is_settled() and time.monotonic() < deadline:
            if self._stopped.wait(0.05):
                break
        return self.ledger.is_settled()

    def abandon(self) -> None:
        """Begin no further batch, commit nothing more, and end the jobs of the batch that runs."""
        self._abandoned = True
        self._stopped.set()
        # Again and again, because the batch's function may be about to start its next job.
        deadline = time.monotonic() + ABANDON_SECONDS
        while self._running and time.monotonic() < deadline:
            SparkContext._active_spark_context.cancelJobGroup(self._job_group)
            time.sleep(0.05)

    def close(self) -> None:
        """Close the connections to Kafka."""
        self._stopped.set()
        if self in _LIVE:
            _LIVE.remove(self)
        if self.source is not None:
            self.source.planner.close()

    def _leave_topics_to(self, other: Batches) -> None:
        """Read no topic that a later stream of the group reads, and begin again without them."""
        ids = other.source.planner.topic_ids()
        known = self.source.planner.topic_ids()
        topics = [name for name in self.definition.topics if ids.get(name) != known[name]]
        self.source.planner.close()
        self._define(replace(self.definition, topics=topics))
        self._open()

    def _refuse_company(self) -> None:
        """Raise `StreamError` if another running stream commits offsets of the same partitions."""
        if self._has_planned or self.group is None:
            return
        self._has_planned = True
        others = [
            each for each in _LIVE
            if each is not self and each.group == self.group and each._has_planned
            and not each._stopped.is_set()
        ]  # fmt: skip
        if any(self._partitions() & each._partitions() for each in others):
            raise StreamError(
                "another stream of this context reads the same partitions for group "
                f"{self.group!r}, and each would commit what the other has not done: give one "
                "stream both outputs, or one of them another group.id."
            )

    def _partitions(self) -> set[tuple[str, int]]:
        """Return what the stream reads: ids of topics, which no two clusters share, and numbers."""
        ids = self.source.planner.topic_ids()
        return {(ids[part.topic], part.partition) for part in self.source.planner.positions()}

    def _open(self) -> None:
        """Connect to Kafka, unless that is done in this process."""
        if self.source is None:
            self.source = Source(self.definition, self.ledger, self._recovery, self._stopped)
            if self.definition.plans is not None:
                self.listener.join_when_active()

    def _fail(self, reason: str) -> None:
        """Stop the context for a reason that `awaitTermination` and `run_stream` then raise."""
        if self.error is None:
            self.error = without_secrets(reason, self.definition.settings)
            self._stopped.set()
            _LOGGER.error("the stream stops: %s", self.error)
            # What runs is abandoned, because its tasks may wait for a broker.
            self.listener.stop(self.error, self.abandon)


def batches_of(ssc: StreamingContext) -> list[Batches]:
    """Return the batches of a context's Kafka streams that aren't closed."""
    context: JavaObject = ssc._jssc.ssc()
    return [batches for batches in _LIVE if batches.listener.is_of(context)]


def batch_id_of(batch_time: datetime) -> int:
    """Return a batch's time in milliseconds; a local time would come twice when clocks go back."""
    return round(batch_time.timestamp() * 1000)


def _close_ended() -> None:
    """Close the streams whose context somebody has stopped."""
    for batches in list(_LIVE):
        if batches.listener.is_over():
            batches.close()


def _recovered(definition: StreamDefinition) -> Batches:
    """Return the batches of a stream that Spark recovers from its checkpoint.

    The checkpoint has them in each of the stream's functions; here they are one again.
    """
    _close_ended()
    for batches in list(_LIVE):
        if batches.definition.stream_id == definition.stream_id:
            if not batches._stopped.is_set():
                return batches
            batches.close()
    batches = Batches(definition)
    _LIVE.append(batches)
    return batches
