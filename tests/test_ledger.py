"""The books of a stream, in orders of events that nobody thought of."""

import itertools
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from helpers.streaming import OffsetRange, StreamError, TopicAndPartition
from helpers.streaming.errors import BrokerAwayError
from helpers.streaming.ledger import Ledger

PARTITIONS = [TopicAndPartition("events", number) for number in range(2)]


class Planned:
    """What the test knows of a plan."""

    def __init__(self, interval, ranges, planned_at):
        self.interval, self.ranges, self.planned_at = interval, ranges, planned_at
        self.batch_id, self.is_done, self.is_failed = None, False, False


class Stream(RuleBasedStateMachine):
    """A stream that plans, submits, completes, fails and commits in any order."""

    batches = Bundle("batches")

    @initialize(
        by_hand=st.booleans(), begins=st.tuples(*[st.integers(0, 3)] * 2), ahead=st.integers(0, 5)
    )
    def begin(self, by_hand, begins, ahead):
        """The stream begins somewhere; after a crash some of its next offsets are committed."""
        self.ledger, self.by_hand = Ledger(by_hand), by_hand
        self.positions = dict(zip(PARTITIONS, begins, strict=True))
        self.least = {part: offset + ahead for part, offset in self.positions.items()}
        self.committed = dict(self.least) if ahead or not by_hand else {}
        self.asked = {partition: set() for partition in PARTITIONS}
        self.plans, self.unread, self.clock = [], 0, 0
        self.ledger.begin(self.least, dict(self.positions), unread=0)

    @rule(counts=st.tuples(*[st.integers(0, 3)] * 2), unread=st.integers(0, 5))
    def plan(self, counts, unread):
        """An interval gets offsets, or none."""
        self.clock += 2
        ranges = []
        for partition, count in zip(PARTITIONS, counts, strict=True):
            start = self.positions[partition]
            if count:
                ranges.append(OffsetRange("events", partition.partition, start, start + count))
            self.positions[partition] += count
        if ranges:
            self.plans.append(Planned(self.clock, ranges, self.clock + 1))
        self.ledger.plan(self.clock, ranges, planned_at=self.clock + 1)
        self.ledger.begin({}, dict(self.positions), unread)
        self.unread = unread

    @rule(target=batches, earlier=st.integers(0, 4), late=st.integers(-3, 3))
    def submit(self, earlier, late):
        """A batch uses the plans of all intervals until its own, as far as they existed."""
        batch_id, submitted_at = self.clock - earlier, self.clock + late
        for plan in self.plans:
            is_there = plan.interval <= batch_id and plan.planned_at <= submitted_at
            if plan.batch_id is None and is_there:
                plan.batch_id = batch_id
        self.ledger.submit(batch_id, submitted_at)
        return batch_id

    @rule(batch_id=batches)
    def complete(self, batch_id):
        """A batch succeeds, perhaps at its second try, and perhaps it is reported twice."""
        used = [plan for plan in self.plans if plan.batch_id == batch_id]
        if any(plan.is_failed for plan in used):
            return
        for plan in used:
            plan.is_done = True
        assert self.ledger.complete(batch_id) == count(used)

    @rule(batch_id=consumes(batches))
    def fail(self, batch_id):
        """A batch fails for good: it is never completed."""
        for plan in self.plans:
            plan.is_failed |= plan.batch_id == batch_id and not plan.is_done

    @precondition(lambda self: self.by_hand and self.plans)
    @rule(data=st.data())
    def ask(self, data):
        """A batch's function asks for a commit of what it has, done or not."""
        ranges = data.draw(st.sampled_from(self.plans)).ranges
        for part in ranges:
            self.asked[part.topicAndPartition()].add(part.untilOffset)
        self.ledger.ask(ranges)

    @rule(again=st.booleans())
    def commit(self, again):
        """Kafka takes a commit: all plans before the first one that isn't done are settled."""
        done, due, self.sent = self.settled(), self.due(), None
        assert self.ledger.commit(self.send, again) == [plan.interval for plan in done]
        self.plans = self.plans[len(done) :]
        assert self.committed == due
        if again and not self.by_hand:  # also what was committed before
            assert self.sent == due

    @rule(again=st.booleans())
    def commit_without_a_broker(self, again):
        """A commit that fails changes nothing, so it is made later."""
        with_change = self.due() != self.committed
        try:
            self.ledger.commit(self.refuse, again)
        except BrokerAwayError:
            return
        assert not with_change and (self.by_hand or not again)
        self.plans = self.plans[len(self.settled()) :]

    @rule(data=st.data())
    def commit_twice_at_once(self, data):
        """A commit that begins while another is under way neither overtakes it nor is lost."""
        waiting = sorted({plan.batch_id for plan in self.plans if not plan.is_done} - {None})
        batch_id = data.draw(st.sampled_from(waiting)) if waiting else None
        racing = threading.Thread(target=self.ledger.commit, args=[self.send])

        def send(offsets):
            if batch_id is not None:
                self.complete(batch_id)
            racing.start()
            assert self.ledger.commit(self.refuse, again=True) == []
            racing.join(0.001)  # it waits for this commit
            assert racing.is_alive()
            self.send(offsets)

        self.ledger.commit(send)
        if racing.ident is None:  # nothing had changed, so nothing was sent
            racing.start()
        racing.join()
        assert self.committed == self.due()
        self.plans = self.plans[len(self.settled()) :]

    def send(self, offsets):
        """Take a commit as Kafka does, unless it breaks a promise."""
        undone = [part for plan in self.plans if not plan.is_done for part in plan.ranges]
        for partition, offset in offsets.items():
            assert offset >= self.committed.get(partition, self.least[partition])  # never back
            assert all(
                offset <= max(part.fromOffset, self.least[partition])
                for part in undone if part.topicAndPartition() == partition
            )  # fmt: skip
            assert not self.by_hand or offset in self.asked[partition]
        self.sent = offsets
        self.committed |= offsets

    @staticmethod
    def refuse(offsets):
        """Give no answer to a commit."""
        raise BrokerAwayError("no answer")

    def settled(self):
        """Return the plans before the first one that isn't done."""
        return list(itertools.takewhile(lambda plan: plan.is_done, self.plans))

    def due(self):
        """Return what is committed once Kafka takes a commit."""
        done, due = self.settled(), dict(self.committed)
        pending = [part for plan in self.plans[len(done) :] for part in plan.ranges]
        for partition in PARTITIONS:
            ends = [part.untilOffset for plan in done for part in plan.ranges
                    if part.topicAndPartition() == partition]  # fmt: skip
            if self.by_hand:
                ends = [end for end in self.asked[partition]
                        if all(end <= part.fromOffset for part in pending
                               if part.topicAndPartition() == partition)]  # fmt: skip
            ends = [end for end in ends if end >= self.least[partition]]
            if ends:
                due[partition] = max(ends)
        return due

    @invariant()
    def the_lag_is_what_is_not_committed(self):
        """Planned or not, and batch by batch."""
        assert self.ledger.lag() == self.unread + count(self.plans)
        assert self.ledger.is_settled() == (not self.plans)
        for number, plan in enumerate(self.plans):
            assert self.ledger.ranges(plan.interval) == plan.ranges
            later = self.plans[number + 1 :]
            assert self.ledger.lag_after(plan.interval) == self.unread + count(later)

    @invariant()
    def offsets_are_done_when_no_plan_before_them_is_left(self):
        """Whatever is planned behind them, and in each partition by itself."""
        left = [part for plan in self.plans for part in plan.ranges]
        for partition, end in itertools.product(PARTITIONS, range(0, 30, 3)):
            begins = [part.fromOffset for part in left if part.topicAndPartition() == partition]
            is_done = min([*begins, self.positions[partition]]) >= end
            assert self.ledger.has_done({partition: end}) == is_done

    @invariant()
    def batches_wait_until_they_are_done(self):
        """A batch of a window, with several plans, is one."""
        waiting = {plan.batch_id for plan in self.plans if not plan.is_done} - {None}
        assert self.ledger.waiting() == sorted(waiting)


