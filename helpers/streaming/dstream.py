"""The stream: plans a batch each interval, hands it on, and commits it when it has succeeded."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pyspark import RDD
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.streaming import DStream, StreamingContext, StreamingListener
from pyspark.streaming.dstream import TransformedDStream

from helpers.broker import check_address
from helpers.session import scratch_folder
from helpers.streaming.offsets import (
    ANSWER_SECONDS,
    BrokerAwayError,
    OffsetPlanner,
    OffsetRange,
    TopicAndPartition,
    remedy,
)
from helpers.streaming.reader import RangeReader

_LOGGER = logging.getLogger(__name__)

# How long the broker may be away while a stream runs.
AWAY_SECONDS = 60

# How long a stop waits for the running batch's function, once its jobs are cancelled.
ABANDON_SECONDS = 10

_OLD_NAMES = {"metadata.broker.list": "bootstrap.servers"}
_OLD_RESETS = {"smallest": "earliest", "largest": "latest"}


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


class KafkaDirectStream(TransformedDStream):
    """A DStream of the records of Kafka topics; `KafkaUtils.createDirectStream` makes it.

    As a DStream it holds what the `messageHandler` returns, ``(key, value)`` by default, made in
    Python. `foreachBatch` hands on DataFrames, which stay in the JVM.

    Each batch is the offset ranges that were planned for its interval. When all outputs of a batch
    have succeeded, its ranges are committed to the consumer group, in the order of the batches.
    When one has failed (in `foreachBatch`: twice), the stream stops, and neither that batch nor a
    later one is committed: the next stream of the group begins with the batch that failed.
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
        self._lock = threading.RLock()  # of the three above
        self._planning = threading.RLock()
        self._finishing = False  # nothing more is to be planned
        self._stopped = False  # nothing more is to begin, or to be committed
        self._abandoned = False  # and that is so because somebody asked for it
        self._batches_running = 0
        self._error: str | None = None
        self._away_since: float | None = None  # when the broker was last there, if it is away
        self._context = ssc
        self._job_group = f"kafka-stream-{id(self)}"
        super().__init__(
            _PlannedTicks(_ticks(ssc), self._plan),
            lambda batch_time, _: self._rdd(_batch_id(batch_time), to_element),
        )
        ssc.addStreamingListener(_BatchListener(self._batch_ended))
        streams_of(ssc).append(self)

    @property
    def error(self) -> str | None:
        """Why the stream has stopped by itself; None while it has not."""
        return self._error

    @property
    def is_waiting(self) -> bool:
        """Whether the broker is away, and the stream waits for it, for 60 s at most."""
        return self._away_since is not None and not self._stopped

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
            if not ranges or self._stopped:
                return
            self._sc.setJobGroup(self._job_group, f"batch {batch_id}")
            self._batches_running += 1
            try:
                self._call(function, ranges, batch_id)
            finally:
                self._batches_running -= 1

        self.prev.foreachRDD(run)

    def lag(self) -> int:
        """Return how many offsets that the topics had at the last interval are not done yet.

        Examples
        --------
        >>> stream.lag()
        100
        """
        return self._left_after([])

    def lag_after(self, batch_id: int) -> int:
        """Return what `lag` will be when a batch and those before it are done.

        The batch's own function can ask this, when the batch is not committed yet.

        Parameters
        ----------
        batch_id : int
            The batch's time in milliseconds since 1970.

        Examples
        --------
        >>> from helpers.streaming import run_stream
        >>> stream.foreachBatch(lambda df, batch_id: print(stream.lag_after(batch_id), "are left"))
        >>> run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
        0 are left
        """
        with self._lock:
            return self._left_after([planned for planned in self._planned if planned <= batch_id])

    def finish(self, seconds: float) -> bool:
        """Plan no more, and wait until the batches that are planned are committed.

        Parameters
        ----------
        seconds : float
            How long to wait at most.

        Returns
        -------
        bool
            Whether they are.
        """
        with self._planning:
            self._finishing = True
        deadline = time.monotonic() + seconds
        while self._uncommitted() and not self._stopped and time.monotonic() < deadline:
            time.sleep(0.05)
        return not self._uncommitted()

    def abandon(self) -> None:
        """Begin no further batch, commit nothing more, and end the jobs of the batch that runs."""
        self._stopped = self._abandoned = True
        # Again and again, for the batch's function may be about to start its next job.
        deadline = time.monotonic() + ABANDON_SECONDS
        while self._batches_running and time.monotonic() < deadline:
            self._sc.cancelJobGroup(self._job_group)
            time.sleep(0.05)

    def close(self) -> None:
        """Let go of the connections to Kafka; `stop_streaming` calls this."""
        self._planner.close()

    def _call(
        self, function: Callable[[DataFrame, int], None], ranges: list[OffsetRange], batch_id: int
    ) -> None:
        """Call the function, if it fails once more; when that fails, let no later batch begin."""
        try:
            function(self._reader.read(ranges), batch_id)
        except Exception:
            if self._stopped:
                raise
            _LOGGER.warning("batch %s failed and is tried again", batch_id, exc_info=True)
            try:
                function(self._reader.read(ranges), batch_id)
            except Exception:
                self._stopped = True
                raise

    def _plan(self, batch_time: datetime) -> None:
        """Plan the batch of an interval."""
        with self._planning:
            if self._stopped or self._finishing:
                return
            try:
                ranges = self._planner.next_batch(self._max_per_partition)
                self._away_since = None
            except BrokerAwayError as error:
                ranges = []
                self._wait_for_the_broker(error)
            except Exception as error:
                self._fail(f"the next batch can't be planned: {error}")
                raise
            with self._lock:
                self._planned[_batch_id(batch_time)] = ranges

    def _wait_for_the_broker(self, error: BrokerAwayError) -> None:
        """Let an interval pass without records, until the broker has been away for too long."""
        if self._away_since is None:
            self._away_since = time.monotonic() - ANSWER_SECONDS
            _LOGGER.warning("%s The stream waits for %s s.", error, AWAY_SECONDS)
        if time.monotonic() - self._away_since >= AWAY_SECONDS:
            self._fail(f"the broker has been away for {AWAY_SECONDS} s. {error}")
            raise error

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
        try:
            return self._reader.read(ranges).rdd.map(to_element)
        except Exception as error:
            self._fail(f"batch {batch_id} can't be read: {error}")
            raise

    def _batch_ended(self, batch_id: int, failure: str | None) -> None:
        """Commit what can be committed now that a batch has ended."""
        if self._abandoned or (self._stopped and failure is None):
            return
        if failure is not None:
            self._fail(f"batch {batch_id} failed: {failure}{remedy(failure)}")
            return
        with self._lock:
            self._succeeded.add(batch_id)
        try:
            while (ready := self._next_to_commit()) is not None:
                self._commit(*ready)
        except Exception as error:
            self._fail(f"batch {batch_id} can't be committed: {error}")

    def _left_after(self, batch_ids: Iterable[int]) -> int:
        """Return how many offsets are left when some planned batches are done, in their order."""
        with self._lock:
            done = dict(self._done)
            for batch_id in batch_ids:
                done.update(_ends(self._planned[batch_id]))
            # Asked last and in this order, each knows at least what the one before it does.
            ends = self._planner.ends()
            done = {**self._planner.starts(), **done}
        return sum(end - done[partition] for partition, end in ends.items())

    def _next_to_commit(self) -> tuple[int, dict[TopicAndPartition, int]] | None:
        """Return the first planned batch and where it ends, if it has succeeded."""
        with self._lock:
            batch_id = next(iter(self._planned), None)
            if batch_id not in self._succeeded:
                return None
            ranges = self._planned[batch_id]
        return batch_id, _ends(ranges)

    def _commit(self, batch_id: int, ends: dict[TopicAndPartition, int]) -> None:
        """Commit a batch, and wait for a broker that is away, but not for ever."""
        deadline = time.monotonic() + AWAY_SECONDS
        while ends:
            try:
                # All partitions, for Kafka forgets the offsets of those that are long idle.
                self._planner.commit({**self._planner.starts(), **self._done, **ends})
                break
            except BrokerAwayError:
                if self._stopped or time.monotonic() > deadline:
                    raise
        with self._lock:
            del self._planned[batch_id]
            self._succeeded.remove(batch_id)
            self._done.update(ends)

    def _fail(self, reason: str) -> None:
        """Stop the context for a reason that `awaitTermination` and `run_stream` then raise."""
        if self._error is not None:
            return
        self._error, self._stopped = reason, True
        _LOGGER.error("the stream stops: %s", reason)
        jvm = self._sc._jvm
        scheduler = self._context._jssc.ssc().scheduler()
        scheduler.reportError(reason, jvm.java.lang.RuntimeException(reason))
        # From a thread that the context doesn't wait for.
        threading.Thread(target=self._stop_after_failure, daemon=True).start()

    def _stop_after_failure(self) -> None:
        """End the batch that runs, for its tasks may wait for a broker, and stop the context."""
        self.abandon()
        self._context.stop(False, False)


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
            If ``bootstrap.servers`` is missing or has no port, or ``auto.offset.reset`` is neither.

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
        spark = SparkSession.getActiveSession() or SparkSession(ssc.sparkContext)

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
    """Reports the end of each batch: which, and why one of its outputs failed, if one did."""

    def __init__(self, batch_ended: Callable[[int, str | None], None]) -> None:
        super().__init__()
        self._batch_ended = batch_ended

    def onBatchCompleted(self, batchCompleted: Any) -> None:  # noqa: N802, N803
        """Report a batch's end; Spark calls this."""
        info = batchCompleted.batchInfo()
        outputs = info.outputOperationInfos()
        failures = [outputs[number].failureReason() for number in outputs]
        failure = next((summary(reason) for reason in failures if reason is not None), None)
        self._batch_ended(info.batchTime().milliseconds(), failure)


