"""Where a stream's records come from: each interval planned, read, and committed."""

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
    BrokerAwayError,
    StreamError,
    insist,
)
from helpers.streaming.ledger import Ledger
from helpers.streaming.offsets import OffsetRange, TopicAndPartition
from helpers.streaming.planner import OffsetPlanner
from helpers.streaming.rates import RateLimit
from helpers.streaming.reader import RangeReader
from helpers.streaming.recovery import Plan, Recovery, StreamDefinition

_LOGGER = logging.getLogger(__name__)

# How often an idle stream commits its offsets again: Kafka forgets those that are not committed
# for a while (offsets.retention.minutes), whether or not anybody reads.
RECOMMIT_SECONDS = 15

# How many batches may wait for one another. A stream whose batches take longer than an interval
# would otherwise plan one an interval for ever, each as small as the last, and never catch up.
MOST_WAITING = 3


class Source:
    """What a stream asks Kafka: the next offsets, the records of a batch, and to commit.

    Parameters
    ----------
    definition : StreamDefinition
        What the stream is made from.
    ledger : Ledger
        Gets the plans, and says what may be committed.
    recovery : Recovery
        Keeps the plans for the time after a crash.
    stopped : threading.Event
        Set when the stream stops.

    Attributes
    ----------
    planner : OffsetPlanner
        Decides which offsets are next.
    limit : RateLimit
        Bounds them.
    away_since : float or None
        When the broker answered last, by `time.monotonic`, if it gave the last plan no answer.

    Raises
    ------
    StreamError
        If a topic doesn't exist, or Kafka can't be reached, or refuses.
    """

    def __init__(
        self,
        definition: StreamDefinition,
        ledger: Ledger,
        recovery: Recovery,
        stopped: threading.Event,
    ) -> None:
        self._ledger, self._recovery, self._stopped = ledger, recovery, stopped
        self.away_since: float | None = None
        self._committed_at = time.monotonic()
        spark, last = get_spark(), recovery.last()
        positions, topic_ids = (
            (last.positions, last.topic_ids) if last else (definition.positions, None)
        )
        self.limit = RateLimit(spark.sparkContext, definition.interval)
        self._reader = RangeReader(spark, definition.settings)
        self.planner = OffsetPlanner(
            spark, definition.topics, definition.settings, definition.from_offsets, positions,
            topic_ids,
        )  # fmt: skip
        try:
            # What the group has, so that a batch that is done once more takes no commit back.
            committed = self.planner.committed() if positions is not None else {}
        except BaseException:
            self.planner.close()
            raise
        ledger.begin({**self.planner.starts(), **committed}, self.planner.unread())

    def plan(self, interval: int) -> None:
        """Plan an interval, or find what was planned for it before a crash.

        Raises
        ------
        StreamError
            If Kafka refuses, or the broker has been away for 60 s.
        """
        plan = self._recovery.known(interval) or self._new_plan(interval)
        # The plan first: a lag that is too small for a moment could end the stream.
        self._ledger.plan(interval, plan.ranges, time.time_ns() // 1_000_000)
        self._ledger.begin(self.planner.starts(), self.planner.unread())

    def read(self, ranges: list[OffsetRange]) -> DataFrame:
        """Return the records of planned ranges, without those that retention has deleted."""
        left = ranges
        # The tasks that read wait for a broker that is away.
        with contextlib.suppress(BrokerAwayError):
            left = self.planner.without_deleted(ranges)
        if not left:  # a range without records is a DataFrame without rows
            left = [replace(ranges[0], fromOffset=ranges[0].untilOffset)]
        return self._reader.read(left)

    def commit(self) -> None:
        """Commit what may be committed; wait for a broker that is away, 60 s at most."""
        self._recovery.forget(
            self._ledger.commit(lambda offsets: insist(lambda: self._send(offsets), self._stopped))
        )

    def commit_when_idle(self) -> None:
        """Commit again what was committed long ago, so that Kafka keeps it."""
        if time.monotonic() - self._committed_at >= RECOMMIT_SECONDS:
            # The next plan notices a broker that is away.
            with contextlib.suppress(BrokerAwayError):
                self._recovery.forget(self._ledger.commit(self._send, again=True))

    def _send(self, offsets: Mapping[TopicAndPartition, int]) -> None:
        self.planner.commit(offsets)
        self._committed_at = time.monotonic()

    def _new_plan(self, interval: int) -> Plan:
        """Plan an interval with the records that arrived since the last one."""
        # A stream that is behind gets one larger batch later, which is done sooner than many.
        is_behind = self._ledger.waiting() >= MOST_WAITING
        try:
            ranges = self.planner.next_batch(_nothing if is_behind else self.limit.most)
            self.away_since = None
        except BrokerAwayError as error:
            self._wait_for_the_broker(error)
            ranges = []  # but where the stream begins is kept even now
        plan = Plan(ranges, self.planner.positions(), self.planner.topic_ids())
        self._recovery.keep(interval, plan)
        return plan

    def _wait_for_the_broker(self, error: BrokerAwayError) -> None:
        """Let an interval pass without records, until the broker has been away for too long."""
        if self.away_since is None:
            self.away_since = time.monotonic() - ANSWER_SECONDS
            _LOGGER.warning("%s The stream waits for %s s.", error, AWAY_SECONDS)
        if time.monotonic() - self.away_since >= AWAY_SECONDS:
            raise StreamError(f"the broker has been away for {AWAY_SECONDS} s. {error}") from None


def _nothing(left: Mapping[TopicAndPartition, int]) -> dict[TopicAndPartition, int]:
    """Leave all offsets to a later batch."""
    return dict.fromkeys(left, 0)