def count(plans):
    """Return how many offsets plans have."""
    return sum(part.count() for plan in plans for part in plan.ranges)


TestAnyOrderOfEvents = Stream.TestCase
TestAnyOrderOfEvents.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, database=None
)


def test_a_window_is_committed_when_its_batch_is_done():
    """The batch of a window uses the plans of all its intervals."""
    ledger, sent = Ledger(), []
    ledger.begin({PARTITIONS[0]: 0}, {PARTITIONS[0]: 0}, unread=0)
    for interval, start in enumerate([0, 10, 20], 1):
        ledger.plan(interval, [OffsetRange("events", 0, start, start + 10)], interval)
    ledger.submit(3, submitted_at=4)
    assert ledger.commit(sent.append) == [] and sent == []
    assert ledger.complete(3) == 30
    assert ledger.commit(sent.append) == [1, 2, 3]
    assert sent == [{PARTITIONS[0]: 30}]


def test_a_window_reads_intervals_that_are_committed():
    """A committed interval keeps its ranges until no window needs them, and isn't run again."""
    ledger, ranges = Ledger(), [OffsetRange("events", 0, 0, 10)]
    for interval in (1, 2):
        ledger.plan(interval, ranges, interval)
        ledger.submit(interval, submitted_at=interval)
        ledger.complete(interval)
        ledger.commit(print)
    assert ledger.ranges(1) == ledger.ranges(2) == ranges
    assert ledger.unfinished(1) == []
    ledger.forget(before=2)
    assert ledger.ranges(1) == [] and ledger.ranges(2) == ranges


def test_only_a_stream_that_commits_by_hand_is_asked_to():
    """A stream that commits by itself refuses to be told when."""
    with pytest.raises(StreamError, match=r"commitAsync is for streams with a group\.id"):
        Ledger().ask([OffsetRange("events", 0, 0, 10)])