def streams_of(ssc: StreamingContext) -> list[KafkaDirectStream]:
    """Return the list of a context's Kafka streams."""
    return ssc.__dict__.setdefault("_kafka_streams", [])


def summary(message: str) -> str:
    """Return the line of a traceback, Python's or Java's, that names the error.

    Examples
    --------
    >>> lines = ["Traceback (most recent call last):", "  1 / 0", "ZeroDivisionError: by zero"]
    >>> summary(chr(10).join(lines))
    'ZeroDivisionError: by zero'
    """
    lines = message.strip().splitlines() or [""]
    naming = [line for line in lines if re.match(r"(: )?[\w.$]+(Error|Exception)\b", line)]
    return (naming or lines)[-1].strip(": ")


def _ends(ranges: Iterable[OffsetRange]) -> dict[TopicAndPartition, int]:
    """Return where ranges end, by their partitions."""
    return {part.topicAndPartition(): part.untilOffset for part in ranges}


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
    settings = {
        _OLD_NAMES.get(name, name): str(value)
        for name, value in kafka_params.items()
        if value is not None
    }
    if not settings.get("bootstrap.servers"):
        raise ValueError(
            "kafkaParams has no 'bootstrap.servers': add the brokers' addresses, such as "
            "{'bootstrap.servers': '127.0.0.1:9092'}."
        )
    check_address(settings["bootstrap.servers"])
    reset = settings.get("auto.offset.reset", "latest")
    settings["auto.offset.reset"] = _OLD_RESETS.get(reset, reset)
    if settings["auto.offset.reset"] not in _OLD_RESETS.values():
        raise ValueError(f"'auto.offset.reset' is {reset!r}: it must be 'earliest' or 'latest'.")
    return settings


def _max_per_partition(ssc: StreamingContext) -> int | None:
    """Return how many records of each partition a batch may have, from Spark's settings."""
    rate = ssc.sparkContext.getConf().get("spark.streaming.kafka.maxRatePerPartition", "0")
    interval = ssc._jssc.ssc().graph().batchDuration().milliseconds() / 1000
    return max(1, int(float(rate) * interval)) if float(rate) > 0 else None
