"""Plans, reads and commits the intervals of a stream."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace

from pyspark.sql import DataFrame

from helpers.kafka_settings import ANSWER_SECONDS
from helpers.spark import get_spark
from helpers.streaming.errors import (
    AWAY_SECONDS,
    RETRY_SECONDS,
    BrokerAwayError,
    StreamError,
    insist,
)
from helpers.streaming.ledger import Ledger
from helpers.streaming.offsets import OffsetRange, TopicAndPartition
from helpers.streaming.planner import Limit, OffsetPlanner
from helpers.streaming.rates import RateLimit
from helpers.streaming.reader import RangeReader
from helpers.streaming.recovery import Plan, Recovery, StreamDefinition

_LOGGER = logging.getLogger(__name__)

# How often an idle stream commits its offsets again: Kafka expires old ones
# (offsets.retention.minutes), even if the stream is still running.
RECOMMIT_SECONDS = 15

# How often offsets that are committed by hand are repeated: Kafka expires each of them by its age.
REPEAT_SECONDS = 3_600

# How many batches may be queued. Otherwise, a stream whose batches take longer than an interval
# would plan one small batch per interval forever, and never catch up.
MOST_WAITING = 3

# Two short outages in intervals longer than this, in seconds, would look like one of 60 s. The
# broker is therefore asked again in the same interval.
_LONG_INTERVAL = 30


class Source:
    """Plans a stream's next offsets, reads the records of a batch, and commits.

    Parameters
    ----------
    definition : StreamDefinition
        What defines the stream.
    ledger : Ledger
        Receives the plans, and decides what may be committed.
    recovery : Recovery
        Keeps the plans for the time after a crash.
    stopped : threading.Event
        Set when the stream stops.
    finishing : threading.Event
        Set when no more batches are wanted.

    Attributes
    ----------
    planner : OffsetPlanner
        Decides which offsets are next.
    limit : RateLimit
        Limits how many offsets a batch has.
    away_since : float or None
        When the broker last answered, by `time.monotonic`; None unless it is away.

    Raises
    ------
    StreamError
        If a topic doesn't exist, or Kafka can't be reached or refuses access.
    """

    def __init__(
        self,
        definition: StreamDefinition,
        ledger: Ledger,
        recovery: Recovery,
        stopped: threading.Event,
        finishing: threading.Event,
    ) -> None:
        self._ledger, self._recovery = ledger, recovery
        self._stopped, self._finishing = stopped, finishing
        self.away_since: float | None = None
        self._sending = threading.RLock()  # so that no older offset follows a newer one
        self._forgetting = threading.Lock()
        self._committed_at = self._repeated_at = time.monotonic()
        spark, last = get_spark(), recovery.last()
        positions = last.positions if last else definition.positions
        self._interval = definition.interval
        self.limit = RateLimit(spark.sparkContext, definition.interval)
        self._skips_deleted = definition.settings["auto.offset.reset"] != "none"
        self._reader = RangeReader(spark, definition.settings, self._skips_deleted)
        self._being_read: dict[int, list[OffsetRange]] = {}
        self.planner = OffsetPlanner(
            spark, definition.topics, definition.settings, definition.from_offsets, positions,
            last.topic_ids if last else None,
        )  # fmt: skip
        try:
            self._in_group = self.planner.committed()
        except BaseException:
            self.planner.close()
            raise
        # With the group's offsets, so that a batch that is repeated does not move a commit back.
        repeated = {} if positions is None else self._in_group
        starts = {**self.planner.starts(), **repeated}
        ledger.begin(starts, self.planner.positions(), self.planner.unread())

    def plan(self, interval: int) -> None:
        """Plan an interval, or reuse the plan made for it before a crash.

        Raises
        ------
        StreamError
            If Kafka refuses access, or the broker has been away for 60 s.
        """
        plan = self._recovery.known(interval) or self._new_plan(interval)
        # First the plan: if the lag were too small for a moment, the stream could end.
        self._ledger.plan(interval, plan.ranges, time.time_ns() // 1_000_000)
        planner = self.planner
        self._ledger.begin(planner.starts(), planner.positions(), planner.unread())

    def read(self, batch_id: int, ranges: list[OffsetRange]) -> DataFrame:
        """Return the records of planned ranges, without those that retention has deleted."""
        left = ranges
        # If the broker is away, the tasks that read wait for it.
        with contextlib.suppress(BrokerAwayError):
            left = self.planner.without_deleted(ranges)
        self._being_read[batch_id] = left
        if not left:  # an empty range is read as an empty DataFrame
            left = [replace(ranges[0], fromOffset=ranges[0].untilOffset)]
        return self._reader.read(left)

    def report_deleted(self, until: int) -> None:
        """Warn about offsets that retention deleted while they were read, up to an interval.

        A window's batch reads several intervals, most of which have no batch.
        """
        for interval in sorted(each for each in list(self._being_read) if each <= until):
            left = self._being_read.pop(interval, [])
            if not left or not self._skips_deleted:
                continue
            try:
                self.planner.report_deleted_meanwhile(left)
            except BrokerAwayError:  # the next batch asks again: each question may take seconds
                self._being_read[interval] = left
                return
            except StreamError:  # an error from Kafka must not fail the batch
                pass

    def commit(self) -> None:
        """Commit what may be committed; wait at most 60 s for a broker that is away."""
        self._forget(
            self._ledger.commit(lambda offsets: insist(lambda: self._send(offsets), self._stopped))
        )

    def commit_when_idle(self) -> None:
        """Commit old offsets again, so that Kafka keeps them."""
        now = time.monotonic()
        is_due = self._ledger.by_hand and now - self._repeated_at >= REPEAT_SECONDS
        if is_due or now - self._committed_at >= RECOMMIT_SECONDS:
            # If the broker is away, the next plan reports it.
            with contextlib.suppress(BrokerAwayError):
                self._forget(self._ledger.commit(self._send, again=True))
                if self._ledger.by_hand:
                    self._restore(repeats=is_due)

    def _forget(self, committed: list[int]) -> None:
        """Forget old plans, except those of intervals that a window may still read."""
        with self._forgetting:  # Spark plans in one thread, and finishes batches in another
            self._recovery.forget(committed)
            if committed and (remembered := self._recovery.remembered()) is not None:
                self._ledger.forget(before=committed[-1] - remembered)

    def _send(self, offsets: Mapping[TopicAndPartition, int], repeats: bool = False) -> None:
        with self._sending:
            if self._ledger.by_hand and offsets:
                # Partitions that the group has no offset of get their starts. Otherwise, a later
                # stream would take one without records for one that was added meanwhile.
                starts = self.planner.starts().items()
                missing = {part: start for part, start in starts if part not in self._in_group}
                offsets = {**missing, **offsets}
            commit = self.planner.repeat if repeats else self.planner.commit
            commit(offsets)
            self._in_group = {**self._in_group, **offsets}
            self._committed_at = time.monotonic()

    def _restore(self, repeats: bool) -> None:
        """Commit again what Kafka has forgotten, or repeat all, so that all expire together.

        Others may commit as well: what Kafka has is only repeated, never replaced.
        """
        with self._sending:
            kept = self.planner.committed()
            forgotten = {part: end for part, end in self._in_group.items() if part not in kept}
            self._in_group = {**kept, **forgotten}
            self._send(self._in_group if repeats else forgotten, repeats=True)
            if repeats:
                self._repeated_at = time.monotonic()

    def _new_plan(self, interval: int) -> Plan:
        """Plan an interval with the records that arrived since the last one."""
        # A stream that is behind gets one larger batch later, which is faster than many small ones.
        is_behind = len(self._ledger.waiting()) >= MOST_WAITING
        limit = (lambda left: dict.fromkeys(left, 0)) if is_behind else self.limit.most
        ranges = self._next_ranges(limit)
        # A plan without ranges is also kept: it records where the stream begins.
        plan = Plan(ranges, self.planner.positions(), self.planner.topic_ids())
        self._recovery.keep(interval, plan)
        return plan

    def _next_ranges(self, limit: Limit) -> list[OffsetRange]:
        """Return the next ranges; none while the broker is away, for at most 60 s."""
        while True:
            try:
                ranges = self.planner.next_batch(limit)
                self.away_since = None
                return ranges
            except BrokerAwayError as error:
                if self._finishing.is_set():
                    return []
                self._wait_for_the_broker(error)
            if self._interval <= _LONG_INTERVAL or self._stopped.wait(RETRY_SECONDS):
                return []

    def _wait_for_the_broker(self, error: BrokerAwayError) -> None:
        """Leave an interval empty, or raise if the broker has been away for too long."""
        if self.away_since is None:
            self.away_since = time.monotonic() - ANSWER_SECONDS
            _LOGGER.warning("%s The stream waits for %s s.", error, AWAY_SECONDS)
        if time.monotonic() - self.away_since >= AWAY_SECONDS:
            raise StreamError(f"the broker has been away for {AWAY_SECONDS} s. {error}") from None
