"""The batches of a stream: planned each interval, handed on, committed in order when they are done.

What is decided here survives the driver where the context has a checkpoint: a plan is written down
before it is used, and Spark keeps in its checkpoint what makes a `Batches` anew.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from py4j.java_gateway import JavaObject
from py4j.protocol import Py4JError
from pyspark import RDD, SparkContext
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame
from pyspark.streaming import StreamingContext, StreamingListener

from helpers.kafka_settings import is_secret
from helpers.spark import get_spark, protect_folder
from helpers.streaming.errors import (
    ANSWER_SECONDS,
    BrokerAwayError,
    StreamError,
    remedy,
    summary,
    without_secrets,
)
from helpers.streaming.offsets import OffsetRange, PlannedBatch, TopicAndPartition, ends_of
from helpers.streaming.planner import OffsetPlanner
from helpers.streaming.plans import Plan, PlanLog
from helpers.streaming.rates import RateLimit
from helpers.streaming.reader import RangeReader

_LOGGER = logging.getLogger(__name__)

# How long the broker, or the checkpoint's file system, may be away while a stream runs.
AWAY_SECONDS = 60

# How often an idle stream commits its offsets again: Kafka forgets those that are not committed
# for a while (offsets.retention.minutes), whether or not anybody reads.
RECOMMIT_SECONDS = 15

# How many batches may wait for one another. A stream whose batches take longer than an interval
# would otherwise plan one an interval for ever, each as small as the last, and never catch up.
MOST_WAITING = 3

# How long to wait before the next try of what failed because something is away.
RETRY_SECONDS = 0.5

# How long a stop waits for the running batch's function, once its jobs are cancelled.
ABANDON_SECONDS = 10

# How long Spark may take from asking for the first batch to being active.
ACTIVE_SECONDS = 60

# Spark writes its checkpoint some time after a batch. A driver that dies before that is followed by
# one that asks for the batch again, so plans are kept this long after they are committed: time on
# the clock, for a stream that catches up goes through hours of intervals in a minute.
_KEPT_SECONDS = 600

# The streams of this process that aren't closed.
_LIVE: list[Batches] = []


@dataclass
class _Planned:
    """A plan whose offsets aren't committed yet.

    Its interval may be another one than that of the batch that uses it: a window's batch uses the
    plans of several intervals.
    """

    interval: int
    ranges: list[OffsetRange]
    made_at: int
    batch_id: int | None = None  # which uses it; unknown until Spark tells of the batch
    is_done: bool = False


class _AskedCommits:
    """The offsets that `commitAsync` was asked to commit, until their batches have succeeded."""

    def __init__(self) -> None:
        self._ends: dict[TopicAndPartition, set[int]] = {}

    def add(self, ends: Mapping[TopicAndPartition, int]) -> None:
        """Note where ranges end."""
        for partition, end in ends.items():
            self._ends.setdefault(partition, set()).add(end)

    def before(self, pending: Mapping[TopicAndPartition, int]) -> dict[TopicAndPartition, int]:
        """Return the largest offset of each partition that no pending batch is behind."""
        found = {}
        for partition, ends in self._ends.items():
            done = [end for end in ends if end <= pending.get(partition, end)]
            if done:
                found[partition] = max(done)
                ends -= {end for end in done if end < max(done)}
        return found


class Batches:
    """Plans the batches of a stream, hands on their records, and commits them.

    Parameters
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
        Where to go on, as `OffsetPlanner` takes it.
    stream_id : str, optional
        Names the stream's plans beside the checkpoint.
    folder : str, optional
        Where the plans are: given if Spark has made this stream anew from its checkpoint.
    """

    def __init__(
        self,
        topics: list[str],
        settings: Mapping[str, str],
        interval: float,
        from_offsets: Mapping[TopicAndPartition, int] | None = None,
        positions: Mapping[TopicAndPartition, int] | None = None,
        stream_id: str | None = None,
        folder: str | None = None,
    ) -> None:
        self._topics, self._settings, self._from_offsets = topics, dict(settings), from_offsets
        self._interval, self._positions = interval, positions
        self.stream_id = stream_id or str(uuid.uuid4())
        self._folder = folder
        self._commits = self._settings.get("enable.auto.commit") != "false"
        self._recovered_at = None if folder is None else _now()
        self._context: JavaObject | None = None  # Java's StreamingContext
        self._planner: OffsetPlanner | None = None
        self._plans: PlanLog | None = None
        self._planned: list[_Planned] = []
        self._committed: deque[tuple[float, int]] = deque()  # when, and which interval
        self._done: dict[TopicAndPartition, int] = {}
        self._asked = _AskedCommits()
        self._unread = 0
        self._lock = threading.RLock()  # of the four above
        self._planning = threading.RLock()
        self._committing = threading.RLock()  # so that no commit takes back a later one
        self._committed_at = time.monotonic()
        self._finishing = False  # nothing more is to be planned
        self._stopped = False  # nothing more is to begin, or to be committed
        self._ending = threading.Event()  # wakes up what waits to try again
        self._abandoned = False  # and that is so because somebody asked for it
        self._running = 0  # functions of `foreachBatch`
        self._error: str | None = None
        self._away_since: float | None = None  # when the broker was last there, if it is away
        self._job_group = f"kafka-stream-{self.stream_id}"

    def __reduce__(self) -> tuple:
        """Return what Spark's checkpoint keeps: all that is needed to go on with the stream."""
        folder = self._folder or self._plans_folder()
        kept = (self._topics, self._settings, self._interval, self._from_offsets, self._positions)
        return _made_anew, (*kept, self.stream_id, folder)

    def connect(self, ssc: StreamingContext) -> None:
        """Talk to Kafka for the first time, as a part of a context that hasn't started yet.

        Raises
        ------
        StreamError
            If a topic doesn't exist, or Kafka can't be reached, or refuses.
        """
        for batches in list(_LIVE):
            if batches.is_over():
                batches.close()
        self._open()
        self._join(ssc._jssc.ssc())
        _LIVE.append(self)

    @property
    def error(self) -> str | None:
        """Why the stream has stopped by itself; None while it has not."""
        return self._error

    @property
    def is_waiting(self) -> bool:
        """Whether the broker is away, and the stream waits for it, for 60 s at most."""
        return self._away_since is not None and not self._stopped

    def plan(self, batch_time: datetime, ticks: RDD) -> RDD:
        """Plan the batch of an interval; Spark calls this through the DStream of ticks."""
        with self._planning:
            if not self._stopped and not self._finishing:
                try:
                    self._insist(self._open)
                    self._plan(batch_id_of(batch_time))
                    self._commit_again_when_idle()
                except Exception as error:
                    # Without its plan an interval's records would be left out of all batches.
                    self._fail(f"the next batch can't be planned: {summary(str(error))}")
                    raise
        return ticks

    def topic_ids(self) -> dict[str, str]:
        """Ask Kafka for the ids of the stream's topics, by their names."""
        return self._planner.topic_ids_now()

    def positions(self) -> dict[TopicAndPartition, int]:
        """Return where the next batch to be planned begins in each partition."""
        return self._planner.positions()

    def ranges(self, interval: int) -> list[OffsetRange]:
        """Return the offset ranges of an interval; none if it has no records."""
        with self._lock:
            return next((p.ranges for p in self._planned if p.interval == interval), [])

    def elements(self, batch_time: datetime, to_element: Callable[[Any], Any]) -> RDD:
        """Return an interval's records as Python objects."""
        ranges = self.ranges(batch_id_of(batch_time))
        if not ranges:
            return SparkContext._active_spark_context.emptyRDD()
        try:
            return self._read(ranges).rdd.map(to_element)
        except Exception as error:
            self._fail(f"batch {batch_id_of(batch_time)} can't be read: {error}")
            raise

    def run(self, function: Callable[[PlannedBatch], None], batch_time: datetime) -> None:
        """Call a function with a batch; if it fails, once more; then let no later batch begin."""
        batch_id = batch_id_of(batch_time)
        ranges = self.ranges(batch_id)
        if not ranges or self._stopped:
            return
        SparkContext._active_spark_context.setJobGroup(self._job_group, f"batch {batch_id}")
        self._running += 1
        try:
            try:
                function(PlannedBatch(batch_id, ranges, self._read(ranges)))
            except Exception:
                if self._stopped:
                    raise
                _LOGGER.warning("batch %s failed and is tried again", batch_id, exc_info=True)
                self._last_try(function, ranges, batch_id)
        finally:
            self._running -= 1

    def commit_async(self, ranges: Iterable[OffsetRange]) -> None:
        """Have ranges committed when the batch that is running has succeeded."""
        if self._commits or not self._settings.get("group.id"):
            raise StreamError(
                "commitAsync is for streams with a group.id whose enable.auto.commit is false; "
                "otherwise each batch is committed anyway, when it has succeeded."
            )
        with self._lock:
            self._asked.add(ends_of(list(ranges)))

    def lag(self) -> int:
        """Return how many offsets that the topics had at the last interval are not done yet."""
        with self._lock:
            return self._unread + sum(_count(planned) for planned in self._planned)

    def lag_after(self, batch_id: int) -> int:
        """Return what `lag` will be when a batch and those before it are done."""
        with self._lock:
            later = [planned for planned in self._planned if planned.interval > batch_id]
            return self._unread + sum(map(_count, later))

    def finish(self, seconds: float) -> bool:
        """Plan no more, wait until the planned batches are committed, and return if they are."""
        with self._planning:
            self._finishing = True
        deadline = time.monotonic() + seconds
        while self._planned and not self._stopped and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self._planned

    def abandon(self) -> None:
        """Begin no further batch, commit nothing more, and end the jobs of the batch that runs."""
        self._stopped = self._abandoned = True
        self._ending.set()
        # Again and again, for the batch's function may be about to start its next job.
        deadline = time.monotonic() + ABANDON_SECONDS
        while self._running and time.monotonic() < deadline:
            SparkContext._active_spark_context.cancelJobGroup(self._job_group)
            time.sleep(0.05)

    def close(self) -> None:
        """Close the connections to Kafka."""
        self._stopped = True
        self._ending.set()
        if self in _LIVE:
            _LIVE.remove(self)
        if self._planner is not None:
            self._planner.close()

    def is_of(self, context: JavaObject) -> bool:
        """Tell whether this is a stream of one of Java's streaming contexts."""
        if self._context is None and context.isCheckpointPresent():
            self._join(context)  # Spark has just made both anew from the same checkpoint
        return self._context is not None and self._context == context

    def is_over(self) -> bool:
        """Tell whether the stream's context was stopped, by whomever."""
        return self._context is not None and self._context.getState().toString() == "STOPPED"

    def submitted(self, batch_id: int, submitted_at: int) -> None:
        """Note which plans a batch uses: those made for it or before, by when it was submitted."""
        with self._lock:
            for planned in self._planned:
                is_free = planned.batch_id is None and planned.made_at <= submitted_at
                if is_free and planned.interval <= batch_id:
                    planned.batch_id = batch_id

    def completed(self, batch_id: int, failure: str | None) -> int:
        """Commit what can be committed now that a batch has ended.

        Parameters
        ----------
        batch_id : int
            The batch's time in milliseconds since 1970.
        failure : str or None
            Why one of its outputs failed.

        Returns
        -------
        int
            How many offsets the batch had.
        """
        with self._lock:
            used = [planned for planned in self._planned if planned.batch_id == batch_id]
        if self._abandoned or (self._stopped and failure is None):
            return 0
        if failure is not None:
            self._fail(f"batch {batch_id} failed: {failure}{remedy(failure)}")
            return 0
        with self._lock:
            for planned in used:
                planned.is_done = True
        try:
            self._commit_what_is_done()
        except Exception as error:
            self._fail(f"batch {batch_id} can't be committed: {error}")
        return sum(map(_count, used))

    def learn(self, records: int, ended: int, processing: int, waiting: int) -> None:
        """Tell the rate limit of a batch that has completed; see `RateLimit.completed`."""
        self._limit.completed(records, ended, processing, waiting)

    def _open(self) -> None:
        """Make what talks to Kafka, where that has not been done in this process."""
        if self._planner is not None:
            return
        spark = get_spark()
        positions, topic_ids = self._positions, None
        if self._folder is not None:
            self._plans = PlanLog(spark, self._folder)
            last = self._plans.last()
            if last:
                positions, topic_ids = last.positions, last.topic_ids
        self._limit = RateLimit(spark.sparkContext, self._interval)
        self._reader = RangeReader(spark, self._settings)
        planner = OffsetPlanner(
            spark, self._topics, self._settings, self._from_offsets, positions, topic_ids
        )
        try:
            # What the group has, so that a batch that is done once more takes no commit back.
            self._done = planner.committed() if positions is not None else {}
        except BaseException:
            planner.close()
            raise
        self._planner, self._unread = planner, planner.unread()
        if self._folder is not None:
            # From a thread: Spark says that a context is active when it has its first batches.
            threading.Thread(target=self._join_when_active, daemon=True).start()

    def _join(self, context: JavaObject) -> None:
        """Become part of a streaming context: learn of the ends of its batches."""
        with self._lock:
            if self._context is not None:
                return
            self._context = context
        jvm = SparkContext._active_spark_context._jvm
        listener = jvm.PythonStreamingListenerWrapper(_BatchListener(self))
        context.addStreamingListener(jvm.JavaStreamingListenerWrapper(listener))

    def _join_when_active(self) -> None:
        """Join the context that Spark has made from a checkpoint; catch up on its first batches."""
        active = SparkContext._active_spark_context._jvm.org.apache.spark.streaming.StreamingContext
        deadline = time.monotonic() + ACTIVE_SECONDS
        while (found := active.getActive()).isEmpty():
            if time.monotonic() > deadline or self._stopped:
                return
            time.sleep(0.05)
        context = found.get()
        self._join(context)
        for batch in _as_list(context.progressListener().retainedCompletedBatches()):
            batch_id = batch.batchTime().milliseconds()
            self.submitted(batch_id, batch.submissionTime())
            outputs = _as_list(batch.outputOperations().values().toSeq())
            failures = [output.failureReason() for output in outputs]
            reasons = [failure.get() for failure in failures if failure.isDefined()]
            self.completed(batch_id, summary(reasons[0]) if reasons else None)

    def _plans_folder(self) -> str | None:
        """Return the folder for the plans, beside the checkpoint; None if there is none."""
        checkpoint = self._context.checkpointDir() if self._context is not None else None
        return f"{checkpoint}/kafka-plans/{self.stream_id}" if checkpoint else None

    def _plan(self, interval: int) -> None:
        """Plan an interval, or find out what was planned for it before a crash."""
        plan = self._known_plan(interval)
        if plan is None:
            plan = self._new_plan(interval)
        with self._lock:
            self._unread = self._planner.unread()
            if plan.ranges:
                self._planned.append(_Planned(interval, plan.ranges, _now()))

    def _known_plan(self, interval: int) -> Plan | None:
        """Return an interval's plan if it was planned or missed before a crash."""
        if self._recovered_at is None:
            return None
        plan = self._insist(lambda: self._plans.read(interval))
        if plan is None and interval < self._recovered_at:
            return Plan([], {})  # nobody was there: its records are for the next interval
        return plan

    def _new_plan(self, interval: int) -> Plan:
        """Plan an interval with what has come since the last one."""
        try:
            ranges = self._planner.next_batch(_nothing if self._is_behind() else self._limit.most)
            self._away_since = None
        except BrokerAwayError as error:
            self._wait_for_the_broker(error)
            ranges = []  # but where the stream begins is kept even now
        plan = Plan(ranges, self._planner.positions(), self._planner.topic_ids())
        self._insist(lambda: self._write(interval, plan))
        return plan

    def _is_behind(self) -> bool:
        """Return whether batches wait already: one larger batch later is done sooner than many."""
        with self._lock:
            waiting = {planned.batch_id for planned in self._planned if not planned.is_done}
        return len(waiting - {None}) >= MOST_WAITING

    def _write(self, interval: int, plan: Plan) -> None:
        """Keep a plan for the time after a crash, if the context has a checkpoint.

        The first plan is kept even if it has no records: it says where the stream began.
        """
        if self._plans is None and (folder := self._plans_folder()) is not None:
            if any(map(is_secret, self._settings)):  # which Spark writes into its checkpoint
                protect_folder(get_spark(), self._context.checkpointDir())
            self._plans = PlanLog(get_spark(), folder)
        if self._plans is not None and (plan.ranges or self._plans.last() is None):
            self._plans.write(interval, plan)

    def _insist(self, action: Callable[[], Any]) -> Any:
        """Return what an action returns, after more tries while Kafka or a file system is away."""
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                return action()
            except (BrokerAwayError, OSError, Py4JError, PySparkException) as error:
                if self._stopped or time.monotonic() > deadline:
                    raise
                _LOGGER.warning("%s The stream tries again.", summary(str(error)))
                self._ending.wait(RETRY_SECONDS)

    def _read(self, ranges: list[OffsetRange]) -> DataFrame:
        """Return the records of planned ranges that retention has left."""
        left = ranges
        # A broker that is away will be waited for by the tasks that read.
        with contextlib.suppress(BrokerAwayError):
            left = self._planner.without_deleted(ranges)
        if not left:  # a range without records is a DataFrame without rows
            left = [replace(ranges[0], fromOffset=ranges[0].untilOffset)]
        return self._reader.read(left)

    def _last_try(
        self, function: Callable[[PlannedBatch], None], ranges: list[OffsetRange], batch_id: int
    ) -> None:
        """Call a batch's function once more; when that fails, let no later batch begin."""
        try:
            function(PlannedBatch(batch_id, ranges, self._read(ranges)))
        except Exception:
            self._stopped = True
            raise

    def _wait_for_the_broker(self, error: BrokerAwayError) -> None:
        """Let an interval pass without records, until the broker has been away for too long."""
        if self._away_since is None:
            self._away_since = time.monotonic() - ANSWER_SECONDS
            _LOGGER.warning("%s The stream waits for %s s.", error, AWAY_SECONDS)
        if time.monotonic() - self._away_since >= AWAY_SECONDS:
            self._fail(f"the broker has been away for {AWAY_SECONDS} s. {error}")
            raise error

    def _commit_what_is_done(self) -> None:
        """Commit, from the first plan on, as far as the plans' batches have succeeded."""
        with self._committing:
            while (first := self._first_done()) is not None:
                ends = ends_of(first.ranges)
                if self._commits:
                    self._commit(_advanced(self._offsets_done(), ends))
                with self._lock:
                    self._done = _advanced(self._done, ends)
                    self._planned.remove(first)
                    if self._plans is not None:
                        self._committed.append((time.monotonic(), first.interval))
            if not self._commits:
                self._commit(self._offsets_done())
        self._forget_plans()

    def _offsets_done(self) -> dict[TopicAndPartition, int]:
        """Return what may be committed: all partitions, since Kafka forgets those long idle."""
        with self._lock:
            if self._commits:
                return {**self._planner.starts(), **self._done}
            pending: dict[TopicAndPartition, int] = {}
            for part in (part for planned in self._planned for part in planned.ranges):
                pending.setdefault(part.topicAndPartition(), part.fromOffset)
            return self._asked.before(pending)

    def _commit_again_when_idle(self) -> None:
        """Commit once more what was committed long ago, so that Kafka keeps it."""
        idle = time.monotonic() - self._committed_at
        # A batch that is being committed has the lock, and is reason enough not to.
        if idle < RECOMMIT_SECONDS or not self._committing.acquire(blocking=False):
            return
        try:
            # A broker that is away is for the next plan to find out.
            with contextlib.suppress(BrokerAwayError):
                self._planner.commit(self._offsets_done())
                self._committed_at = time.monotonic()
        finally:
            self._committing.release()

    def _first_done(self) -> _Planned | None:
        """Return the first plan that isn't committed, if its batch has succeeded."""
        with self._lock:
            return self._planned[0] if self._planned and self._planned[0].is_done else None

    def _commit(self, offsets: Mapping[TopicAndPartition, int]) -> None:
        """Commit, and wait for a broker that is away, but not for ever."""
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                self._planner.commit(offsets)
                self._committed_at = time.monotonic()
                return
            except BrokerAwayError:
                if self._stopped or time.monotonic() > deadline:
                    raise

    def _forget_plans(self) -> None:
        """Remove the plans that no checkpoint will ask for any more."""
        if self._plans is None or self._context is None:
            return
        forgotten = None
        while self._committed and self._committed[0][0] < time.monotonic() - _KEPT_SECONDS:
            _, forgotten = self._committed.popleft()
        if forgotten is not None:
            # A window asks for as many intervals before its own as Spark remembers.
            remembered = self._context.graph().getMaxInputStreamRememberDuration().milliseconds()
            try:
                self._plans.forget(forgotten - remembered)
            except (OSError, Py4JError, PySparkException) as error:
                _LOGGER.warning("old plans can't be removed: %s", summary(str(error)))

    def _fail(self, reason: str) -> None:
        """Stop the context for a reason that `awaitTermination` and `run_stream` then raise."""
        if self._error is not None:
            return
        self._error, self._stopped = without_secrets(reason, self._settings), True
        _LOGGER.error("the stream stops: %s", self._error)
        if self._context is None:  # not started yet: whoever starts it gets the error
            return
        exception = SparkContext._active_spark_context._jvm.java.lang.RuntimeException(self._error)
        self._context.scheduler().reportError(self._error, exception)
        # From a thread that the context doesn't wait for.
        threading.Thread(target=self._stop_after_failure, daemon=True).start()

    def _stop_after_failure(self) -> None:
        """End the batch that runs, for its tasks may wait for a broker, and stop the context."""
        self.abandon()
        self._context.stop(False, False)


