"""Kafka as a DStream from Python, with the names of `pyspark.streaming.kafka` (Spark 1.3 to 2.4).

Three classes share the work. `OffsetPlanner` decides which offsets belong to a batch; it talks to
Kafka through the JVM's own `KafkaConsumer`, and knows nothing of Spark's streams. `RangeReader`
reads given offsets with Spark's Kafka source, and knows nothing of consumer groups.
`KafkaDirectStream` joins the two: each interval it plans a batch, hands the batch on, and commits
the batch's offsets when the whole batch has succeeded.

    stream = KafkaUtils.createDirectStream(ssc, ["Machine_Learning"], {
        "bootstrap.servers": "127.0.0.1:9092",
        "group.id": "walkthrough",
        "auto.offset.reset": "earliest",
    })
    stream.foreachBatch(process_instances)
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import signal
import threading
import time
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark import RDD
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.streaming import DStream, StreamingContext, StreamingListener
from pyspark.streaming.dstream import TransformedDStream

from helpers.session import scratch_folder

_LOGGER = logging.getLogger(__name__)

# How long Kafka may take to answer a question of the planner.
ANSWER_SECONDS = 15

# How long a graceful stop waits for the batches that are planned.
FINISH_SECONDS = 120

# What the planner settles itself, whatever the user's settings say: it reads no records, it never
# makes a topic by asking for it, and offsets are committed by `KafkaDirectStream` alone.
_PLANNER_SETTINGS = {
    "key.deserializer": "org.apache.kafka.common.serialization.ByteArrayDeserializer",
    "value.deserializer": "org.apache.kafka.common.serialization.ByteArrayDeserializer",
    "enable.auto.commit": "false",
    "allow.auto.create.topics": "false",
}

# Spark's source refuses these (it is told the offsets), or they are the planner's business.
_NOT_FOR_THE_READER = {"auto.offset.reset", "group.id", *_PLANNER_SETTINGS}

# Kafka's defaults suit one record at a time; a batch is read faster in larger pieces. Above all, a
# consumer that has come to a partition's end asks the broker to wait half a second for more, and
# gets nothing else from that broker meanwhile: 100,000 records took 1.3 s so, 0.4 s with 10 ms.
_READER_SETTINGS = {
    "fetch.max.wait.ms": "10",
    "max.poll.records": "10000",
    "max.partition.fetch.bytes": str(16 * 1024**2),
    "fetch.max.bytes": str(64 * 1024**2),
}

_OLD_NAMES = {"metadata.broker.list": "bootstrap.servers"}
_OLD_RESETS = {"smallest": "earliest", "largest": "latest"}


# The streams of each context, whose connections end with it.
_STREAMS: weakref.WeakKeyDictionary[StreamingContext, list[KafkaDirectStream]]
_STREAMS = weakref.WeakKeyDictionary()


class StreamError(RuntimeError):
    """The stream can't be planned or went on no further; the message says why and what helps."""


@dataclass(frozen=True, order=True)
class TopicAndPartition:
    """One partition of a topic.

    Examples
    --------
    >>> TopicAndPartition("Machine_Learning", 0)
    TopicAndPartition(topic='Machine_Learning', partition=0)
    """

    topic: str
    partition: int


@dataclass(frozen=True, order=True)
class OffsetRange:
    """The records of a partition from one offset up to, but not including, another.

    Examples
    --------
    >>> OffsetRange("Machine_Learning", 0, fromOffset=10, untilOffset=25).count()
    15
    """

    topic: str
    partition: int
    fromOffset: int  # noqa: N815 (the name that the API had)
    untilOffset: int  # noqa: N815

    def topicAndPartition(self) -> TopicAndPartition:  # noqa: N802
        """Return the partition that the range is of."""
        return TopicAndPartition(self.topic, self.partition)

    def count(self) -> int:
        """Return the number of offsets in the range."""
        return self.untilOffset - self.fromOffset


@dataclass(frozen=True)
class KafkaMessageAndMetadata:
    """What a `messageHandler` is given: a record with where it came from.

    Attributes
    ----------
    topic : str
    partition : int
    offset : int
    key, message : object
        What the stream's `keyDecoder` and `valueDecoder` made of the record's bytes.
    """

    topic: str
    partition: int
    offset: int
    key: Any
    message: Any


