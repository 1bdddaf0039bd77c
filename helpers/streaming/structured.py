"""Kafka through Structured Streaming, with the promises of the DStream.

Spark plans the batches of a query, and writes the plans to the checkpoint before it runs them.
`KafkaQuery` adds what Spark leaves to the program: it waits for a broker that is away, retries a
failed batch once, reports records that retention has deleted, and detects a topic that was created
again.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from pyspark.errors import PySparkException, StreamingQueryException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.streaming import StreamingQuery

from helpers.spark import (
    JAVA_ERRORS,
    JsonFolder,
    changed_settings,
    check_running,
    exact_path,
    folder_names,
    full_path,
    java_has_exited,
    read_file,
    spark_has_ended,
    summary,
)
from helpers.streaming.batches import ABANDON_SECONDS
from helpers.streaming.client import KafkaClient
from helpers.streaming.context import FINISH_SECONDS, interrupt_noted, java_watched
from helpers.streaming.errors import (
    AWAY_SECONDS,
    RETRY_SECONDS,
    BrokerAwayError,
    StreamError,
    TopicRecreatedError,
    is_away,
    without_secrets,
)
from helpers.streaming.group import GroupProgress
from helpers.streaming.offsets import (
    OffsetRange,
    PlannedBatch,
    TopicAndPartition,
    by_partition,
    by_topic,
)
from helpers.streaming.planner import OffsetPlanner
from helpers.streaming.reader import few_tasks, quieten, source_options
from helpers.streaming.settings import modern_settings, topic_names, without_group
from helpers.streaming.source import RECOMMIT_SECONDS

_LOGGER = logging.getLogger(__name__)

_ASK_SECONDS = 5  # between questions to the broker while a batch runs

_SOURCE_LINE = 2  # of a checkpoint's offsets file: after the version and Spark's settings


class KafkaQuery(contextlib.AbstractContextManager):
    """A query that scores the records of Kafka topics batch by batch.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        A session with the Kafka connector.
    topics : iterable of str
        The topics.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names. ``auto.offset.reset`` says where a query with
        a new checkpoint begins, and with ``none`` deleted offsets are an error. With a
        ``group.id``, the offsets of finished batches are committed to that consumer group, unless
        ``enable.auto.commit`` is false. These commits only show the lag in Kafka's tools: the query
        always resumes from its checkpoint, and if a commit fails, it logs a warning and continues.
        Give each program a separate group.
    checkpoint : str or path-like
        The folder where Spark keeps the query's progress.
    positions : mapping of TopicAndPartition to int, optional
        Where a query with a new checkpoint begins, as `ParquetSink.positions` returns it. Of a
        topic that it has, partitions that are left out are read from their beginning. For other
        topics, ``auto.offset.reset`` says where.
    max_offsets : int, optional
        The most offsets in a batch.

    Raises
    ------
    StreamError
        If a topic doesn't exist or was created again since the checkpoint was made, or Kafka can't
        be reached or refuses access.
    SessionError
        If the session was stopped.

    Examples
    --------
    >>> settings = {"bootstrap.servers": kafka.bootstrap_servers, "auto.offset.reset": "earliest"}
    >>> with KafkaQuery(spark, ["events"], settings, str(getfixture("tmp_path"))) as query:
    ...     query.foreachBatch(lambda df, batch_id: print(df.count(), "records"))
    ...     query.run(timeout=120)
    ...     query.lag()
    100 records
    0
    """

    def __init__(
        self,
        spark: SparkSession,
        topics: Iterable[str],
        settings: Mapping[str, str],
        checkpoint: str | os.PathLike[str],
        positions: Mapping[TopicAndPartition, int] | None = None,
        max_offsets: int | None = None,
    ) -> None:
        check_running(spark)
        self._spark, self._max_offsets = spark, max_offsets
        self._topics = sorted(set(topic_names(topics)))
        settings = modern_settings(settings)
        self._settings = without_group(settings)
        self._checkpoint = full_path(spark, checkpoint).rstrip("/")
        self._offsets = CheckpointOffsets(spark, self._checkpoint)
        self._function: Callable[[PlannedBatch], None] | None = None
        self._batches_begun = 0
        self._skips_from: int | None = None  # batches begun before the one that skips deleted ones
        self._away_since: float | None = None
        self._stopping = False
        self._topic_ids: dict[str, str] = {}
        self._client, self._progress = KafkaClient(spark, self._settings), None
        try:
            self._starts = self._find_starts(positions)
            if settings.get("group.id") and settings.get("enable.auto.commit") != "false":
                self._progress = GroupProgress(spark, settings, self._topic_ids)
        except BaseException:
            self.close()
            raise

    def __exit__(self, *exception: object) -> None:
        self.close()

    def foreachBatch(  # noqa: N802 (Spark's name)
        self, function: Callable[[DataFrame, int], None]
    ) -> None:
        """Call a function with each batch; if it raises, retry it once with the same records.

        Parameters
        ----------
        function : callable
            Takes ``(df, batch_id)``: a DataFrame with the columns of Spark's Kafka source, and the
            number of the batch.
        """
        self.for_each_planned_batch(lambda batch: function(batch.records, batch.batch_id))

    def for_each_planned_batch(self, function: Callable[[PlannedBatch], None]) -> None:
        """Call a function with each batch and its offset ranges, otherwise as `foreachBatch` does.

        Parameters
        ----------
        function : callable
            Takes a `PlannedBatch`.
        """
        self._function = function

    def run(
        self,
        until: Callable[[], bool] = lambda: False,
        timeout: float = math.inf,
        interval: float | None = None,
    ) -> None:
        """Run the query to its end, or until a condition is true.

        Parameters
        ----------
        until : callable
            Called a few times per second; when it returns true, the query stops after its batch.
        timeout : float
            The most seconds that this may take.
        interval : float, optional
            Seconds between batches. Without it, the query ends when it has processed the records
            that the topics had at its start.

        Raises
        ------
        TimeoutError
            If it takes longer than `timeout`.
        StreamError
            If a batch fails twice, the broker is away for more than 60 s, or something else stops
            the query.
        """
        deadline = time.monotonic() + timeout
        with java_watched(), interrupt_noted() as interrupted:
            self._away_since, self._stopping = None, False
            self._silent_since, self._asked_at = None, time.monotonic()
            self._committed_at = time.monotonic()
            goal = self._goal() if interval is None else {}
            with contextlib.suppress(BrokerAwayError):  # then the query waits for it
                self._check_transactions()

            def is_over() -> bool:
                is_late = time.monotonic() > deadline
                return is_late or interrupted.is_set() or _is_true(until)

            query = self._start(interval)
            try:
                self._commit(self._done)
                while not _is_true(until) and not interrupted.is_set():
                    if time.monotonic() > deadline:
                        raise TimeoutError(
                            f"the query was not done after {timeout:.0f} s and was stopped; "
                            "finished batches are kept. Give it more time, or look at Spark's log."
                        )
                    self._check_broker(query)
                    self._commit_again(query)
                    if self._has_skipped(query):
                        self._stop(query)
                        query = self._start(interval)
                    try:
                        if query.awaitTermination(0.1):
                            is_done = interval is None and self._has_reached(goal)
                            if not (is_done or interrupted.is_set()):
                                raise StreamError(_stopped_by_others(self._checkpoint))
                            break
                        if self._away_since is not None and _is_idle(query):
                            self._away_since = None  # the broker is back, with nothing new
                    except StreamingQueryException as error:
                        self._wait_for_the_broker(error, is_over)
                        if not is_over():
                            query = self._start(interval)
                self._finish_batch(query)
            finally:
                self._stopping = True
                self._stop(query)
                if self._progress is not None:
                    self._progress.wait()
        if interrupted.is_set():
            raise KeyboardInterrupt

    def ranges_of(self, batch_id: int) -> list[OffsetRange]:
        """Return the offset ranges of a batch that Spark has planned.

        Raises
        ------
        StreamError
            If Spark has not planned the batch, or the query has sources besides these topics.
        """
        return [
            replace(part, topic_id=self._topic_ids.get(part.topic))  # None: it is not read now
            for part in self._offsets.ranges_of(batch_id)
        ]

    def topic_ids(self) -> dict[str, str]:
        """Ask Kafka for the ids of the topics, by name; raise if one of them was created again."""
        return self._client.topic_ids(self._topics, self._topic_ids)

    def positions(self) -> dict[TopicAndPartition, int]:
        """Return where the next batch to be planned begins in each partition."""
        planned = {**self._starts, **self._offsets.planned()}
        return {part: offset for part, offset in planned.items() if part.topic in self._topics}

    def finished(self) -> dict[TopicAndPartition, int]:
        """Return where the last finished batch ended, in each partition that was read."""
        return self._offsets.finished()

    def lag(self) -> int:
        """Return how many of the topics' current offsets are not done yet."""
        return self._left(self._done())

    def lag_after(self, batch_id: int) -> int:
        """Return the `lag` that remains when a planned batch and all before it are done."""
        return self._left({**self._starts, **self._offsets.after(batch_id)})

    def close(self) -> None:
        """Close the connections to Kafka, as the end of a ``with`` block does."""
        try:
            self._client.close()
        finally:
            if self._progress is not None:
                self._progress.close()

    def _done(self) -> dict[TopicAndPartition, int]:
        """Return where the last finished batch ended; before the first, where the query begins."""
        done = self._offsets.done() or self._starts
        return {part: end for part, end in done.items() if part.topic in self._topics}

    def _commit(self, offsets: Callable[[], dict[TopicAndPartition, int]]) -> None:
        """Show progress in the consumer group, if there is one."""
        if self._progress is not None:
            self._progress.commit(offsets)

    def _left(self, done: Mapping[TopicAndPartition, int]) -> int:
        """Return how many of the topics' current offsets come after those that are done."""
        return sum(end - done.get(part, 0) for part, end in self._ends().items())

    def _ends(self) -> dict[TopicAndPartition, int]:
        """Return the topics' current end offsets."""
        topics = self._client.topics(self._topics).values()
        return self._client.ends([part for topic in topics for part in topic.partitions])

    def _goal(self) -> dict[TopicAndPartition, int]:
        """Return where a query that ends will have ended at least; unknown without a broker."""
        with contextlib.suppress(BrokerAwayError):
            return self._ends()
        return {}

    def _has_reached(self, goal: Mapping[TopicAndPartition, int]) -> bool:
        """Return whether all offsets before the goal are done."""
        done = self._done()
        return all(done.get(part, 0) >= end for part, end in goal.items())

    def _find_starts(
        self, positions: Mapping[TopicAndPartition, int] | None
    ) -> dict[TopicAndPartition, int]:
        """Return where the query begins, and store that with the topics' ids in the checkpoint.

        Spark's files have no topic ids, and don't exist before the first batch.
        """
        self._check_unfinished()
        files = JsonFolder(self._spark, f"{self._checkpoint}/kafka-topics")
        kept = {}
        for topic in self._topics:
            with contextlib.suppress(FileNotFoundError):
                kept[topic] = files.read(topic)
        ids = {topic: content["topic_id"] for topic, content in kept.items()}
        self._topic_ids = self._client.topic_ids(self._topics, ids)
        begun = by_partition({topic: content["starts"] for topic, content in kept.items()})
        starts = self._offsets.planned() or _starts(
            self._spark, self._topics, self._settings, {**(positions or {}), **begun}
        )
        offsets = by_topic(starts)
        for topic in self._topic_ids.keys() - kept.keys():
            content = {"topic_id": self._topic_ids[topic], "starts": offsets.get(topic, {})}
            try:
                files.write(topic, content)
            except FileExistsError:
                raise StreamError(
                    f"another query has just begun with the checkpoint {self._checkpoint}: give "
                    "each query a separate checkpoint."
                ) from None
        return starts

    def _check_unfinished(self) -> None:
        """Raise `StreamError` if a planned batch has records of topics that are not read now."""
        done = self._offsets.done()
        ends = self._offsets.planned().items()
        topics = {part.topic for part, end in ends if end > done.get(part, 0)}
        if missing := topics.difference(self._topics):
            raise StreamError(
                f"the unfinished batch of the checkpoint {self._checkpoint} has records of "
                f"{', '.join(sorted(missing))}: finish it with a query of the topics "
                f"{', '.join(sorted(topics.union(self._topics)))}, or use a new checkpoint."
            )

    def _start(self, interval: float | None) -> StreamingQuery:
        """Start the query from the checkpoint or, if that is new, from the offsets found before."""
        if not self._offsets.planned():  # Spark needs exactly the existing partitions
            self._starts = _starts(self._spark, self._topics, self._settings, self._starts)
        limit, self._skips_from = self._max_offsets, None
        with contextlib.suppress(BrokerAwayError):
            limit = self._next_limit()
        records = read_stream(self._spark, self._topics, self._settings, self._starts, limit)
        if limit != self._max_offsets:
            self._skips_from = self._batches_begun
            # One batch, and then again with the usual limit: Spark's next time is in 2069.
            trigger = {"processingTime": "36500 days"}
        elif interval is None:
            trigger = {"availableNow": True}
        else:
            trigger = {"processingTime": f"{round(interval * 1000)} milliseconds"}
        writer = records.writeStream.foreachBatch(self._process).trigger(**trigger)
        try:
            with changed_settings(self._spark, _stop_timeout()):  # Spark first stops an older run
                return writer.option("checkpointLocation", self._checkpoint).start()
        except (*JAVA_ERRORS, PySparkException) as error:
            if "failed to stop within" not in str(error):
                raise
            raise StreamError(
                f"the last run of the query with the checkpoint {self._checkpoint} has not ended: "
                "the function of its batch doesn't return. Restart Python, and run the query again."
            ) from None

    def _next_limit(self) -> int | None:
        """Return the most offsets that the next batch may have, deleted ones included.

        Spark plans batches of deleted offsets as well, and takes hours for those of a long break.
        So the first batch takes as many of them as it can without more records than the limit.
        """
        if not self._max_offsets:
            return None
        ends = self._ends()
        begins = self._client.begins(ends)
        positions = {**begins, **self.positions()}  # a new partition is read from its beginning
        left = {part: max(0, end - positions[part]) for part, end in ends.items()}
        deleted = {part: min(left[part], max(0, begins[part] - positions[part])) for part in ends}
        total = sum(left.values())

        def has_room(limit: int) -> bool:  # Spark takes the same share of each partition
            taken = sum(max(0, limit * left[part] // total - deleted[part]) for part in left)
            return taken <= self._max_offsets

        if sum(deleted.values()) <= self._max_offsets:
            return self._max_offsets
        return bisect.bisect_left(range(total), True, key=lambda limit: not has_room(limit + 1))

    def _has_skipped(self, query: StreamingQuery) -> bool:
        """Return whether a query that skips deleted offsets has done its only batch."""
        has_begun = self._skips_from is not None and self._batches_begun > self._skips_from
        # In this order: a query that fails is no longer active first.
        return has_begun and not query.status["isTriggerActive"] and query.isActive

    def _check_transactions(self) -> None:
        """Refuse to resume inside a transaction that is still open, before Spark plans.

        An earlier query read its records, and this one mustn't (``read_committed``). Spark would
        plan a batch that ends before it begins, and continue from its end.
        """
        positions = self.positions()
        self._client.topic_ids(self._topics, self._topic_ids)
        for part, end in self._client.ends(positions).items():
            if end < positions[part] <= self._client.last_written(part):
                raise StreamError(
                    f"{part.topic}, partition {part.partition}, is read up to offset "
                    f"{positions[part]}, but a transaction that began at {end} is still open: wait "
                    "until it ends, or set isolation.level to read_uncommitted, as before."
                )

    def _process(self, df: DataFrame, batch_id: int) -> None:
        """Call the function with a batch; Spark calls this."""
        self._batches_begun += 1
        began = time.time_ns() // 1_000_000
        ranges = self.ranges_of(batch_id)
        self._client.topic_ids(self._topics, self._topic_ids)
        if ranges:  # Spark also runs empty batches: the first one of an empty topic
            self._call(PlannedBatch(batch_id, ranges, few_tasks(df, ranges), began))
            self._commit(lambda: self._offsets.after(batch_id))
        self._away_since = None

    def _call(self, batch: PlannedBatch) -> None:
        """Call the function, retry it once if it fails, and report records that were deleted."""
        left = self._client.without_deleted(batch.ranges)
        try:
            self._function(batch)
        except Exception as error:
            # If the broker is away, another try would wait as long: the query waits for it instead.
            is_silent = isinstance(error, BrokerAwayError) or is_away(str(error))
            if self._stopping or spark_has_ended() or is_silent:
                raise
            _LOGGER.warning("batch %s failed and is retried", batch.batch_id, exc_info=True)
            self._function(batch)
        # The batch is done, so an error from Kafka must not repeat it.
        with contextlib.suppress(StreamError, *JAVA_ERRORS):
            self._client.report_deleted_meanwhile(left)

    def _commit_again(self, query: StreamingQuery) -> None:
        """Commit the offsets of an idle query, because Kafka expires old ones."""
        begun, now = self._batches_begun, time.monotonic()
        if self._progress is None or now - self._committed_at < RECOMMIT_SECONDS:
            return
        if query.status["isTriggerActive"]:  # the batch commits when it is done
            return
        self._committed_at = now
        with contextlib.suppress(*JAVA_ERRORS, OSError):  # the next time will do
            done = self._done()
            if self._batches_begun == begun:
                self._commit(lambda: done)

    def _check_broker(self, query: StreamingQuery) -> None:
        """Raise `StreamError` if the broker has been away for 60 s while a batch runs.

        Spark's tasks would wait for it several times as long.
        """
        now = time.monotonic()
        if now - self._asked_at < _ASK_SECONDS or not query.isActive:
            return
        self._asked_at = now
        try:
            if query.status["isTriggerActive"]:
                self._client.topic_ids(self._topics)
            self._silent_since = None
        except BrokerAwayError as error:
            if self._silent_since is None:
                self._silent_since = now
            elif now - self._silent_since > AWAY_SECONDS:
                raise StreamError(
                    f"the query stopped: the broker has been away for {AWAY_SECONDS} s. {error}"
                ) from None
        except StreamError:  # such as for a deleted topic: the batch has the reason
            pass

    def _wait_for_the_broker(
        self, error: StreamingQueryException, is_over: Callable[[], bool]
    ) -> None:
        """Return when the broker answers again, or it is over; raise if it wasn't the cause."""
        reason = without_secrets(summary(error), self._settings)
        was_away = is_away(str(error))
        if self._away_since is None:  # otherwise no batch has finished since the last outage
            self._away_since = time.monotonic()
        while not is_over():
            if time.monotonic() - self._away_since > AWAY_SECONDS:
                raise StreamError(
                    f"the query stopped: the broker has been away for {AWAY_SECONDS} s. {reason}"
                ) from None
            try:
                self._client.topic_ids(self._topics)
                break
            except BrokerAwayError:
                _LOGGER.warning("%s The query waits for %s s.", reason, AWAY_SECONDS)
                was_away = True
                time.sleep(RETRY_SECONDS)  # not `wait`, in which a signal's handler can't set it
        if not was_away:
            raise StreamError(f"the query stopped: {reason}") from None

    def _stop(self, query: StreamingQuery) -> None:
        """Stop Spark's query; give up on a batch's function that doesn't return."""
        with changed_settings(self._spark, _stop_timeout()):
            try:
                query.stop()
            except (*JAVA_ERRORS, PySparkException) as error:
                if java_has_exited():
                    raise
                _LOGGER.warning(
                    "the query's batch still runs %s s after it was stopped, and is not committed: "
                    "its function doesn't return. %s", ABANDON_SECONDS, summary(error),
                )  # fmt: skip

    def _finish_batch(self, query: StreamingQuery) -> None:
        """Wait until the running batch is done, so that it needn't be repeated."""
        begun, deadline = self._batches_begun, time.monotonic() + FINISH_SECONDS
        while query.isActive and query.status["isTriggerActive"] and self._batches_begun == begun:
            if time.monotonic() > deadline:
                return
            time.sleep(0.05)


def _stop_timeout() -> dict[str, str]:
    """Return the setting for how long Spark waits for a query's batch; by default, for ever."""
    return {"spark.sql.streaming.stopTimeout": f"{ABANDON_SECONDS}s"}


def _stopped_by_others(checkpoint: str) -> str:
    """Return the message for a query that ended although nothing here stopped it."""
    return (
        f"the query with the checkpoint {checkpoint} was stopped from outside: Spark does that if "
        "another query starts with the same checkpoint. Finished batches are kept. Give each query "
        "a separate checkpoint."
    )


class CheckpointOffsets:
    """The offsets in the checkpoint of a query whose only source is Kafka.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session that the query runs in.
    checkpoint : str or path-like
        The query's ``checkpointLocation``.

    Examples
    --------
    >>> checkpoint = str(getfixture("tmp_path"))
    >>> settings = {"bootstrap.servers": kafka.bootstrap_servers, "auto.offset.reset": "earliest"}
    >>> writer = read_stream(spark, ["events"], settings).writeStream.format("noop")
    >>> writer = writer.option("checkpointLocation", checkpoint).trigger(availableNow=True)
    >>> writer.start().awaitTermination(600)
    True
    >>> CheckpointOffsets(spark, checkpoint).ranges_of(0)
    [OffsetRange(topic='events', partition=0, fromOffset=0, untilOffset=100)]
    """

    def __init__(self, spark: SparkSession, checkpoint: str | os.PathLike[str]) -> None:
        self._spark, self._checkpoint = spark, exact_path(spark, checkpoint).rstrip("/")

    def ranges_of(self, batch_id: int) -> list[OffsetRange]:
        """Return the ranges of a batch that Spark has planned.

        Raises
        ------
        StreamError
            If the batch is not in the checkpoint, there are several sources, or a partition ends
            before it begins.
        """
        ends = self.after(batch_id)
        starts = self.after(batch_id - 1) if batch_id else self._initial()
        ranges = []
        for part, end in ends.items():
            start = starts.get(part, 0)  # a new partition is read from its beginning
            if end < start:
                raise TopicRecreatedError(
                    part.topic, f"partition {part.partition} ends at {end}, before offset {start}"
                )
            if end > start:
                ranges.append(OffsetRange(part.topic, part.partition, start, end))
        return sorted(ranges)

    def planned(self) -> dict[TopicAndPartition, int]:
        """Return where the last batch that Spark has planned ends; empty before the first."""
        batches = self._numbers("offsets")
        return self.after(max(batches)) if batches else {}

    def finished(self) -> dict[TopicAndPartition, int]:
        """Return where the query's last finished batch ended, in each partition it has read."""
        starts = self._initial()
        return {part: end for part, end in self.done().items() if end > starts.get(part, 0)}

    def done(self) -> dict[TopicAndPartition, int]:
        """Return where the last finished batch ended, or where the query began before the first.

        This is empty before Spark has planned a batch.
        """
        batches = self._numbers("commits")
        return self.after(max(batches)) if batches else self._initial()

    def _numbers(self, folder: str) -> list[int]:
        names = folder_names(self._spark, f"{self._checkpoint}/{folder}")
        return [int(name) for name in names if name.isdigit()]

    def _initial(self) -> dict[TopicAndPartition, int]:
        """Return where the query began; empty before Spark has planned a batch."""
        if not self._numbers("offsets"):
            return {}
        return self._parsed("sources/0/0", self._lines("sources/0/0")[-1:])

    def after(self, batch_id: int) -> dict[TopicAndPartition, int]:
        """Return where a batch ends."""
        lines = self._lines(f"offsets/{batch_id}")
        if len(lines) > _SOURCE_LINE + 1:
            raise StreamError(
                f"the query of {self._checkpoint} has {len(lines) - _SOURCE_LINE} sources, so a "
                "batch can't be identified by its offsets: read all topics with one KafkaQuery."
            )
        return self._parsed(f"offsets/{batch_id}", lines[_SOURCE_LINE:])

    def _parsed(self, name: str, lines: list[str]) -> dict[TopicAndPartition, int]:
        """Return the offsets in a file's last line; Spark leaves files empty after a power cut."""
        try:
            # With `spark.sql.streaming.offsetLog.formatVersion` 2, the source's name comes first.
            return by_partition(json.loads("".join(lines).lstrip("0123456789:")))
        except ValueError:
            raise StreamError(
                f"the checkpoint {self._checkpoint} is damaged: {name} is not complete, as after a "
                "power cut. Use a new checkpoint: with the sink's positions, the query resumes "
                "where the output ends."
            ) from None

    def _lines(self, name: str) -> list[str]:
        try:
            return read_file(self._spark, f"{self._checkpoint}/{name}").strip().splitlines()
        except FileNotFoundError:
            raise StreamError(f"the checkpoint {self._checkpoint} has no {name}.") from None


def read_stream(
    spark: SparkSession,
    topics: Iterable[str],
    settings: Mapping[str, str],
    starts: Mapping[TopicAndPartition, int] | None = None,
    max_offsets: int | None = None,
) -> DataFrame:
    """Return a streaming DataFrame of Kafka's records, with the settings that a DStream takes.

    This is Spark's source alone, without the additional promises of `KafkaQuery`.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        A session with the Kafka connector.
    topics : iterable of str
        The topics.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names. ``auto.offset.reset`` says where a new query
        begins; unless it is ``none``, deleted offsets are skipped.
    starts : mapping of TopicAndPartition to int, optional
        Where a new query begins: an offset for each partition.
    max_offsets : int, optional
        The most offsets in a batch.

    Returns
    -------
    pyspark.sql.DataFrame
        The columns of Spark's Kafka source.

    Examples
    --------
    >>> settings = {"bootstrap.servers": kafka.bootstrap_servers}
    >>> read_stream(spark, ["events"], settings).isStreaming
    True
    """
    topics, settings = topic_names(topics), modern_settings(settings)
    if starts is None:
        starts = _starts(spark, topics, settings)
    quieten(spark)
    stream = (
        spark.readStream.format("kafka")
        .options(**source_options(settings))
        .option("subscribe", ",".join(topics))
        .option("startingOffsets", json.dumps(by_topic(starts)))
        .option("failOnDataLoss", str(settings["auto.offset.reset"] == "none").lower())
    )
    if max_offsets:
        stream = stream.option("maxOffsetsPerTrigger", max_offsets)
    return stream.load()


def _starts(
    spark: SparkSession,
    topics: Iterable[str],
    settings: Mapping[str, str],
    positions: Mapping[TopicAndPartition, int] | None = None,
) -> dict[TopicAndPartition, int]:
    """Return where the topics' partitions begin; the planner's errors are clearer than Spark's."""
    if positions and settings.get("auto.offset.reset") == "latest":
        known = {part.topic for part in positions}
        if new := set(topics) - known:
            starts = _starts(spark, new, settings)
            old = set(topics) - new
            return starts | (_starts(spark, old, settings, positions) if old else {})
        # Records after the deleted ones are read, as by a running query.
        settings = {**settings, "auto.offset.reset": "earliest"}
    planner = OffsetPlanner(spark, topics, without_group(settings), positions=positions or None)
    with contextlib.closing(planner):
        return planner.positions()


def _is_true(condition: Callable[[], bool]) -> bool:
    """Return a condition's value; false if it asks a broker that is away."""
    try:
        return condition()
    except BrokerAwayError:
        return False


def _is_idle(query: StreamingQuery) -> bool:
    """Return whether a query has finished a trigger; Spark reports one without records later."""
    return query.status["message"] == "Waiting for next trigger"