class _BatchListener(StreamingListener):
    """Reports a stream's batches: which are submitted, and how each has ended."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self._batches = batches

    def onBatchSubmitted(self, batchSubmitted: Any) -> None:  # noqa: N802, N803
        """Report a new batch; Spark calls this."""
        info = batchSubmitted.batchInfo()
        self._batches.submitted(info.batchTime().milliseconds(), info.submissionTime())

    def onBatchCompleted(self, batchCompleted: Any) -> None:  # noqa: N802, N803
        """Report a batch's end, and why one of its outputs failed, if one did; Spark calls this."""
        info = batchCompleted.batchInfo()
        batch_id = info.batchTime().milliseconds()
        self._batches.submitted(batch_id, info.submissionTime())  # if this joined after that
        outputs = info.outputOperationInfos()
        failures = [outputs[number].failureReason() for number in outputs]
        failure = next((summary(reason) for reason in failures if reason is not None), None)
        records = self._batches.completed(batch_id, failure)
        self._batches.learn(
            records, info.processingEndTime(), info.processingDelay(), info.schedulingDelay()
        )


def batches_of(ssc: StreamingContext) -> list[Batches]:
    """Return the batches of a context's Kafka streams that aren't closed."""
    context = ssc._jssc.ssc()
    return [batches for batches in _LIVE if batches.is_of(context)]


