"""Scored events as Parquet files, each event once whatever dies.

`ParquetSink.write` stores a batch in five numbered steps, the last of which commits it: a manifest
that names all committed files and the next offsets. `read_scored` reads the files of the last
manifest and no others. So a driver that dies before the last step has stored nothing, and one that
dies after it finds the batch stored: the sink itself says where to resume.

When the files of a hundred batches have come together they are merged into one, and a hundred of
those again, by a manifest of its own. The files that were merged stay for an hour.

    <path>/data/00000000000000000000/00000000000000000007-<id>/   files of the batch with number 7
    <path>/data/merged-00000000000000000000-<id>/   files of a hundred batches from number 0 on
    <path>/commits/00000000000000000107.json   the manifest with this number
    <path>/writer/00000000000000000003.json    the third sink here; renewed while it is open
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, replace
from typing import Any, NamedTuple

from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from helpers.higgs import EVENT_ID
from helpers.records import MODEL_VERSION, observed, vector_entries
from helpers.sinks.bad_records import policy_for
from helpers.sinks.commits import FAN_IN, CommitLog, Part, State
from helpers.sinks.errors import SinkError
from helpers.sinks.lease import Lease
from helpers.sinks.parts import finished_part, merge, read_parts, with_size
from helpers.sinks.progress import Progress, check_ranges
from helpers.sinks.starts import StartLog
from helpers.spark import folder_names, remove_folder
from helpers.streaming import OffsetRange, TopicAndPartition

_LOGGER = logging.getLogger(__name__)

# A batch's ranges by "topic/partition": where they begin, from where on they are left to be stored,
# where they end; and the batch's number.
_BOUNDS = "map<string, struct<first: bigint, left: bigint, end: bigint, batch: bigint>>"


class Counts(NamedTuple):
    """What a batch has added to a sink.

    Attributes
    ----------
    events, signal, bad : int
        How many events were stored, how many of these are signal, and how many records were bad.
    unused : list of str
        Names of fields that the records have and nobody uses; as `helpers.records.parse_events`
        finds them, each Arrow batch reports a few.
    """

    events: int = 0
    signal: int = 0
    bad: int = 0
    unused: list[str] = []  # noqa: RUF012 (nobody changes it)


class ParquetSink:
    """Writes the scored batches of a stream as Parquet, each event once.

    It is open within a ``with`` block, and only one sink at a time is open on a path.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session that the stream runs in.
    path : str
        The folder's path or URI, on any file system that Spark's Hadoop client knows; what an
        earlier sink has written there is continued.
    signal_index : int
        Which class is signal.
    on_bad_record : str
        ``"stop"``: a record that is not an event fails its batch, and nothing of it is stored.
        ``"skip"``: such records are stored apart, with their bytes and the reason.
        ``"dead-letter"``: they are also sent to ``<topic>.dead-letter``, before the commit.
    settings : mapping, optional
        For dead letters: settings of a Kafka client by Kafka's names.
    event_id : str
        The column that identifies an event, an integer.
    from_beginning : bool
        What to do with a topic that was deleted and created again since the path's last batch.
        False: refuse it, because its offsets name other records now. True: forget the offsets of
        the old topic, and store the new one from its beginning, beside the old one's events.

    Raises
    ------
    SinkError
        If another sink is open on the path, or the results there have another `event_id` or
        `signal_index`, or are of a topic that was created again.
    ValueError
        If `on_bad_record` is none of these, or dead letters have no settings.

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
        path: str,
        *,
        signal_index: int,
        on_bad_record: str = "stop",
        settings: Mapping[str, str] | None = None,
        event_id: str = EVENT_ID,
        from_beginning: bool = False,
    ) -> None:
        self._spark, self.path = spark, path.rstrip("/")
        self._treat_bad_records = policy_for(on_bad_record, settings)
        self._on_bad_record = on_bad_record
        self._meaning = {"event_id": event_id, "signal_index": signal_index}
        self._from_beginning = from_beginning
        self._lease: Lease | None = None
        self._commits: CommitLog | None = None
        self._starts: StartLog | None = None
        self._state = State()
        self._unsure: State | None = None  # whose manifest may count
        self._unmerged: dict[str, int] = {}  # folders that a merge failed with, and at which number
        self._leftovers: set[str] = set()
        self._topic_ids: dict[str, str] | None = None  # of the stream's topics, once it has begun
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

    def begin(
        self, positions: Mapping[TopicAndPartition, int], topic_ids: Mapping[str, str]
    ) -> None:
        """Take the batches of a stream from now on; a sink serves one stream.

        Parameters
        ----------
        positions : mapping of TopicAndPartition to int
            Where the stream begins, as `KafkaDirectStream.positions` and `KafkaQuery.positions`
            return it.
        topic_ids : mapping of str to str
            Kafka's ids of the stream's topics now, by topic name.

        Raises
        ------
        SinkError
            If the sink has a stream already, or a topic was deleted and created again.
        """
        self._check_open()
        if self._topic_ids is not None:
            raise SinkError(
                f"{self.path} takes the batches of another stream already: give each stream a "
                "sink with a path of its own."
            )
        self._state = replace(self._state, progress=self._progress_in(topic_ids))
        self._starts.keep(positions, topic_ids)
        self._topic_ids = dict(topic_ids)

    def positions(self, topic_ids: Mapping[str, str] | None = None) -> dict[TopicAndPartition, int]:
        """Return where a stream resumes: after the last batch, or where it began first.

        Parameters
        ----------
        topic_ids : mapping of str to str, optional
            Kafka's ids of the stream's topics now, by topic name. With `from_beginning` they are
            needed, since a topic that was created again begins at offset 0.

        Raises
        ------
        SinkError
            If a topic was deleted and created again, or `from_beginning` is set without the ids.
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

    def topic_ids(self) -> dict[str, str]:
        """Return Kafka's ids of the topics whose events are stored, by topic name."""
        self._check_open()
        return dict(self._state.progress.topic_ids)

    def left(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return what isn't stored yet of a batch's offset ranges.

        Raises
        ------
        SinkError
            If a stream can't have such ranges, or a topic was deleted and created again.
        """
        return self._state.progress.left(self._checked(ranges))

    def write(
        self,
        scored: DataFrame,
        ranges: Iterable[OffsetRange],
        before_commit: Callable[[], None] = lambda: None,
    ) -> Counts:
        """Store what the sink doesn't have yet of a batch, in one Spark action.

        1. Spark writes the batch's files and counts the records. Nobody reads the files yet.
        2. The driver finds the files, with as many rows, and flushes them to the disk.
        3. Bad records are treated as the sink was told.
        4. The stream's last check passes, and the path still belongs to this sink.
        5. A manifest, which names all committed files and the next offsets, gets its name in one
           step of the file system that fails where the name is taken.

        Parameters
        ----------
        scored : pyspark.sql.DataFrame
            With the columns of `helpers.records.keep_bad_records`, ``prediction`` (a vector of
            two), ``predicted_index``, and ``model_version`` if a serving model scored.
        ranges : iterable of OffsetRange
            The batch's offsets.
        before_commit : callable
            Raises an exception if the batch must not be committed after all.

        Raises
        ------
        BadRecordError
            If a record is bad and the sink is to stop then.
        SinkError
            If another sink has taken the path over.
        """
        with self._writing:
            ranges = self._checked(ranges)
            left = self._state.progress.left(ranges)
            if not left:
                return Counts()
            self._report_gaps(left)
            folder = self._state.new_folder()
            try:
                rows, counts = self._write_files(self._bounded(scored, ranges, left), folder)  # 1
                part = self._finished(folder, rows)  # 2
                unsent = self._treat_bad_records(self._bad(part), ranges) if counts.bad else 0  # 3
                before_commit()  # 4
                self._lease.check()
            except BaseException:
                with contextlib.suppress(Exception):  # which must not hide the first one
                    self._remove(folder)
                raise
            known = {"events": counts.events, "bad": counts.bad, "unsent": unsent, "rows": rows}
            self._commit(part, left, known)  # 5
            if self._leftovers:
                self._remove_leftovers()
            self._tidy()
            return counts

    def _open(self) -> None:
        """Find out how far an earlier sink has come."""
        self._commits = CommitLog(self._spark, self.path)
        self._starts = StartLog(self._spark, self.path)
        last = self._commits.last()
        for name, value in self._meaning.items():
            if last.meaning.get(name, value) != value:  # an older kit wrote no signal_index
                raise SinkError(
                    f"{self.path} has results with {name} {last.meaning[name]!r}, not {value!r}: "
                    "choose another path for these, or the model that they are from."
                )
        parts = [with_size(self._spark, self.path, part) for part in last.parts]
        self._state = replace(last, meaning=self._meaning, parts=parts)
        self._topic_ids, self._unsure, self._unmerged = None, None, {}
        # Listed now, since what appears later may be of a sink that takes over.
        self._leftovers = set(folder_names(self._spark, f"{self.path}/data"))

    def _check_open(self) -> None:
        if self._lease is None:
            raise SinkError(f"the sink {self.path} is not open: use it in a `with` block.")

    def _progress_in(self, topic_ids: Mapping[str, str]) -> Progress:
        """Return the progress in topics with these ids; raise if it is of other topics."""
        if self._from_beginning:
            return self._state.progress.restarted(topic_ids)
        self._refuse(self._state.progress.changed(topic_ids))
        return self._state.progress

    def _refuse(self, changed: list[str]) -> None:
        """Raise `SinkError` if there are topics whose offsets have another meaning now."""
        if changed:
            raise SinkError(
                f"topic {changed[0]} was deleted and created again since the last batch in "
                f"{self.path}, or is another cluster's: its offsets now name other records. Give "
                "a new output path, or store the new topic from its beginning with "
                "ParquetSink(..., from_beginning=True)."
            )

    def _checked(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return a batch's ranges with their topics' ids; raise if it can't have them."""
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

    def _report_gaps(self, ranges: Iterable[OffsetRange]) -> None:
        """Warn of offsets that no batch has, and none will have."""
        for part in ranges:
            expected = self._state.progress.positions.get(part.topicAndPartition(), part.fromOffset)
            if part.fromOffset > expected:
                _LOGGER.warning(
                    "offsets %s to %s of %s, partition %s, are in no batch of %s: the stream began "
                    "behind them, or they were deleted.",
                    expected, part.fromOffset - 1, part.topic, part.partition, self.path,
                )  # fmt: skip

    def _bounded(
        self, scored: DataFrame, ranges: list[OffsetRange], left: list[OffsetRange]
    ) -> DataFrame:
        """Return the records that are left of a batch, each with its partition's bounds."""
        starts = {part.topicAndPartition(): part.fromOffset for part in left}
        bounds = {
            f"{part.topic}/{part.partition}": {
                "first": part.fromOffset,
                "left": starts.get(part.topicAndPartition(), part.untilOffset),
                "end": part.untilOffset,
                "batch": self._state.number + 1,
            }
            for part in ranges
        }
        # As a map, since numbers would be a part of the code that Spark generates, and Java would
        # have to compile that for each batch.
        known = F.from_json(F.lit(json.dumps(bounds)), _BOUNDS)
        key = F.concat_ws("/", "topic", "partition")
        scored = scored.withColumn("bounds", F.try_element_at(known, key))
        if left == ranges:
            return scored
        return scored.where("bounds IS NULL OR offset >= bounds.left")

    def _write_files(self, scored: DataFrame, folder: str) -> tuple[int, Counts]:
        """Write a batch's files; return how many rows they have, and what is in them."""
        counts = Observation()
        prediction = vector_entries(F.col("prediction"))
        place = F.concat_ws(
            " ", "topic", F.lit("partition"), "partition", F.lit("offset"), "offset"
        )
        version = F.col(MODEL_VERSION) if MODEL_VERSION in scored.columns else F.lit(None)
        stored = scored.select(
            self._meaning["event_id"],
            prediction[0].alias("probability_0"),
            prediction[1].alias("probability_1"),
            F.col("predicted_index").cast("int"),
            version.cast("string").alias(MODEL_VERSION),
            "topic",
            "partition",
            "offset",
            F.col("timestamp").alias("event_time"),
            F.col("bounds.batch").alias("batch"),
            "bad",
            "unused",
            F.expr("NOT ifnull(offset >= bounds.first AND offset < bounds.end, false)").alias(
                "outside"
            ),
        ).observe(
            counts,
            F.count(F.lit(1)).alias("rows"),
            F.count("predicted_index").alias("events"),
            F.count_if(F.col("predicted_index") == self._meaning["signal_index"]).alias("signal"),
            F.count("bad").alias("bad"),
            F.collect_set("unused").alias("unused"),
            F.count_if("outside").alias("outside"),
            F.min(F.when(F.col("outside"), place)).alias("one_outside"),
        )
        stored.drop("unused", "outside").write.parquet(f"{self.path}/data/{folder}")
        found = observed(counts)
        if found is None:
            raise SinkError("Spark has written a batch without counting it, so it is not stored.")
        if found["outside"]:
            raise SinkError(
                f"{found['outside']} records are not in the offset ranges of their batch, such as "
                f"{found['one_outside']}: write the records that the batch's function got."
            )
        unused = sorted({name for names in found["unused"] for name in names})
        return found["rows"], Counts(found["events"], found["signal"], found["bad"], unused)

    def _finished(self, folder: str, rows: int) -> Part:
        """Return a batch's files, flushed; raise if they don't have as many rows as written."""
        return finished_part(self._spark, self.path, folder, rows, self._state.number + 1)

    def _bad(self, part: Part) -> DataFrame:
        """Return the bad records of a batch's files."""
        files = read_parts(self._spark, self.path, [part], self._meaning["event_id"])
        return files.where("bad IS NOT NULL")

    def _commit(self, part: Part, ranges: list[OffsetRange], counts: Mapping[str, Any]) -> None:
        """Write the manifest of a batch, in one step."""
        state = self._state.with_batch(part, self._state.progress.after(ranges))
        self._publish(state, {"ranges": [astuple(part) for part in ranges], **counts})

    def _publish(self, state: State, batch: Mapping[str, Any] | None = None) -> None:
        """Write a manifest, and go on from it."""
        self._unsure = state
        try:
            self._commits.write(state, batch)
        except Exception:
            self._settle()
            if self._state is not state:
                raise
        self._state, self._unsure = state, None

    def _settle(self) -> None:
        """Go on from a manifest that counts although writing it failed, as it may at the end."""
        if self._unsure and self._commits.is_last(self._unsure):
            self._state = self._unsure
        self._unsure = None

    def _tidy(self) -> None:
        """Merge the files of many batches into one if there are enough, and remove old ones."""
        state = self._state
        failed = {f for f, number in self._unmerged.items() if state.number < number + FAN_IN}
        group, now = state.mergeable(failed), time.time()
        if not group:
            return
        try:
            for folder in state.outdated(now):
                self._remove(folder)
            part = merge(self._spark, self.path, group, self._meaning["event_id"])
            self._lease.check()
            state = state.merged(group, part, now)
            self._publish(state)
        except Exception:  # nothing is lost: the small files still count
            self._unmerged |= {part.folder: state.number for part in group}
            _LOGGER.warning("the small files in %s can't be merged now", self.path, exc_info=True)

    def _remove_leftovers(self) -> None:
        """Remove what earlier sinks left half done.

        Not before a batch is stored: until then, an earlier one that is only late could still
        store the files.
        """
        with contextlib.suppress(Exception):  # the next sink tries it again
            self._lease.check()
            for folder in self._leftovers - self._state.folders():
                self._remove(folder)
        self._leftovers = set()

    def _remove(self, folder: str) -> None:
        remove_folder(self._spark, f"{self.path}/data/{folder}")


def read_scored(spark: SparkSession, path: str) -> DataFrame:
    """Return the scored events of a `ParquetSink`, and nothing that doesn't count.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to read with.
    path : str
        The sink's path; a sink may be writing to it.

    Returns
    -------
    pyspark.sql.DataFrame
        ``EventId``, ``probability_0`` and ``probability_1``, ``predicted_index``,
        ``model_version`` (null where no serving model scored), ``topic``, ``partition``,
        ``offset``, ``event_time`` (the record's time in Kafka), and ``batch``, the number of the
        batch in this sink.

    Raises
    ------
    SinkError
        If there is no sink at the path.
    """
    return _read_committed(spark, path).where("bad IS NULL").drop("bad")


def read_bad_records(spark: SparkSession, path: str) -> DataFrame:
    """Return the records of a `ParquetSink` that are no events.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session to read with.
    path : str
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
    bad = _read_committed(spark, path).where("bad IS NOT NULL")
    return bad.select("topic", "partition", "offset", "event_time", "batch", "bad.*")


def _read_committed(spark: SparkSession, path: str) -> DataFrame:
    """Return the records in the files that the last manifest names."""
    path = path.rstrip("/")
    if "commits" not in folder_names(spark, path):
        raise SinkError(f"{path} is not the folder of a ParquetSink: check the path.")
    state = CommitLog(spark, path).last()
    return read_parts(spark, path, state.parts, state.meaning.get("event_id", EVENT_ID))
