"""Where scored events go: Parquet files, each event once whatever dies, and topics of Kafka.

`ParquetSink` writes each batch in two steps. Spark writes the files; nobody reads them yet. Then a
manifest, which names the batch's files and its offset ranges, gets its name in one step of the file
system that fails where the name is taken. The batch counts from that step on, and `read_scored`
reads what manifests name and nothing else. So a driver that dies before that step has written
nothing, and one that dies after it finds the batch done: the sink itself says where to go on.

    <path>/data/00000000000000000007-<id>/   files of the batch with this number
    <path>/commits/00000000000000000007.json  its manifest
    <path>/writer/writer.json                 who writes; it changes as long as the writer lives
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple

from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from helpers.dead_letters import send_dead_letters
from helpers.files import JsonFolder, folder_names, remove_folder
from helpers.higgs import EVENT_ID
from helpers.records import MODEL_VERSION, observed, vector_entries
from helpers.streaming.offsets import OffsetRange, TopicAndPartition

_LOGGER = logging.getLogger(__name__)

ON_BAD_RECORD = ("dead-letter", "skip", "stop")

# How often a writer shows that it lives, and how long the next one watches for that. A writer that
# is only slow, and taken for dead, does no harm: the manifest that it can't write stops it.
HEARTBEAT_SECONDS = 1.0
PATIENCE_SECONDS = 5.0

# What the files have. `bad` is what a bad record was, and why it is bad.
_STORED = (
    "{event_id} bigint, probability_0 double, probability_1 double, predicted_index int, "
    "model_version string, "
    "topic string, partition int, offset bigint, event_time timestamp, batch bigint, "
    "bad struct<key: binary, value: binary, reason: string>"
)
_MANIFEST = "batch bigint, event_id string, folder string, files array<string>"

_WRITER = "writer"


class SinkError(RuntimeError):
    """Nothing is written, or may be read; the message says why and what helps."""


class BadRecordError(SinkError):
    """A batch has a record that is no event, and the sink was told to stop then."""


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
    on_bad_record : str
        ``"stop"``: the batch fails at a record that is no event, and nothing of it counts.
        ``"skip"``: such records are kept in the files only, with their bytes and the reason.
        ``"dead-letter"``: they are also sent to ``<topic>.dead-letter``, before the batch counts.
    settings : mapping, optional
        For dead letters: settings of a Kafka client by Kafka's names.
    event_id : str
        The column that identifies an event, an integer.
    signal_index : int
        Which class is signal.

    Raises
    ------
    SinkError
        If another sink is open on the path, or what is there has another `event_id` or
        `signal_index`.
    ValueError
        If `on_bad_record` is no such thing, or dead letters have no settings.

    Examples
    --------
    >>> path = str(getfixture("tmp_path") / "scored")
    >>> ranges = [OffsetRange("events", 0, 0, 1)]
    >>> with ParquetSink(spark, path) as sink:
    ...     sink.begin(lambda batch_id: ranges)
    ...     sink.write(scored, batch_id=7)
    ...     sink.has(batch_id=7), sink.positions()
    (True, {TopicAndPartition(topic='events', partition=0): 1})
    >>> read_scored(spark, path).count()
    1
    """

    def __init__(
        self,
        spark: SparkSession,
        path: str,
        on_bad_record: str = "stop",
        settings: Mapping[str, str] | None = None,
        event_id: str = EVENT_ID,
        signal_index: int = 0,
    ) -> None:
        if on_bad_record not in ON_BAD_RECORD:
            raise ValueError(
                f"on_bad_record is {on_bad_record!r}: it must be {', '.join(ON_BAD_RECORD)}."
            )
        if on_bad_record == "dead-letter" and not settings:
            raise ValueError("dead letters go to Kafka: give its settings, too.")
        self._spark, self.path = spark, path.rstrip("/")
        self._on_bad_record, self._settings = on_bad_record, settings
        self._meaning = {"event_id": event_id, "signal_index": signal_index}
        self._writer: _Writer | None = None
        self._commits: JsonFolder | None = None
        self._number = -1  # of the last batch
        self._positions: dict[TopicAndPartition, int] = {}
        self._ranges_of: Callable[[int], list[OffsetRange]] | None = None

    def __repr__(self) -> str:
        return f"ParquetSink({self.path!r}, on_bad_record={self._on_bad_record!r})"

    def __enter__(self) -> ParquetSink:
        self._writer = _Writer(self._spark, self.path)
        try:
            self._read_last_commit()
        except BaseException:
            self._writer.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def begin(self, ranges_of: Callable[[int], list[OffsetRange]]) -> None:
        """Take a stream's batches from now on.

        Parameters
        ----------
        ranges_of : callable
            Takes a batch's id, and returns its offset ranges: `KafkaDirectStream.ranges_of`, or a
            `CheckpointRanges` for Structured Streaming.
        """
        self._ranges_of = ranges_of

    def positions(self) -> dict[TopicAndPartition, int]:
        """Return where a stream is to go on: behind the last batch, in each partition it had."""
        return dict(self._positions)

    def has(self, batch_id: int) -> bool:
        """Tell whether all records of a batch are in the sink, so that it needn't be scored."""
        return not self._left(self._ranges(batch_id))

    def write(self, scored: DataFrame, batch_id: int) -> None:
        """Write what the sink doesn't have yet of a batch; in one Spark action.

        Parameters
        ----------
        scored : pyspark.sql.DataFrame
            With the columns that `helpers.records.keep_bad_records` and the transformers make:
            the event's id, ``prediction`` (a vector of two), ``prediction_index``, ``topic``,
            ``partition``, ``offset``, ``timestamp``, ``bad``.
        batch_id : int
            The batch's id, as the stream names it.

        Raises
        ------
        BadRecordError
            If a record is bad and the sink is to stop then.
        SinkError
            If another sink has taken the path over.
        """
        ranges = self._ranges(batch_id)
        left = self._left(ranges)
        if not left:
            return
        self._tell_of_gaps(left)
        number = self._number + 1
        folder = f"{number:020d}-{uuid.uuid4()}"
        try:
            counts = self._write_files(_only(scored, left, ranges), number, folder)
            if counts["bad"]:
                self._treat_bad_records(folder, counts["bad"], ranges)
            self._writer.check()
        except BaseException:
            remove_folder(self._spark, f"{self.path}/data/{folder}")
            raise
        self._commit(number, left, folder, counts)

    def _read_last_commit(self) -> None:
        """Find out how far an earlier sink has come."""
        self._commits = JsonFolder(self._spark, f"{self.path}/commits")
        names = self._commits.names()
        if names:
            last = self._commits.read(names[-1])
            for name, value in self._meaning.items():
                if last.get(name, value) != value:  # an older kit wrote no signal_index
                    raise SinkError(
                        f"{self.path} has results with {name} {last[name]!r}, not {value!r}: "
                        "choose another path for these, or the model that they are from."
                    )
            self._number = last["batch"]
            self._positions = {
                TopicAndPartition(topic, partition): offset
                for topic, partition, offset in last["positions"]
            }

    def _ranges(self, batch_id: int) -> list[OffsetRange]:
        if self._ranges_of is None:
            raise SinkError("the sink knows no stream: call `begin` with the stream's ranges_of.")
        return self._ranges_of(batch_id)

    def _left(self, ranges: Iterable[OffsetRange]) -> list[OffsetRange]:
        """Return ranges without what is in the sink."""
        left = []
        for part in ranges:
            start = max(part.fromOffset, self._positions.get(part.topicAndPartition(), 0))
            if start < part.untilOffset:
                left.append(OffsetRange(part.topic, part.partition, start, part.untilOffset))
        return left

    def _tell_of_gaps(self, ranges: Iterable[OffsetRange]) -> None:
        """Warn of offsets that no batch has, and none will have."""
        for part in ranges:
            expected = self._positions.get(part.topicAndPartition(), part.fromOffset)
            if part.fromOffset > expected:
                _LOGGER.warning(
                    "offsets %s to %s of %s, partition %s, are in no batch of %s: the stream began "
                    "behind them, or they were deleted.",
                    expected, part.fromOffset - 1, part.topic, part.partition, self.path,
                )  # fmt: skip

    def _write_files(self, scored: DataFrame, number: int, folder: str) -> dict[str, int]:
        """Write a batch's files, and return how many records it has, and how many bad ones."""
        counts = Observation()
        prediction = vector_entries(F.col("prediction"))
        version = F.col(MODEL_VERSION) if MODEL_VERSION in scored.columns else F.lit(None)
        stored = scored.select(
            self._meaning["event_id"],
            prediction[0].alias("probability_0"),
            prediction[1].alias("probability_1"),
            F.col("prediction_index").cast("int").alias("predicted_index"),
            version.cast("string").alias(MODEL_VERSION),
            "topic",
            "partition",
            "offset",
            F.col("timestamp").alias("event_time"),
            F.lit(number).cast("bigint").alias("batch"),
            "bad",
        ).observe(counts, F.count("predicted_index").alias("events"), F.count("bad").alias("bad"))
        stored.write.parquet(f"{self.path}/data/{folder}")
        found = observed(counts)
        if found is None:
            raise SinkError("Spark has written a batch without counting it: it doesn't count.")
        return found

    def _treat_bad_records(self, folder: str, count: int, ranges: list[OffsetRange]) -> None:
        """Do with a batch's bad records what the sink was told."""
        files = self._spark.read.schema(_STORED.format(event_id=self._meaning["event_id"])).parquet(
            f"{self.path}/data/{folder}"
        )
        bad = files.where("bad IS NOT NULL")
        if self._on_bad_record == "stop":
            first = bad.orderBy("topic", "partition", "offset").first()
            raise BadRecordError(
                f"{first.topic}, partition {first.partition}, offset {first.offset} is no event: "
                f"{first.bad.reason}. To go on without such records, set on_bad_record to "
                "dead-letter or skip."
            )
        if self._on_bad_record == "dead-letter":
            topic_ids = {part.topic: part.topic_id for part in ranges}
            send_dead_letters(bad, self._settings, topic_ids)
        _LOGGER.info("%s bad records: %s", count, self._on_bad_record)

    def _commit(
        self, number: int, ranges: list[OffsetRange], folder: str, counts: dict[str, int]
    ) -> None:
        """Have the batch count: write its manifest, in one step."""
        positions = dict(self._positions)
        positions |= {part.topicAndPartition(): part.untilOffset for part in ranges}
        names = folder_names(self._spark, f"{self.path}/data/{folder}")
        manifest = {
            "batch": number,
            **self._meaning,
            "folder": folder,
            "files": [name for name in names if name.endswith(".parquet")],
            "ranges": [astuple(part) for part in ranges],
            "positions": [[*astuple(part), offset] for part, offset in positions.items()],
            **counts,
        }
        name = f"{number:020d}"
        try:
            self._commits.write(name, manifest)
        except FileExistsError:
            raise _taken_over(self.path) from None
        except Py4JJavaError:
            # A file system that doesn't answer may have done what it was asked.
            if name not in self._commits.names() or self._commits.read(name)["folder"] != folder:
                raise
        self._number, self._positions = number, positions


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

    Warns
    -----
    A warning in the log names the folders that are left out: batches that a crash has interrupted,
    and the one that is being written now.
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
    """Return the records in the files that manifests name, and tell what is left out."""
    path = path.rstrip("/")
    if "commits" not in folder_names(spark, path):
        raise SinkError(f"{path} is not the folder of a ParquetSink: check the path.")
    manifests = spark.read.schema(_MANIFEST).json(f"{path}/commits").collect()
    committed = {manifest.folder for manifest in manifests}
    left_out = sorted(set(folder_names(spark, f"{path}/data")) - committed)
    if left_out:
        _LOGGER.warning(
            "%s of the batches in %s/data are left out, for no manifest names them; they were "
            "interrupted, or are being written: %s",
            len(left_out), path, ", ".join(left_out),
        )  # fmt: skip
    files = [f"{path}/data/{found.folder}/{name}" for found in manifests for name in found.files]
    stored = _STORED.format(event_id=manifests[0].event_id if manifests else EVENT_ID)
    if not files:
        return spark.createDataFrame([], stored)
    return spark.read.schema(stored).parquet(*files)


