"""Store scored events as Parquet files, exactly once despite failures.

`ParquetSink.write` stores a batch in five numbered steps. The last one commits the batch by writing
a manifest that lists all committed files and the next offsets. `read_scored` reads only the files
in the last manifest. So if the driver dies before the last step, nothing is stored; if it dies
later, the batch is stored. The sink itself knows the offsets from which to resume.

The files of a hundred batches are merged into one, and so are a hundred merged files, with a
separate manifest. The original files are kept for an hour.

    <path>/data/00000000000000000000/00000000000000000007-<id>/   files of batch number 7
    <path>/data/merged-00000000000000000000-<id>/   files of a hundred batches, from number 0 on
    <path>/commits/00000000000000000107.json   manifest number 107
    <path>/writer/00000000000000000003.json    claim number 3 on the path; renewed while open
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, replace
from typing import Any, NamedTuple

from py4j.protocol import Py4JError
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from helpers.higgs import EVENT_ID
from helpers.records import ARE_PROBABILITIES, MODEL_VERSION, BadRecordError, name_faults
from helpers.sinks.columns import bounded, metrics, stored_columns
from helpers.sinks.commits import FAN_IN, CommitLog, Part, State
from helpers.sinks.dead_letters import send_dead_letters
from helpers.sinks.errors import SinkError
from helpers.sinks.lease import Lease
from helpers.sinks.parts import PartFiles
from helpers.sinks.progress import Progress, StartLog, check_ranges
from helpers.spark import exact_path, folder_names
from helpers.streaming import OffsetRange, TopicAndPartition

_LOGGER = logging.getLogger(__name__)

ON_BAD_RECORD = ("dead-letter", "skip", "stop")

# How long to wait for an action's counts; any that haven't arrived by then never will.
_COUNTS_SECONDS = 10


class Counts(NamedTuple):
    """The counts of a batch that was written to a sink.

    Attributes
    ----------
    events, signal, bad : int
        How many events were stored, how many of them are signal, and how many records were bad.
    unused : list of str
        Names of unused fields in the records. As `helpers.records.parse_events` finds them, each
        Arrow batch reports only a few.
    """

    events: int = 0
    signal: int = 0
    bad: int = 0
    unused: list[str] = []  # noqa: RUF012 (it is never changed)


class ParquetSink:
    """Writes the scored batches of a stream as Parquet, each event exactly once.

    A sink is open within a ``with`` block, and only one sink at a time can be open on a path.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session that the stream runs in.
    path : str or path-like
        The folder's path or URI, on any file system that Spark's Hadoop client supports. A sink
        continues the output of an earlier one there.
    signal_index : int
        The index of the signal class, 0 or 1.
    on_bad_record : str
        What to do with records that are not events. ``"stop"``: fail the batch and store nothing of
        it. ``"skip"``: store them separately, with their bytes and the reason. ``"dead-letter"``:
        also send them to ``<topic>.dead-letter``, before the commit.
    settings : mapping, optional
        Kafka client settings by Kafka's names, for dead letters.
    event_id : str
        The integer column that identifies an event.
    from_beginning : bool
        What to do with a topic that was deleted and recreated since the path's last batch. False:
        refuse it, because its offsets now refer to other records. True: forget the old topic's
        offsets, and store the new topic from its beginning in addition to the old one's events.

    Raises
    ------
    SinkError
        If another sink is open on the path, the results there have another `event_id` or
        `signal_index`, or a topic was recreated.
    ValueError
        If `signal_index` or `on_bad_record` is invalid, there are no settings for dead letters,
        `event_id` is the name of another column, or Hadoop can't use the path.

    Examples
    --------
    >>> path = str(getfixture("tmp_path") / "scored")
    >>> with ParquetSink(spark, path, signal_index=0) as sink:
    ...     sink.begin({TopicAndPartition("events", 0): 0}, {"events": "id-of-topic"})
    ...     sink.write(scored, [OffsetRange("events", 0, 0, 1)])
    ...     sink.positions()
    Counts(events=1, signal=1, bad=0, unused=[])
    {TopicAndPartition(topic='events', partition=0): 1}
    >>> read_scored(spark, path).count()
    1
    """

    def __init__(
        self,
        spark: SparkSession,
        path: str | os.PathLike[str],
        *,
        signal_index: int,
        on_bad_record: str = "stop",
        settings: Mapping[str, str] | None = None,
        event_id: str = EVENT_ID,
        from_beginning: bool = False,
    ) -> None:
        if faults := name_faults(event_id, ()):
            raise ValueError(f"{'; '.join(faults)}.")
        if signal_index not in (0, 1):
            raise ValueError(f"signal_index is {signal_index!r}: give 0 or 1, one of two classes.")
        self._spark, self.path = spark, exact_path(spark, path).rstrip("/")
        if on_bad_record not in ON_BAD_RECORD:
            raise ValueError(
                f"on_bad_record is {on_bad_record!r}: it must be {', '.join(ON_BAD_RECORD)}."
            )
        if on_bad_record == "dead-letter" and not settings:
            raise ValueError("dead letters are sent to Kafka: pass its settings as well.")
        self._on_bad_record, self._settings = on_bad_record, settings
        self._meaning = {"event_id": event_id, "signal_index": signal_index}
        self._files = PartFiles(spark, self.path, event_id)
        self._from_beginning = from_beginning
        self._lease: Lease | None = None
        self._commits: CommitLog | None = None
        self._starts: StartLog | None = None
        self._state = State()
        self._unsure: State | None = None  # a state whose manifest may or may not be committed
        self._unmerged: dict[str, int] = {}  # folders whose merge failed, and at which number
        self._leftovers: set[str] = set()
        self._topic_ids: dict[str, str] | None = None  # of the stream's topics; None before `begin`
        self._writing = threading.Lock()

    def __repr__(self) -> str:
        return f"ParquetSink({self.path!r}, on_bad_record={self._on_bad_record!r})"

    def __enter__(self) -> ParquetSink:
        lease = Lease(self._spark, self.path)
        try:
            self._open()
        except BaseException:
            lease.close()
            raise
        self._lease = lease
        return self

    def __exit__(self, *exception: object) -> None:
        lease, self._lease = self._lease, None
        lease.close()

    def while_open(self) -> Callable[[], bool]:
        """Return a function that returns whether the sink's ``with`` block has not ended yet."""
        lease = self._lease
        return lambda: lease is not None and self._lease is lease

    def begin(
        self, positions: Mapping[TopicAndPartition, int], topic_ids: Mapping[str, str]
    ) -> None:
        """Start taking the batches of a stream; a sink serves only one.

        Parameters
        ----------
        positions : mapping of TopicAndPartition to int
            Where the stream begins, as returned by `KafkaDirectStream.positions` or
            `KafkaQuery.positions`.
        topic_ids : mapping of str to str
            The current Kafka ids of the stream's topics, by topic name.

        Raises
        ------
        SinkError
            If the sink already has a stream, or a topic was deleted and recreated.
        """
        self._check_open()
        if self._topic_ids is not None:
            raise SinkError(
                f"{self.path} already takes the batches of another stream: give each stream a sink "
                "with a separate path."
            )
        self._state = replace(self._state, progress=self._progress_in(topic_ids))
        self._report_skipped(positions, topic_ids)
        self._starts.keep(positions, topic_ids)
        self._topic_ids = dict(topic_ids)

    def positions(self, topic_ids: Mapping[str, str] | None = None) -> dict[TopicAndPartition, int]:
        """Return the offsets from which to resume: after the last batch, or at the first start.

        Parameters
        ----------
        topic_ids : mapping of str to str, optional
            The current Kafka ids of the stream's topics, by topic name. Required with
            `from_beginning`, because a recreated topic begins at offset 0.

        Raises
        ------
        SinkError
            If a topic was deleted and recreated, or `from_beginning` is set without the ids.
        """
        self._check_open()
        if topic_ids is None and self._from_beginning:
            raise SinkError(
                "with from_beginning, the positions depend on which topics were created again: "
                "pass Kafka's ids of the topics to `positions`."
            )
        progress = self._progress_in(topic_ids or {})
        starts = self._starts.starts({**progress.topic_ids, **(topic_ids or {})})
        return {**starts, **progress.positions}

    def left(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return the parts of a batch's offset ranges that are not stored yet.

        Raises
        ------
        SinkError
            If the ranges are invalid, or a topic was deleted and recreated.
        """
        return self._state.progress.left(self._checked(ranges))

    def write(
        self,
        scored: DataFrame,
        ranges: Iterable[OffsetRange],
        before_commit: Callable[[], None] = lambda: None,
    ) -> Counts:
        """Store the records of a batch that are not stored yet, in one Spark action.

        1. Spark writes the batch's files and counts the records. Readers don't see the files yet.
        2. The driver verifies the number of rows in the files, and flushes them to disk.
        3. Bad records are handled according to `on_bad_record`.
        4. The stream's final check passes, and this sink still owns the path.
        5. A manifest, which lists all committed files and the next offsets, is published
           atomically; this fails if its name is taken.

        Parameters
        ----------
        scored : pyspark.sql.DataFrame
            Records with the columns of `helpers.records.keep_bad_records`, ``prediction`` (a vector
            of two), ``predicted_index``, and ``model_version`` if a serving model scored them.
        ranges : iterable of OffsetRange
            The batch's offset ranges.
        before_commit : callable
            Raises an exception if the batch must not be committed.

        Raises
        ------
        helpers.records.BadRecordError
            If a record is bad and `on_bad_record` is ``"stop"``.
        SinkError
            If another sink has taken over the path.
        """
        with self._writing:
            ranges = self._checked(ranges)
            left = self._state.progress.left(ranges)
            if not left:
                return Counts()
            self._report_gaps(left)
            folder = self._state.new_folder()
            try:
                rows, counts = self._write_files(scored, ranges, left, folder)  # 1
                part = self._files.finished(folder, rows, self._state.number + 1)  # 2
                unsent = self._handle_bad_records(part, ranges) if counts.bad else 0  # 3
                before_commit()  # 4
                self._lease.check()
            except BaseException:
                with contextlib.suppress(Exception):  # must not hide the original error
                    self._files.remove(folder)
                raise
            state = self._state.with_batch(part, self._state.progress.after(left))
            known = {"events": counts.events, "bad": counts.bad, "unsent": unsent, "rows": rows}
            self._publish(state, {"ranges": [astuple(each) for each in left], **known})  # 5
            if self._leftovers:
                self._remove_leftovers()
            self._tidy()
            return counts

    def _open(self) -> None:
        """Load the state of an earlier sink."""
        self._commits = CommitLog(self._spark, self.path)
        self._starts = StartLog(self._spark, self.path)
        last = self._commits.last()
        for name, value in self._meaning.items():
            if last.meaning.get(name, value) != value:
                raise SinkError(
                    f"{self.path} has results with {name} {last.meaning[name]!r}, not {value!r}: "
                    "choose another path, or the model that produced those results."
                )
        self._state = replace(last, meaning=self._meaning)
        self._topic_ids, self._unsure, self._unmerged = None, None, {}
        # Listed now, because later folders may belong to a sink that takes over.
        self._leftovers = self._files.existing(self._state.new_folder())

    def _check_open(self) -> None:
        if self._lease is None:
            raise SinkError(f"the sink {self.path} is not open: use it in a `with` block.")

    def _progress_in(self, topic_ids: Mapping[str, str]) -> Progress:
        """Return the progress in topics with these ids; raise if it belongs to other topics."""
        if self._from_beginning:
            return self._state.progress.restarted(topic_ids)
        progress = self._state.progress
        begun = {topic: id_ for topic, id_ in topic_ids.items() if topic not in progress.topic_ids}
        self._refuse([*progress.changed(topic_ids), *self._starts.changed(begun)])
        return progress

    def _refuse(self, changed: list[str]) -> None:
        """Raise `SinkError` if there are topics whose offsets now refer to other records."""
        if changed:
            raise SinkError(
                f"topic {changed[0]} was deleted and created again since the last batch in "
                f"{self.path}, or is another cluster's: its offsets now refer to other records. "
                "Give a new output path, or store the new topic from its beginning with "
                "ParquetSink(..., from_beginning=True)."
            )

    def _checked(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return a batch's ranges with their topics' ids; raise if they are invalid."""
        self._check_open()
        if self._topic_ids is None:
            raise SinkError("the sink has no stream: call `begin` first.")
        self._settle()
        ranges = [
            replace(part, topic_id=part.topic_id or self._topic_ids.get(part.topic))
            for part in ranges
        ]
        check_ranges(ranges)
        self._refuse(self._state.progress.changed({part.topic: part.topic_id for part in ranges}))
        return ranges

    def _report_skipped(
        self, positions: Mapping[TopicAndPartition, int], topic_ids: Mapping[str, str]
    ) -> None:
        """Warn about offsets before the first stored one, which pass for stored.

        It is not an error: a stream that has lost its checkpoint begins again, perhaps earlier.
        """
        stored = self._state.progress.positions
        for part, start in self._starts.starts(topic_ids).items():
            if positions.get(part, start) < start <= stored.get(part, 0):
                _LOGGER.warning(
                    "%s begins at offset %s of %s, partition %s; offsets %s to %s are not added: "
                    "use a new output for them.",
                    self.path, start, part.topic, part.partition, positions[part], start - 1,
                )  # fmt: skip

    def _report_gaps(self, ranges: Iterable[OffsetRange]) -> None:
        """Warn about offsets that are not in any batch and never will be."""
        for part in ranges:
            expected = self._state.progress.positions.get(part.topicAndPartition(), part.fromOffset)
            if part.fromOffset > expected:
                _LOGGER.warning(
                    "offsets %s to %s of %s, partition %s, are in no batch of %s: the stream began "
                    "after them, or they were deleted.",
                    expected, part.fromOffset - 1, part.topic, part.partition, self.path,
                )  # fmt: skip

    def _write_files(
        self, scored: DataFrame, ranges: list[OffsetRange], left: list[OffsetRange], folder: str
    ) -> tuple[int, Counts]:
        """Write a batch's remaining records to files; return the number of rows, and the counts."""
        _check_classes(scored)
        counts, context = Observation(), self._spark.sparkContext
        starts = {part.topicAndPartition(): part.fromOffset for part in left}
        records = bounded(scored, ranges, starts, self._state.number + 1)
        has_version = MODEL_VERSION in scored.schema.names
        columns = stored_columns(context, self._meaning["event_id"], has_version)
        counted = records.observe(counts, *metrics(context, self._meaning["signal_index"]))
        self._files.write(counted.select(*columns), folder)
        found = _counted(counts)
        if found["outside"]:
            raise SinkError(
                f"{found['outside']} records are not in the offset ranges of their batch, such as "
                f"{found['one_outside']}: write the records that the batch's function received."
            )
        unused = sorted(json.loads(found["unused"]))
        return found["rows"], Counts(found["events"], found["signal"], found["bad"], unused)

    def _handle_bad_records(self, part: Part, ranges: Iterable[OffsetRange]) -> int:
        """Do what `on_bad_record` says, and return how many records could not be sent."""
        bad = self._files.read_row_by_row([part]).where(F.col("bad").isNotNull())
        if self._on_bad_record == "stop":
            _stop_at_first(bad)
        if self._on_bad_record == "dead-letter":
            topic_ids = {each.topic: each.topic_id for each in ranges}
            return send_dead_letters(bad, self._settings, topic_ids)
        return 0  # `read_bad_records` finds them in the sink's files

    def _publish(self, state: State, batch: Mapping[str, Any] | None = None) -> None:
        """Write a manifest, and adopt its state."""
        self._unsure = state
        try:
            self._commits.write(state, batch)
        except Exception:
            self._settle()
            if self._state is not state:
                raise
        self._state, self._unsure = state, None

    def _settle(self) -> None:
        """Adopt the state of a manifest that was committed although writing it raised an error."""
        if self._unsure and self._commits.is_last(self._unsure):
            self._state = self._unsure
        self._unsure = None

    def _tidy(self) -> None:
        """Merge the files of many batches if there are enough, and remove outdated ones."""
        state = self._state
        failed = {f for f, number in self._unmerged.items() if state.number < number + FAN_IN}
        group, now = state.mergeable(failed), time.time()
        if not group:
            return
        try:
            for folder in state.outdated(now):
                self._files.remove(folder)
            part = self._files.merge(group)
            self._lease.check()
            state = state.merged(group, part, now)
            self._publish(state)
        except Exception:  # nothing is lost: the small files are still committed
            self._unmerged |= {part.folder: state.number for part in group}
            _LOGGER.warning("the small files in %s can't be merged now", self.path, exc_info=True)

    def _remove_leftovers(self) -> None:
        """Remove uncommitted files of earlier sinks.

        Only after a batch is stored: until then, an earlier sink that is merely slow could still
        commit its files.
        """
        with contextlib.suppress(Exception):  # the next sink retries
            self._lease.check()
            for folder in self._leftovers - self._state.folders():
                self._files.remove(folder)
        self._leftovers = set()


def read_scored(spark: SparkSession, path: str | os.PathLike[str]) -> DataFrame:
    """Return the committed scored events of a `ParquetSink`.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to read with.
    path : str or path-like
        The sink's path; a sink may be writing to it at the same time.

    Returns
    -------
    pyspark.sql.DataFrame
        ``EventId``, ``probability_0`` and ``probability_1``, ``predicted_index``,
        ``model_version`` (null unless a serving model scored the event), ``topic``, ``partition``,
        ``offset``, ``event_time`` (the record's timestamp in Kafka), and ``batch``, the number of
        the batch in this sink.

    Raises
    ------
    SinkError
        If there is no sink at the path.
    """
    # By a field that is never null in a bad record, so that Spark doesn't read the record's bytes.
    return _read_committed(spark, path).where(F.col("bad.reason").isNull()).drop("bad")


def read_bad_records(spark: SparkSession, path: str | os.PathLike[str]) -> DataFrame:
    """Return the records of a `ParquetSink` that are not events.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to read with.
    path : str or path-like
        The sink's path.

    Returns
    -------
    pyspark.sql.DataFrame
        ``topic``, ``partition``, ``offset``, ``event_time``, ``batch``, ``key``, ``value`` and
        ``reason``.

    Raises
    ------
    SinkError
        If there is no sink at the path.
    """
    bad = _read_committed(spark, path).where(F.col("bad").isNotNull())
    return bad.select("topic", "partition", "offset", "event_time", "batch", "bad.*")


def _read_committed(spark: SparkSession, path: str | os.PathLike[str]) -> DataFrame:
    """Return the records in the files that the last manifest lists."""
    path = exact_path(spark, path).rstrip("/")
    if not {"commits", "writer"} <= set(folder_names(spark, path)):  # a checkpoint has one of them
        raise SinkError(f"{path} is not the folder of a ParquetSink: check the path.")
    state = CommitLog(spark, path).last()
    return PartFiles(spark, path, state.meaning.get("event_id", EVENT_ID)).read(state.parts)


def _check_classes(scored: DataFrame) -> None:
    """Raise `SinkError` if it is known that the predictions aren't two probabilities."""
    metadata = scored.schema["prediction"].metadata
    if not metadata.get(ARE_PROBABILITIES, True):
        raise SinkError(
            "the sink stores probabilities, but the network's output is something else: end it "
            "with a softmax over the classes, or with a single sigmoid."
        )
    entries = metadata.get("ml_attr", {}).get("num_attrs", 2)
    if entries != 2:
        raise SinkError(
            f"the network distinguishes {entries} classes, but the sink stores the probabilities "
            "of two: combine the others in `prediction` and `predicted_index`, or store them with "
            "Spark's own file sink."
        )


def _counted(counts: Observation) -> dict[str, Any]:
    """Return the metrics of an action; raise if there are none and `get` would block forever."""
    deadline = time.monotonic() + _COUNTS_SECONDS
    while not _is_complete(counts):
        if time.monotonic() > deadline:
            raise SinkError("Spark wrote a batch without counting it, so the batch is not stored.")
        time.sleep(0.05)
    return counts.get


def _is_complete(counts: Observation) -> bool:
    """Return whether an observation has its metrics."""
    try:
        return counts._jo.future().isCompleted()
    except Py4JError:  # Spark 3.5, where only `get` is public, and that blocks
        found = counts._jo.getClass().getDeclaredField("metrics")
        found.setAccessible(True)
        return found.get(counts._jo).isDefined()


def _stop_at_first(bad: DataFrame) -> None:
    """Raise `BadRecordError` that names the offset of the first bad record."""
    place = ("topic", "partition", "offset")
    first = bad.select(*place, "bad.reason").orderBy(*place).first()
    raise BadRecordError(
        f"{first.topic}, partition {first.partition}, offset {first.offset} is not an event: "
        f"{first.reason}. To continue without such records, set on_bad_record to dead-letter "
        "or skip."
    )
