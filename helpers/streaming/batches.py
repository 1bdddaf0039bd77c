"""The batches of a stream: planned each interval, processed, and committed in order.

If the context has a checkpoint, plans survive the driver: each plan is written before it is used,
and Spark's checkpoint keeps what recreates a `Batches`.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from pyspark import RDD, SparkContext
from pyspark.streaming import StreamingContext

from helpers.spark import spark_has_ended, summary
from helpers.streaming.errors import StreamError, insist, remedy, without_secrets
from helpers.streaming.ledger import Ledger
from helpers.streaming.listener import ContextListener
from helpers.streaming.offsets import PlannedBatch
from helpers.streaming.reader import ELEMENT_COLUMNS, few_tasks
from helpers.streaming.recovery import Recovery, StreamDefinition
from helpers.streaming.source import Source

_LOGGER = logging.getLogger(__name__)

# How long a stop waits for the running batch's function, once its jobs are cancelled.
ABANDON_SECONDS = 10

# The open streams of this process.
_LIVE: list[Batches] = []


class Batches:
    """Plans the batches of a stream, passes on their records, and commits them.

    1. `plan` records an interval's offsets in the ledger.
    2. `run` and `elements` pass on a batch's records.
    3. `completed` commits a batch that has succeeded, or stops the stream.

    Parameters
    ----------
    definition : StreamDefinition
        What defines the stream.

    Attributes
    ----------
    ledger : Ledger
        Tracks what is planned, done and committed.
    listener : ContextListener
        Knows the streaming context.
    source : Source or None
        Plans, reads and commits; None until Kafka has answered in this process.
    group : str or None
        The consumer group that offsets are committed to.
    error : str or None
        Why the stream stopped, if it failed; None otherwise.
    """

    def __init__(self, definition: StreamDefinition) -> None:
        self.listener = ContextListener(self)
        self.error: str | None = None
        self._planning = threading.Lock()
        self._finishing = threading.Event()  # no more batches are planned
        self._stopped = threading.Event()  # no more batches begin or are committed
        self._abandoned = False  # stopped on request, not by an error
        self._unsaved: str | None = None  # why Spark's checkpoint is no longer written
        self._running = 0  # calls of batch functions in progress
        self._has_planned = False
        self._job_group = f"kafka-stream-{definition.stream_id}"
        self._define(definition)

    def _define(self, definition: StreamDefinition) -> None:
        """Become the stream of a definition, with nothing planned yet."""
        self.definition = definition
        settings = definition.settings
        self.group = settings.get("group.id") or None
        self.ledger = Ledger(bool(self.group) and settings.get("enable.auto.commit") == "false")
        self.source: Source | None = None
        self._recovery = Recovery(definition, self.listener, self._stopped)

    def __reduce__(self) -> tuple:
        """Return what Spark's checkpoint keeps: everything needed to resume the stream.

        Raises
        ------
        pickle.PicklingError
            If the stream has stopped or failed. Spark makes further intervals until its context has
            stopped, and would note in the checkpoint that the earlier ones are done.
        """
        self._unsaved = self._unsaved or self.error or self.listener.failure()
        if self._unsaved or self._stopped.is_set():
            # PySpark prints and wraps any other error.
            raise pickle.PicklingError(self._unsaved or "the stream was stopped")
        return _recovered, (self._recovery.definition(),)

    def connect(self, ssc: StreamingContext) -> None:
        """Connect to Kafka, and join a streaming context that has not started yet.

        Raises
        ------
        StreamError
            If a topic doesn't exist, or Kafka can't be reached or refuses access.
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
        """Whether the stream waits for a broker that is away, which it does for at most 60 s."""
        is_away = self.source is not None and self.source.away_since is not None
        return is_away and not self._stopped.is_set()

    def plan(self, batch_time: datetime, ticks: RDD) -> RDD:
        """Plan the batch of an interval; Spark calls this through the DStream of ticks."""
        with self._planning:
            if not self._stopped.is_set() and not self._finishing.is_set():
                try:
                    insist(self._open, self._stopped)
                    self._check_conflicts()
                    self.source.plan(batch_id_of(batch_time))
                    self.source.commit_when_idle()
                except Exception as error:
                    # Without a plan, an interval's records would be missing from all batches.
                    self._fail(f"the next batch can't be planned: {summary(error)}")
                    raise
        return ticks

    def elements(self, batch_time: datetime, to_element: Callable[[Any], Any]) -> RDD:
        """Return an interval's records as Python objects."""
        ranges = self.ledger.ranges(batch_id_of(batch_time))
        if not ranges:
            return SparkContext._active_spark_context.emptyRDD()
        try:
            records = self.source.read(batch_id_of(batch_time), ranges)
            return records.select(*ELEMENT_COLUMNS).rdd.map(to_element)
        except Exception as error:
            self._fail(f"batch {batch_id_of(batch_time)} can't be read: {summary(error)}")
            raise

    def run(self, function: Callable[[PlannedBatch], None], batch_time: datetime) -> None:
        """Call a function with a batch; retry it once; if that fails, begin no later batch."""
        batch_id = batch_id_of(batch_time)
        ranges = self.ledger.unfinished(batch_id)
        # A sink would take the records of an interval without a batch for a gap in the topic.
        if not ranges or self._stopped.is_set() or self.listener.failure():
            return
        SparkContext._active_spark_context.setJobGroup(self._job_group, f"batch {batch_id}")
        self._running += 1
        try:
            for is_last_try in (False, True):
                try:
                    records = few_tasks(self.source.read(batch_id, ranges), ranges)
                    function(PlannedBatch(batch_id, ranges, records))
                    return
                except Exception as error:
                    if is_last_try:
                        self._unsaved = f"batch {batch_id} failed: {summary(error)}"
                        self._stopped.set()
                    if self._stopped.is_set() or spark_has_ended():
                        raise
                    _LOGGER.warning("batch %s failed and is retried", batch_id, exc_info=True)
        finally:
            self._running -= 1

    def not_made(self, batch_time: datetime, error: Exception) -> None:
        """Stop the stream because an output's function raised before the batch could be made."""
        reason = summary(f"{type(error).__name__}: {error}")
        self._fail(f"batch {batch_id_of(batch_time)} can't be made: {reason}")

    def context_failed(self, failure: str) -> None:
        """Stop the stream because the context failed; no batch that ends later is committed."""
        self._fail(f"the streaming context failed: {failure}")

    def completed(self, batch_id: int, failure: str | None, *times: int) -> None:
        """Commit a batch that has succeeded, or stop the stream if it failed.

        Parameters
        ----------
        batch_id : int
            The batch's time in milliseconds since 1970.
        failure : str or None
            Why one of its outputs failed.
        *times : int
            If known: when it ended, how long it took and how long it waited, as for
            `RateLimit.completed`.
        """
        if self._abandoned or (self._stopped.is_set() and failure is None):
            return
        if failure is not None:
            self._fail(f"batch {batch_id} failed: {failure}{remedy(failure)}")
            return
        self.source.report_deleted(until=batch_id)
        records = self.ledger.complete(batch_id)
        try:
            self.source.commit()
        except Exception as error:
            self._fail(f"batch {batch_id} can't be committed: {summary(error)}")
        if times:
            self.source.limit.completed(records, *times)

    def finish(self, seconds: float) -> bool:
        """Stop planning, wait for planned batches to be committed, and return whether they are."""
        self._finishing.set()
        with self._planning:  # wait for a plan in progress
            pass
        deadline = time.monotonic() + seconds
        while not self.ledger.is_settled() and time.monotonic() < deadline:
            if self._stopped.wait(0.05):
                break
        return self.ledger.is_settled()

    def abandon(self) -> None:
        """Begin and commit no more batches, and cancel the jobs of the running one."""
        self._abandoned = True
        self._stopped.set()
        # Repeatedly, because the batch's function may be about to start its next job.
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
        """Leave the topics that a later stream of the group reads, and begin again without them."""
        ids = other.source.planner.topic_ids()
        known = self.source.planner.topic_ids()
        topics = [name for name in self.definition.topics if ids.get(name) != known[name]]
        self.source.planner.close()
        self._define(replace(self.definition, topics=topics))
        self._open()

    def _check_conflicts(self) -> None:
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
                f"{self.group!r}, so each would commit offsets that the other has not processed: "
                "give one stream both outputs, or one of them another group.id."
            )

    def _partitions(self) -> set[tuple[str, int]]:
        """Return the partitions that are read, by topic id, which no two clusters share.

        A topic without an id has its name instead.
        """
        ids, parts = self.source.planner.topic_ids(), self.source.planner.positions()
        return {(ids[part.topic] or part.topic, part.partition) for part in parts}

    def _open(self) -> None:
        """Connect to Kafka, unless this process has already done so."""
        if self.source is None:
            self.source = Source(
                self.definition, self.ledger, self._recovery, self._stopped, self._finishing
            )
            if self.definition.plans is not None:
                self.listener.join_when_active()

    def _fail(self, reason: str) -> None:
        """Stop the context with a reason, which `awaitTermination` and `run_stream` raise."""
        if self.error is None:
            self.error = without_secrets(reason, self.definition.settings)
            self._stopped.set()
            _LOGGER.error("the stream stops: %s", self.error)
            # The running batch is abandoned, because its tasks may be waiting for a broker.
            self.listener.stop(self.error, self.abandon)


def batches_of(ssc: StreamingContext) -> list[Batches]:
    """Return the batches of a context's open Kafka streams."""
    context = ssc._jssc.ssc()
    return [batches for batches in _LIVE if batches.listener.is_of(context)]


def batch_id_of(batch_time: datetime) -> int:
    """Return a batch's time in milliseconds since 1970; local time repeats when clocks go back."""
    return round(batch_time.timestamp() * 1000)


def _close_ended() -> None:
    """Close the streams whose context was stopped."""
    for batches in list(_LIVE):
        if batches.listener.is_over():
            batches.close()


def _recovered(definition: StreamDefinition) -> Batches:
    """Return the one `Batches` of a stream; its functions in a checkpoint have a copy each."""
    _close_ended()
    for batches in list(_LIVE):
        if batches.definition.stream_id == definition.stream_id:
            if not batches._stopped.is_set():
                return batches
            batches.close()
    batches = Batches(definition)
    _LIVE.append(batches)
    return batches