class _Writer:
    """The claim of one sink on a path: a file that changes as long as the sink is open.

    Raises
    ------
    SinkError
        If another sink is open on the path.
    """

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._path, self._id = path, str(uuid.uuid4())
        self._folder = JsonFolder(spark, f"{path}/writer")
        self._closed = threading.Event()
        self._wait_for_a_dead_one()
        try:
            self._folder.write(_WRITER, {"id": self._id})
        except FileExistsError:
            raise _taken_over(path) from None
        self._thread = threading.Thread(target=self._show_life, name="sink-heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `SinkError` if another sink has taken this one for dead."""
        if not self._is_mine():
            raise _taken_over(self._path)

    def close(self) -> None:
        """Give the path free."""
        self._closed.set()
        self._thread.join()
        if self._is_mine():
            self._folder.delete(_WRITER)

    def _wait_for_a_dead_one(self) -> None:
        """Remove the claim of a sink that shows no life for a while; raise if it does."""
        seen = self._folder.changed_at(_WRITER)
        if seen is None:
            return
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (now := self._folder.changed_at(_WRITER)) == seen:
            if time.monotonic() > deadline:
                self._folder.delete(_WRITER)
                return
            time.sleep(HEARTBEAT_SECONDS / 4)
        if now is not None:
            raise _taken_over(self._path)

    def _is_mine(self) -> bool:
        try:
            return self._folder.read(_WRITER)["id"] == self._id
        except FileNotFoundError:
            return False

    def _show_life(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            try:
                self._folder.touch(_WRITER)
            except Exception as error:  # the sink goes on without, until its next batch checks
                if not self._closed.is_set():
                    _LOGGER.warning("the claim on %s can't be renewed: %s", self._path, error)
                return


def _taken_over(path: str) -> SinkError:
    return SinkError(
        f"another job writes to {path}: end it, or give this one another path. Nothing of this "
        "batch counts."
    )


def _only(scored: DataFrame, left: list[OffsetRange], ranges: list[OffsetRange]) -> DataFrame:
    """Return the records of the ranges that are left of a batch."""
    if left == ranges:
        return scored
    condition = F.lit(False)
    for part in left:
        condition |= (
            (F.col("topic") == part.topic)
            & (F.col("partition") == part.partition)
            & (F.col("offset") >= part.fromOffset)
        )
    return scored.where(condition)
