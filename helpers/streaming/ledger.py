"""Tracks what a stream has planned, what is done, and what may be committed.

Nothing here depends on Spark, Kafka or the clock, so tests can try any order of events.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from helpers.streaming.errors import StreamError
from helpers.streaming.offsets import OffsetRange, TopicAndPartition, ends_of

Offsets = Mapping[TopicAndPartition, int]


@dataclass
class _Planned:
    """A plan whose offsets aren't committed yet."""

    interval: int
    ranges: list[OffsetRange]
    planned_at: int
    batch_id: int | None = None  # of the batch that uses it, once Spark reports the batch
    is_done: bool = False


class Ledger:
    """Keeps the plans of a stream until their offsets are committed, in order.

    1. `plan` records the offsets of an interval.
    2. `submit` assigns plans to a batch; a window's batch uses the plans of several intervals.
    3. `complete` marks the plans of a batch that has succeeded as done.
    4. `commit` commits the plans before the first one that is not done.
    5. `forget` removes the ranges of old committed plans, which no window needs any more.

    A batch that fails is never completed, so nothing after it is committed. The id of an interval
    or batch is its time; all times are in milliseconds since 1970. Several threads may use a
    ledger.

    Parameters
    ----------
    by_hand : bool
        Whether to commit only offsets that were passed to `ask`.

    Examples
    --------
    >>> ledger = Ledger()
    >>> start = {TopicAndPartition("events", 0): 0}
    >>> ledger.begin(start, start, unread=10)
    >>> ledger.plan(1_000, [OffsetRange("events", 0, 0, 10)], planned_at=1_005)
    >>> ledger.submit(1_000, submitted_at=1_010)
    >>> ledger.complete(1_000)
    10
    >>> ledger.commit(print)
    {TopicAndPartition(topic='events', partition=0): 10}
    [1000]
    """

    def __init__(self, by_hand: bool = False) -> None:
        self.by_hand = by_hand
        self._planned: list[_Planned] = []
        self._kept: dict[int, list[OffsetRange]] = {}  # of committed intervals, in their order
        self._committed: dict[TopicAndPartition, int] = {}
        self._asked: dict[TopicAndPartition, set[int]] = {}
        self._positions: Offsets = {}
        self._unread = 0
        self._lock = threading.RLock()  # guards the attributes above
        self._committing = threading.Lock()  # held during a commit

    def begin(self, offsets: Offsets, positions: Offsets, unread: int) -> None:
        """Record where partitions begin or are committed, and what is not planned yet.

        Parameters
        ----------
        offsets : mapping of TopicAndPartition to int
            Where partitions begin, or what the group has committed.
        positions : mapping of TopicAndPartition to int
            Where the next plan begins in each partition.
        unread : int
            How many offsets there are from `positions` on.
        """
        with self._lock:
            self._committed = _advanced(self._committed, offsets)
            self._positions, self._unread = positions, unread

    def plan(self, interval: int, ranges: list[OffsetRange], planned_at: int) -> None:
        """Record the plan of the next interval, unless it is empty."""
        if ranges:
            with self._lock:
                self._planned.append(_Planned(interval, ranges, planned_at))

    def submit(self, batch_id: int, submitted_at: int) -> None:
        """Assign to a batch all plans made before it that no other batch uses."""
        with self._lock:
            for planned in self._planned:
                is_free = planned.batch_id is None and planned.planned_at <= submitted_at
                if is_free and planned.interval <= batch_id:
                    planned.batch_id = batch_id

    def complete(self, batch_id: int) -> int:
        """Mark a batch's plans as done, and return how many offsets it had."""
        with self._lock:
            used = [planned for planned in self._planned if planned.batch_id == batch_id]
            for planned in used:
                planned.is_done = True
        return _count(used)

    def waiting(self) -> list[int]:
        """Return the ids of the batches that are submitted and not done, in order."""
        with self._lock:
            found = {planned.batch_id for planned in self._planned if not planned.is_done}
        return sorted(found - {None})

    def ask(self, ranges: Iterable[OffsetRange]) -> None:
        """Request the commit of ranges once their batches have succeeded.

        Raises
        ------
        StreamError
            If offsets are not committed by hand.
        """
        if not self.by_hand:
            raise StreamError(
                "commitAsync is for streams with a group.id whose enable.auto.commit is false; "
                "otherwise each batch is committed automatically when it has succeeded."
            )
        with self._lock:
            for partition, end in ends_of(list(ranges)).items():
                self._asked.setdefault(partition, set()).add(end)

    def commit(self, send: Callable[[Offsets], None], again: bool = False) -> list[int]:
        """Commit what may be committed, unless nothing has changed since the last commit.

        Parameters
        ----------
        send : callable
            Sends offsets to Kafka. If it raises, they are not committed. Calls do not overlap, so
            no commit overtakes another.
        again : bool
            Whether to send offsets even if they have not changed, unless they are committed by
            hand or another commit is in progress.

        Returns
        -------
        list of int
            The intervals whose plans are committed now.
        """
        if not self._committing.acquire(blocking=not again):
            return []
        try:
            with self._lock:
                done = list(itertools.takewhile(lambda planned: planned.is_done, self._planned))
                offsets = self._due(done)
                has_changed = any(self._committed.get(part) != offsets[part] for part in offsets)
            if has_changed or (again and not self.by_hand):
                send(offsets)
            with self._lock:
                self._committed = _advanced(self._committed, offsets)
                self._kept.update((planned.interval, planned.ranges) for planned in done)
                del self._planned[: len(done)]
            return [planned.interval for planned in done]
        finally:
            self._committing.release()

    def forget(self, before: int) -> None:
        """Forget the ranges of committed intervals before a time."""
        with self._lock:
            for interval in list(itertools.takewhile(lambda each: each < before, self._kept)):
                del self._kept[interval]

    def unfinished(self, interval: int) -> list[OffsetRange]:
        """Return an interval's offset ranges; an empty list if it is empty or committed."""
        with self._lock:
            return next((p.ranges for p in self._planned if p.interval == interval), [])

    def ranges(self, interval: int) -> list[OffsetRange]:
        """Return an interval's offset ranges, also if it is committed, as long as they are kept."""
        with self._lock:
            return self.unfinished(interval) or self._kept.get(interval, [])

    def lag(self) -> int:
        """Return how many offsets are not committed yet, planned or not."""
        with self._lock:
            return self._unread + _count(self._planned)

    def lag_after(self, interval: int) -> int:
        """Return the `lag` that remains when an interval and all before it are committed."""
        with self._lock:
            return self._unread + _count(p for p in self._planned if p.interval > interval)

    def has_done(self, ends: Offsets) -> bool:
        """Return whether all plans with offsets before these are committed, and none is to come."""
        with self._lock:
            pending = [part for planned in self._planned for part in planned.ranges]
            begins = {part.topicAndPartition(): part.fromOffset for part in reversed(pending)}
            reached = {**self._positions, **begins}
        # Another stream of the group may have taken over a topic.
        return all(reached.get(partition, end) >= end for partition, end in ends.items())

    def is_settled(self) -> bool:
        """Return whether all plans are committed."""
        return not self._planned

    def _due(self, done: list[_Planned]) -> dict[TopicAndPartition, int]:
        """Return the offsets to commit when the first plans are done."""
        if self.by_hand:
            return self._asked_before(self._planned[len(done) :])
        offsets = self._committed  # of all partitions, because Kafka expires old offsets
        for planned in done:
            offsets = _advanced(offsets, ends_of(planned.ranges))
        return offsets

    def _asked_before(self, pending: list[_Planned]) -> dict[TopicAndPartition, int]:
        """Return the largest requested offset of each partition before any pending plan."""
        limits: dict[TopicAndPartition, int] = {}
        for part in (part for planned in pending for part in planned.ranges):
            limits.setdefault(part.topicAndPartition(), part.fromOffset)
        reached = {}
        for partition, ends in self._asked.items():
            least = self._committed.get(partition, 0)
            possible = [end for end in ends if least <= end <= limits.get(partition, end)]
            if possible:
                reached[partition] = max(possible)
                self._asked[partition] = {end for end in ends if end >= max(possible)}
        return reached


def _advanced(offsets: Offsets, ends: Offsets) -> dict[TopicAndPartition, int]:
    """Return offsets advanced to others, never moved back."""
    moved = {partition: max(end, offsets.get(partition, end)) for partition, end in ends.items()}
    return {**offsets, **moved}


def _count(plans: Iterable[_Planned]) -> int:
    return sum(part.count() for planned in plans for part in planned.ranges)
