"""Scored events as Parquet files, each event once whatever dies.

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
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import astuple, replace

from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, Observation, SparkSession
from pyspark.sql import functions as F

from helpers.files import JsonFolder, folder_names, remove_folder
from helpers.higgs import EVENT_ID
from helpers.records import MODEL_VERSION, observed, vector_entries
from helpers.sinks.dead_letters import send_dead_letters
from helpers.sinks.errors import BadRecordError, SinkError, taken_over
from helpers.sinks.lease import Lease
from helpers.sinks.progress import Progress, Source, check_ranges
from helpers.streaming.offsets import OffsetRange, TopicAndPartition

_LOGGER = logging.getLogger(__name__)

ON_BAD_RECORD = ("dead-letter", "skip", "stop")

# What the files have. `bad` is what a bad record was, and why it is bad.
_STORED = (
    "{event_id} bigint, probability_0 double, probability_1 double, predicted_index int, "
    "model_version string, "
    "topic string, partition int, offset bigint, event_time timestamp, batch bigint, "
    "bad struct<key: binary, value: binary, reason: string>"
)
_MANIFEST = "batch bigint, event_id string, folder string, files array<string>"


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
        If `on_bad_record` is no such thing, or dead letters have no settings.

    Examples
    --------
    >>> path = str(getfixture("tmp_path") / "scored")
    >>> class OneEvent:
    ...     def ranges_of(self, batch_id):
    ...         return [OffsetRange("events", 0, 0, 1, "id-of-topic")]
    ...     def topic_ids(self):
    ...         return {"events": "id-of-topic"}
    >>> with ParquetSink(spark, path) as sink:
    ...     sink.begin(OneEvent())
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
        from_beginning: bool = False,
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
        self._from_beginning = from_beginning
        self._lease: Lease | None = None
        self._commits: JsonFolder | None = None
        self._number = -1  # of the last batch
        self._progress = Progress()
        self._source: Source | None = None
        self._ids_at_begin: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"ParquetSink({self.path!r}, on_bad_record={self._on_bad_record!r})"

    def __enter__(self) -> ParquetSink:
        lease = Lease(self._spark, self.path)
        try:
            self._read_last_commit()
        except BaseException:
            lease.close()
            raise
        self._lease, self._source = lease, None
        return self

    def __exit__(self, *exception: object) -> None:
        lease, self._lease = self._lease, None
        lease.close()

    def begin(self, source: Source) -> None:
        """Take the batches of a stream from now on; a sink serves one stream.

        Parameters
        ----------
        source : Source
            Knows the offset ranges of the stream's batches: a `KafkaDirectStream`, or
            `CheckpointRanges` for Structured Streaming.

        Raises
        ------
        SinkError
            If the sink has a stream already, or a topic was deleted and created again.
        """
        self._check_open()
        if self._source is not None:
            raise SinkError(
                f"{self.path} takes the batches of another stream already: give each stream a "
                "sink with a path of its own."
            )
        topic_ids = source.topic_ids()
        self._progress = self._progress_in(topic_ids)
        self._source, self._ids_at_begin = source, topic_ids

    def positions(self, topic_ids: Mapping[str, str] | None = None) -> dict[TopicAndPartition, int]:
        """Return where a stream resumes: behind the last batch, in each partition it had.

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
        return dict(self._progress_in(topic_ids or {}).positions)

    def topic_ids(self) -> dict[str, str]:
        """Return Kafka's ids of the topics whose events are stored, by topic name."""
        self._check_open()
        return dict(self._progress.topic_ids)

    def has(self, batch_id: int) -> bool:
        """Tell whether all records of a batch are stored, so that it needn't be scored."""
        return not self._progress.left(self._ranges(batch_id))

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
        left = self._progress.left(ranges)
        if not left:
            return
        self._tell_of_gaps(left)
        number = self._number + 1
        folder = f"{number:020d}-{uuid.uuid4()}"
        try:
            counts = self._write_files(_only(scored, left, ranges), number, folder)
            if counts["bad"]:
                self._treat_bad_records(folder, counts["bad"])
            self._check_topics(left)
            self._lease.check()
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
            positions = {
                TopicAndPartition(topic, partition): offset
                for topic, partition, offset in last["positions"]
            }
            # An older kit wrote no ids: the next batch of each topic brings its id.
            self._progress = Progress(positions, last.get("topic_ids", {}))

    def _check_open(self) -> None:
        if self._lease is None:
            raise SinkError(f"the sink {self.path} is not open: use it in a `with` block.")

    def _progress_in(self, topic_ids: Mapping[str, str]) -> Progress:
        """Return the progress in topics with these ids; raise if it is of other topics."""
        if self._from_beginning:
            return self._progress.restarted(topic_ids)
        self._refuse(self._progress.changed(topic_ids))
        return self._progress

    def _refuse(self, changed: list[str]) -> None:
        """Raise `SinkError` if there are topics whose offsets have another meaning now."""
        if changed:
            raise SinkError(
                f"topic {changed[0]} was deleted and created again since the last batch in "
                f"{self.path}, or is another cluster's: its offsets now name other records. Give "
                "a new output path, or store the new topic from its beginning with "
                "ParquetSink(..., from_beginning=True)."
            )

    def _ranges(self, batch_id: int) -> list[OffsetRange]:
        """Return a batch's ranges with their topics' ids; raise if it can't have them."""
        self._check_open()
        if self._source is None:
            raise SinkError("the sink has no stream: call `begin` with the stream.")
        ranges = [
            replace(part, topic_id=part.topic_id or self._ids_at_begin.get(part.topic))
            for part in self._source.ranges_of(batch_id)
        ]
        check_ranges(ranges, batch_id)
        self._refuse(self._progress.changed({part.topic: part.topic_id for part in ranges}))
        return ranges

    def _check_topics(self, ranges: Iterable[OffsetRange]) -> None:
        """Raise `SinkError` if a topic has gone since its ranges were planned."""
        now = self._source.topic_ids()
        for part in ranges:
            if part.topic_id and now.get(part.topic) != part.topic_id:
                raise SinkError(
                    f"topic {part.topic} was deleted while a batch of it was read, so the batch "
                    "may lack records and is not stored. Start the stream again, with a new "
                    "output path, or with ParquetSink(..., from_beginning=True) if the topic was "
                    "created again."
                )

    def _tell_of_gaps(self, ranges: Iterable[OffsetRange]) -> None:
        """Warn of offsets that no batch has, and none will have."""
        for part in ranges:
            expected = self._progress.positions.get(part.topicAndPartition(), part.fromOffset)
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

    def _treat_bad_records(self, folder: str, count: int) -> None:
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
            send_dead_letters(bad, self._settings)
        _LOGGER.info("%s bad records: %s", count, self._on_bad_record)

    def _commit(
        self, number: int, ranges: list[OffsetRange], folder: str, counts: dict[str, int]
    ) -> None:
        """Have the batch count: write its manifest, in one step."""
        progress = self._progress.after(ranges)
        names = folder_names(self._spark, f"{self.path}/data/{folder}")
        manifest = {
            "batch": number,
            **self._meaning,
            "folder": folder,
            "files": [name for name in names if name.endswith(".parquet")],
            "ranges": [astuple(part) for part in ranges],
            "positions": [[*astuple(part), end] for part, end in progress.positions.items()],
            "topic_ids": progress.topic_ids,
            **counts,
        }
        name = f"{number:020d}"
        try:
            self._commits.write(name, manifest)
        except FileExistsError:
            raise taken_over(self.path) from None
        except Py4JJavaError:
            # A file system that doesn't answer may have done what it was asked.
            if name not in self._commits.names() or self._commits.read(name)["folder"] != folder:
                raise
        self._number, self._progress = number, progress


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