def batch_id_of(batch_time: datetime) -> int:
    """Return a batch's time in milliseconds; a local time would come twice when clocks go back."""
    return round(batch_time.timestamp() * 1000)


def _made_anew(
    topics: list[str],
    settings: Mapping[str, str],
    interval: float,
    from_offsets: Mapping[TopicAndPartition, int] | None,
    positions: Mapping[TopicAndPartition, int] | None,
    stream_id: str,
    folder: str,
) -> Batches:
    """Return the batches of a stream that Spark makes anew from its checkpoint.

    The checkpoint has them in each of the stream's functions; here they are one again.
    """
    for batches in list(_LIVE):
        if batches.stream_id == stream_id:
            if not batches._stopped and not batches.is_over():
                return batches
            batches.close()
    batches = Batches(topics, settings, interval, from_offsets, positions, stream_id, folder)
    _LIVE.append(batches)
    return batches


def _advanced(
    offsets: Mapping[TopicAndPartition, int], ends: Mapping[TopicAndPartition, int]
) -> dict[TopicAndPartition, int]:
    """Return offsets moved on to where ranges end, never back."""
    moved = {partition: max(end, offsets.get(partition, end)) for partition, end in ends.items()}
    return {**offsets, **moved}


def _nothing(left: Mapping[TopicAndPartition, int]) -> dict[TopicAndPartition, int]:
    """Leave all offsets to a later batch."""
    return dict.fromkeys(left, 0)


def _count(planned: _Planned) -> int:
    return sum(part.count() for part in planned.ranges)


def _now() -> int:
    """Return the time in milliseconds since 1970, as Spark takes it."""
    return time.time_ns() // 1_000_000


def _as_list(scala_sequence: JavaObject) -> list[JavaObject]:
    return [scala_sequence.apply(index) for index in range(scala_sequence.size())]