def utf8_decoder(content: bytes | None) -> str | None:
    """Return bytes as text; None (a record without key or value) stays None.

    Examples
    --------
    >>> utf8_decoder(b"Higgs")
    'Higgs'
    """
    return None if content is None else content.decode("utf-8")


class OffsetPlanner:
    """Decides which offsets of some topics belong to the next batch.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose JVM has the Kafka client.
    topics : iterable of str
        The topics; all their partitions are read, new ones too, unless `from_offsets` names some.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names. ``auto.offset.reset`` (``earliest``,
        ``latest``) says where a partition starts for which the group has no offset yet.
    from_offsets : mapping of TopicAndPartition to int, optional
        The partitions to read, and at which offset each starts.

    Raises
    ------
    StreamError
        If a topic doesn't exist, or Kafka can't be reached, or refuses.

    Examples
    --------
    >>> planner = OffsetPlanner(spark, ["events"], {"bootstrap.servers": kafka.bootstrap_servers,
    ...                                             "auto.offset.reset": "earliest"})
    >>> planner.next_batch(max_per_partition=100)
    [OffsetRange(topic='events', partition=0, fromOffset=0, untilOffset=100)]
    """

    def __init__(
        self,
        spark: SparkSession,
        topics: Iterable[str],
        settings: Mapping[str, str],
        from_offsets: Mapping[TopicAndPartition, int] | None = None,
    ) -> None:
        self._jvm = spark._jvm
        self._topics = sorted(set(topics))
        self._settings = dict(settings)
        self._fixed_partitions = set(from_offsets or ())
        self._positions: dict[TopicAndPartition, int] = dict(from_offsets or {})
        self._starts: dict[TopicAndPartition, int] = dict(self._positions)
        self._ends: dict[TopicAndPartition, int] = {}
        self._lock = threading.RLock()  # a KafkaConsumer is for one thread at a time
        self._answer_time = self._jvm.java.time.Duration.ofSeconds(ANSWER_SECONDS)
        use_added_jars(spark)
        with self._errors_explained():
            self._consumer = self._jvm.org.apache.kafka.clients.consumer.KafkaConsumer(
                _java_map(self._jvm, {**self._settings, **_PLANNER_SETTINGS})
            )
        try:
            with self._errors_explained():
                self._look()
        except BaseException:
            self.close()
            raise

    @property
    def has_group(self) -> bool:
        """Whether there is a consumer group that offsets are committed to."""
        return bool(self._settings.get("group.id"))

    def next_batch(self, max_per_partition: int | None = None) -> list[OffsetRange]:
        """Return the ranges from where the last batch ended to where the topics end now.

        Parameters
        ----------
        max_per_partition : int, optional
            No more records than this of each partition.

        Returns
        -------
        list of OffsetRange
            Only ranges with records in them, sorted; none if nothing new has come.
        """
        with self._lock, self._errors_explained():
            self._look()
            ranges = []
            for partition, end in self._ends.items():
                start = self._positions[partition]
                until = end if max_per_partition is None else min(end, start + max_per_partition)
                if until > start:
                    ranges.append(OffsetRange(partition.topic, partition.partition, start, until))
                    self._positions[partition] = until
            return sorted(ranges)

    def commit(self, ranges: Iterable[OffsetRange]) -> None:
        """Commit the ends of the ranges to the consumer group."""
        metadata = self._jvm.org.apache.kafka.clients.consumer.OffsetAndMetadata
        ends = self._jvm.java.util.HashMap()
        for part in ranges:
            ends.put(self._java_partition(part.topicAndPartition()), metadata(part.untilOffset))
        with self._lock, self._errors_explained():
            self._consumer.commitSync(ends, self._answer_time)

    def ends(self) -> dict[TopicAndPartition, int]:
        """Return where the partitions ended when the last batch was planned."""
        with self._lock:
            return dict(self._ends)

    def starts(self) -> dict[TopicAndPartition, int]:
        """Return where the first batch began in each partition that is read."""
        with self._lock:
            return dict(self._starts)

    def close(self) -> None:
        """Let go of the connections to Kafka."""
        with self._lock:
            self._consumer.close(self._jvm.java.time.Duration.ofSeconds(1))

    def _look(self) -> None:
        """Find out where the partitions end now, and where the new ones among them begin."""
        partitions = sorted(self._fixed_partitions) or self._partitions()
        new = [partition for partition in partitions if partition not in self._positions]
        if new:
            starts = self._find_starts(new)
            self._starts.update(starts)
            self._positions.update(starts)
        self._ends = self._offsets(self._consumer.endOffsets, partitions)

    def _partitions(self) -> list[TopicAndPartition]:
        """Return the partitions that the topics have now; Kafka numbers them from 0."""
        found = []
        for topic in self._topics:
            partitions = self._consumer.partitionsFor(topic, self._answer_time)
            if not partitions:
                raise StreamError(
                    f"topic {topic!r} doesn't exist at {self._servers()}: check its name, or "
                    "create it and write to it first."
                )
            found += [TopicAndPartition(topic, number) for number in range(len(partitions))]
        return found

    def _find_starts(self, partitions: list[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return where partitions begin that the stream hasn't read from yet."""
        committed = self._committed(partitions) if self.has_group else {}
        never_read = [partition for partition in partitions if partition not in committed]
        # A partition that appears while the stream runs is read from its beginning: what was
        # written to it before it was noticed must not be lost.
        earliest = self._positions or self._settings.get("auto.offset.reset") == "earliest"
        ask = self._consumer.beginningOffsets if earliest else self._consumer.endOffsets
        return {**committed, **self._offsets(ask, never_read)}

    def _committed(self, partitions: list[TopicAndPartition]) -> dict[TopicAndPartition, int]:
        """Return the group's offsets, for those of the partitions that it has one for."""
        found = self._offsets(self._consumer.committed, partitions)
        return {partition: offset.offset() for partition, offset in found.items() if offset}

    def _offsets(
        self, ask: Callable[[Any, Any], Any], partitions: list[TopicAndPartition]
    ) -> dict[TopicAndPartition, Any]:
        """Ask the consumer one of its questions about offsets."""
        question = self._jvm.java.util.HashSet()
        for partition in partitions:
            question.add(self._java_partition(partition))
        answer = ask(question, self._answer_time)
        return {partition: answer.get(self._java_partition(partition)) for partition in partitions}

    @functools.cache  # noqa: B019 (a planner lives as long as its stream)
    def _java_partition(self, partition: TopicAndPartition) -> Any:
        return self._jvm.org.apache.kafka.common.TopicPartition(
            partition.topic, partition.partition
        )

    def _servers(self) -> str:
        return self._settings["bootstrap.servers"]

    @contextlib.contextmanager
    def _errors_explained(self) -> Iterator[None]:
        """Turn the JVM's exceptions into one sentence each."""
        try:
            yield
        except Py4JJavaError as error:
            raise StreamError(self._explain(error.java_exception)) from None

    def _explain(self, exception: Any) -> str:
        """Return what a Java exception means for the user."""
        # KafkaConsumer's constructor wraps the cause in "Failed to construct kafka consumer".
        while exception.getCause() is not None:
            exception = exception.getCause()
        name, message = exception.getClass().getSimpleName(), exception.getMessage()
        if name == "TimeoutException":
            return (
                f"Kafka at {self._servers()} gave no answer within {ANSWER_SECONDS} s: check the "
                f"address, that the broker runs, and that the security settings are its own."
            )
        return f"Kafka at {self._servers()} refuses: {message} ({name})"


class RangeReader:
    """Reads offset ranges with Spark's own Kafka source.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        A session with the Kafka connector.
    settings : mapping
        Settings of `KafkaConsumer` by Kafka's names.

    Examples
    --------
    >>> reader = RangeReader(spark, {"bootstrap.servers": kafka.bootstrap_servers})
    >>> reader.read([OffsetRange("events", 0, 0, 100)]).count()
    100
    """

    def __init__(self, spark: SparkSession, settings: Mapping[str, str]) -> None:
        self._spark = spark
        self._options = {
            f"kafka.{name}": value
            for name, value in {**_READER_SETTINGS, **settings}.items()
            if name not in _NOT_FOR_THE_READER
        }

    def read(self, ranges: Iterable[OffsetRange]) -> DataFrame:
        """Return the records of the ranges.

        Parameters
        ----------
        ranges : iterable of OffsetRange
            At least one, at most one a partition.

        Returns
        -------
        pyspark.sql.DataFrame
            The columns of Spark's Kafka source: key, value (binary), topic, partition, offset,
            timestamp, timestampType. Nothing is read before an action asks for it.
        """
        starts: dict[str, dict[str, int]] = defaultdict(dict)
        ends: dict[str, dict[str, int]] = defaultdict(dict)
        for part in ranges:
            starts[part.topic][str(part.partition)] = part.fromOffset
            ends[part.topic][str(part.partition)] = part.untilOffset
        assigned = {topic: sorted(map(int, partitions)) for topic, partitions in starts.items()}
        use_added_jars(self._spark)
        return (
            self._spark.read.format("kafka")
            .options(**self._options)
            .option("assign", json.dumps(assigned))
            .option("startingOffsets", json.dumps(starts))
            .option("endingOffsets", json.dumps(ends))
            .load()
        )


class KafkaDirectStream(TransformedDStream):
    """A DStream of the records of Kafka topics; `KafkaUtils.createDirectStream` makes it.

    As a DStream it holds what the `messageHandler` returns, ``(key, value)`` by default, made in
    Python. `foreachBatch` hands on DataFrames, which stay in the JVM.

    Each batch is the offset ranges that were planned for its interval. When all outputs of a batch
    have succeeded, its ranges are committed to the consumer group, in the order of the batches.
    When one has failed, the stream stops, and neither that batch nor a later one is committed: the
    next stream of the group begins with the batch that failed.
    """

    def __init__(
        self,
        ssc: StreamingContext,
        planner: OffsetPlanner,
        reader: RangeReader,
        to_element: Callable[[Row], Any],
        max_per_partition: int | None,
    ) -> None:
        self._planner = planner
        self._reader = reader
        self._max_per_partition = max_per_partition
        # The batches that aren't committed yet, in order: planned, and of these the succeeded ones.
        self._planned: OrderedDict[int, list[OffsetRange]] = OrderedDict()
        self._succeeded: set[int] = set()
        self._done: dict[TopicAndPartition, int] = {}
        self._failed = False
        self._finishing = False
        self._lock = threading.RLock()
        self._context = ssc
        super().__init__(
            _PlannedTicks(_ticks(ssc), self._plan),
            lambda batch_time, _: self._rdd(_batch_id(batch_time), to_element),
        )
        ssc.addStreamingListener(_BatchListener(self._batch_ended))
        _STREAMS.setdefault(ssc, []).append(self)

    def foreachBatch(  # noqa: N802 (named as in Structured Streaming)
        self, function: Callable[[DataFrame, int], None]
    ) -> None:
        """Call a function with each batch that has records.

        If it raises, it is called once more with the same records. If it raises again, the stream
        stops, `awaitTermination` raises, and the batch is not committed.

        Parameters
        ----------
        function : callable
            Takes ``(df, batch_id)``: a DataFrame with the columns of Spark's Kafka source, and the
            batch's time in milliseconds since 1970. It runs on the driver, one batch after the
            other; run one Spark action in it, for each action reads and computes everything anew.

        Examples
        --------
        >>> stream.foreachBatch(lambda df, batch_id: df.write.mode("append").parquet("events"))
        """

        def run(batch_time: datetime, _: RDD) -> None:
            batch_id = _batch_id(batch_time)
            ranges = self._ranges(batch_id)
            if not ranges or self._failed:
                return
            try:
                function(self._reader.read(ranges), batch_id)
            except Exception:
                if self._failed:  # the stream was stopped meanwhile
                    raise
                _LOGGER.warning("batch %s failed and is tried again", batch_id, exc_info=True)
                self._last_try(function, ranges, batch_id)

        self.prev.foreachRDD(run)

    def lag(self) -> int:
        """Return how many offsets that the topics had at the last interval are not done yet.

        Examples
        --------
        >>> stream.lag()
        100
        """
        ends, starts = self._planner.ends(), self._planner.starts()
        with self._lock:
            done = {**starts, **self._done}
        return sum(end - done[partition] for partition, end in ends.items())

    def finish(self, seconds: float) -> None:
        """Plan no more, and wait until the batches that are planned are committed.

        Parameters
        ----------
        seconds : float
            How long to wait at most.
        """
        self._finishing = True
        deadline = time.monotonic() + seconds
        while self._uncommitted() and not self._failed and time.monotonic() < deadline:
            time.sleep(0.05)

    def abandon(self) -> None:
        """Begin no further batch, and commit nothing more."""
        self._failed = True

    def close(self) -> None:
        """Let go of the connections to Kafka; `stop_streaming` calls this."""
        self._planner.close()

    def _last_try(
        self, function: Callable[[DataFrame, int], None], ranges: list[OffsetRange], batch_id: int
    ) -> None:
        """Call the function again; when it fails again, let no later batch begin."""
        try:
            function(self._reader.read(ranges), batch_id)
        except Exception:
            self._failed = True
            raise

    def _plan(self, batch_time: datetime) -> None:
        """Plan the batch of an interval."""
        if self._failed or self._finishing:
            return
        ranges = self._planner.next_batch(self._max_per_partition)
        with self._lock:
            self._planned[_batch_id(batch_time)] = ranges

    def _ranges(self, batch_id: int) -> list[OffsetRange]:
        with self._lock:
            return self._planned.get(batch_id, [])

    def _uncommitted(self) -> bool:
        with self._lock:
            return any(self._planned.values())

    def _rdd(self, batch_id: int, to_element: Callable[[Row], Any]) -> RDD:
        """Return a batch's records as Python objects."""
        ranges = self._ranges(batch_id)
        if not ranges:
            return self._sc.emptyRDD()
        return self._reader.read(ranges).rdd.map(to_element)

    def _batch_ended(self, batch_id: int, succeeded: bool) -> None:
        """Commit what can be committed now that a batch has ended."""
        with self._lock:
            if not succeeded:
                self._failed = True
            if self._failed:
                self._stop_context()
                return
            self._succeeded.add(batch_id)
            try:
                self._commit_in_order()
            except StreamError:
                _LOGGER.exception("the offsets of batch %s can't be committed", batch_id)
                self._failed = True
                self._stop_context()

    def _commit_in_order(self) -> None:
        """Commit the succeeded batches up to the first that has not succeeded yet."""
        while self._planned and next(iter(self._planned)) in self._succeeded:
            batch_id, ranges = next(iter(self._planned.items()))
            if ranges and self._planner.has_group:
                self._planner.commit(ranges)
            del self._planned[batch_id]
            self._succeeded.remove(batch_id)
            self._done.update({part.topicAndPartition(): part.untilOffset for part in ranges})

    def _stop_context(self) -> None:
        """Stop the streaming context, from a thread that it doesn't wait for."""
        stop = threading.Thread(target=stop_streaming, args=(self._context, False), daemon=True)
        stop.start()


class KafkaUtils:
    """How `pyspark.streaming.kafka` offered its streams, until Spark 2.4."""

    @staticmethod
    def createDirectStream(  # noqa: N802 (the API's name)
        ssc: StreamingContext,
        topics: list[str],
        kafkaParams: Mapping[str, str],  # noqa: N803
        fromOffsets: Mapping[TopicAndPartition, int] | None = None,  # noqa: N803
        keyDecoder: Callable[[bytes | None], Any] = utf8_decoder,  # noqa: N803
        valueDecoder: Callable[[bytes | None], Any] = utf8_decoder,  # noqa: N803
        messageHandler: Callable[[KafkaMessageAndMetadata], Any] | None = None,  # noqa: N803
    ) -> KafkaDirectStream:
        """Return a DStream of the records of some topics, without a receiver.

        Parameters
        ----------
        ssc : pyspark.streaming.StreamingContext
            The context that the stream is part of.
        topics : list of str
            The topics to read.
        kafkaParams : dict
            Settings of `KafkaConsumer` by Kafka's names, security included:
            ``bootstrap.servers`` (required), ``group.id`` (without it nothing is committed),
            ``auto.offset.reset`` (``latest`` by default). The names and values of Kafka 0.8
            (``metadata.broker.list``, ``smallest``, ``largest``) work too.
        fromOffsets : dict of TopicAndPartition to int, optional
            The partitions to read, and where each starts; by default all partitions, from where
            the group is.
        keyDecoder, valueDecoder : callable
            From the bytes of a key and a value (None if there are none) to Python objects.
        messageHandler : callable, optional
            From a `KafkaMessageAndMetadata` to the stream's element, instead of ``(key, value)``.

        Returns
        -------
        KafkaDirectStream
            A DStream of ``(key, value)``, or of what the message handler returns.

        Raises
        ------
        StreamError
            If a topic doesn't exist, or Kafka can't be reached, or refuses.
        ValueError
            If ``bootstrap.servers`` is missing.

        Notes
        -----
        The Spark setting ``spark.streaming.kafka.maxRatePerPartition`` (records a second) bounds
        how much of each partition goes into a batch.

        Examples
        --------
        >>> stream = KafkaUtils.createDirectStream(
        ...     ssc, ["events"], {"bootstrap.servers": kafka.bootstrap_servers})
        >>> stream.map(lambda record: record[1]).pprint()
        """
        settings = _modern_settings(kafkaParams)
        spark = SparkSession(ssc.sparkContext)

        def to_element(row: Row) -> Any:
            key = keyDecoder(None if row.key is None else bytes(row.key))
            value = valueDecoder(None if row.value is None else bytes(row.value))
            if messageHandler is None:
                return key, value
            return messageHandler(
                KafkaMessageAndMetadata(row.topic, row.partition, row.offset, key, value)
            )

        return KafkaDirectStream(
            ssc,
            OffsetPlanner(spark, topics, settings, fromOffsets),
            RangeReader(spark, settings),
            to_element,
            _max_per_partition(ssc),
        )


def new_streaming_context(spark: SparkSession, batch_seconds: float) -> StreamingContext:
    """Return a streaming context; one that is still running from an earlier cell is stopped.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose executors do the work.
    batch_seconds : float
        The interval of the micro-batches.

    Examples
    --------
    >>> ssc = new_streaming_context(spark, batch_seconds=1)
    """
    active = StreamingContext.getActive()
    if active is not None:
        stop_streaming(active, gracefully=False)
    with warnings.catch_warnings():
        # That DStreams are Spark's older streaming is for the text to say, not for a warning.
        warnings.simplefilter("ignore", FutureWarning)
        return StreamingContext(spark.sparkContext, batch_seconds)


def run_stream(ssc: StreamingContext, until: Callable[[], bool], timeout: float) -> None:
    """Start a streaming context, and stop it when a condition is true.

    However this ends (also by Ctrl-C or a kernel's interrupt), the context is stopped, and Spark
    goes on.

    Parameters
    ----------
    ssc : pyspark.streaming.StreamingContext
        A context whose outputs are set up.
    until : callable
        Is asked a few times a second; the stream ends when it returns true.
    timeout : float
        Seconds that this may take.

    Raises
    ------
    TimeoutError
        If the condition isn't true in time.
    StreamError
        If a batch failed, or the stream was stopped from elsewhere.

    Examples
    --------
    >>> stream.foreachBatch(lambda df, batch_id: print(df.count(), "records"))
    >>> run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    100 records
    """
    deadline = time.monotonic() + timeout
    done = False
    with _interrupt_noted() as interrupted:
        ssc.start()
        try:
            while not (done := until()):
                if interrupted.is_set():
                    ssc.sparkContext.cancelAllJobs()
                    raise KeyboardInterrupt
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"the stream was not done after {timeout:.0f} s and was stopped; what it "
                        "committed is kept. Give it more time, or look at Spark's log."
                    )
                if ssc.awaitTerminationOrTimeout(0.1):
                    raise StreamError("the stream was stopped before it was done.")
        except Py4JJavaError as error:
            raise StreamError(f"a batch failed, and the stream stopped: {_cause(error)}") from None
        finally:
            stop_streaming(ssc, gracefully=bool(done))


def stop_streaming(ssc: StreamingContext, gracefully: bool) -> None:
    """Stop a streaming context and its connections to Kafka, but not Spark.

    Parameters
    ----------
    ssc : pyspark.streaming.StreamingContext
        The context; it may have been stopped already.
    gracefully : bool
        Whether batches that are planned are finished, and committed.
    """
    streams = _STREAMS.pop(ssc, [])
    for stream in streams:
        if gracefully:
            # Spark tells of a batch's end a little later, and once stopped not at all.
            stream.finish(FINISH_SECONDS)
        else:
            stream.abandon()
    ssc.stop(stopSparkContext=False, stopGraceFully=gracefully)
    for stream in streams:
        stream.close()


def use_added_jars(spark: SparkSession) -> None:
    """Have this thread's Java find the jars that were added to a running session (`ADD JAR`)."""
    loader = spark._jsparkSession.sharedState().jarClassLoader()
    spark._jvm.java.lang.Thread.currentThread().setContextClassLoader(loader)


@contextlib.contextmanager
def _interrupt_noted() -> Iterator[threading.Event]:
    """Have the first Ctrl-C set an event, for it must not break into an exchange with Java.

    PySpark's own reaction does: it cancels the jobs from within whatever call is under way, and
    leaves the connection unusable. A second Ctrl-C interrupts as usual.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return
    usual = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, usual)


class _PlannedTicks(TransformedDStream):
    """A DStream without records that plans a batch each interval, exactly once.

    It is a class of its own because PySpark merges consecutive plain `TransformedDStream`s into
    one, which would plan once for each output.
    """

    def __init__(self, ticks: DStream, plan: Callable[[datetime], None]) -> None:
        def plan_and_pass_on(batch_time: datetime, rdd: RDD) -> RDD:
            plan(batch_time)
            return rdd

        super().__init__(ticks, plan_and_pass_on)


class _BatchListener(StreamingListener):
    """Reports the end of each batch: which, and whether all its outputs succeeded."""

    def __init__(self, batch_ended: Callable[[int, bool], None]) -> None:
        super().__init__()
        self._batch_ended = batch_ended

    def onBatchCompleted(self, batchCompleted: Any) -> None:  # noqa: N802, N803
        info = batchCompleted.batchInfo()
        outputs = info.outputOperationInfos()
        succeeded = all(outputs[number].failureReason() is None for number in outputs)
        self._batch_ended(info.batchTime().milliseconds(), succeeded)


def _batch_id(batch_time: datetime) -> int:
    """Return a batch's time in milliseconds; a local time would come twice when clocks go back."""
    return round(batch_time.timestamp() * 1000)


def _ticks(ssc: StreamingContext) -> DStream:
    """Return a DStream with an empty RDD each interval: the lines of new files, in no folder."""
    folder = scratch_folder() / "ticks"
    folder.mkdir(exist_ok=True)
    return ssc.textFileStream(f"file://{folder}")


def _modern_settings(kafka_params: Mapping[str, str]) -> dict[str, str]:
    """Return the settings with the names and values that today's Kafka has for them."""
    settings = {_OLD_NAMES.get(name, name): str(value) for name, value in kafka_params.items()}
    if not settings.get("bootstrap.servers"):
        raise ValueError(
            "kafkaParams has no 'bootstrap.servers': add the brokers' addresses, such as "
            "{'bootstrap.servers': '127.0.0.1:9092'}."
        )
    reset = settings.get("auto.offset.reset", "latest")
    settings["auto.offset.reset"] = _OLD_RESETS.get(reset, reset)
    return settings


def _max_per_partition(ssc: StreamingContext) -> int | None:
    """Return how many records of each partition a batch may have, from Spark's settings."""
    rate = ssc.sparkContext.getConf().get("spark.streaming.kafka.maxRatePerPartition", "0")
    interval = ssc._jssc.ssc().graph().batchDuration().milliseconds() / 1000
    return max(1, int(float(rate) * interval)) if float(rate) > 0 else None


def _java_map(jvm: Any, settings: Mapping[str, str]) -> Any:
    result = jvm.java.util.HashMap()
    for name, value in settings.items():
        result.put(name, value)
    return result


def _cause(error: Py4JJavaError) -> str:
    """Return the last line of a Python traceback that came through Java, or Java's own message."""
    message = error.java_exception.getMessage() or str(error.java_exception)
    return message.strip().splitlines()[-1]
