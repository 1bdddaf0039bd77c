"""The stream: a DStream whose batches are planned offset ranges of Kafka topics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

from pyspark import RDD
from pyspark.sql import DataFrame, Row
from pyspark.streaming import DStream, StreamingContext
from pyspark.streaming.dstream import TransformedDStream

from helpers.spark import scratch_folder
from helpers.streaming.batches import Batches, batch_id_of
from helpers.streaming.offsets import OffsetRange, PlannedBatch, TopicAndPartition


class KafkaRDD(RDD):
    """An RDD of Kafka records that knows its offset ranges.

    The functions passed to `transform` and `foreachRDD` of a Kafka stream get one; an RDD derived
    from it, for example by `map`, no longer knows the ranges.
    """

    def __init__(self, rdd: RDD, ranges: Iterable[OffsetRange]) -> None:
        super().__init__(rdd._jrdd, rdd.ctx, rdd._jrdd_deserializer)
        self._ranges = sorted(ranges)

    def offsetRanges(self) -> list[OffsetRange]:  # noqa: N802 (the API's name)
        """Return the offset ranges of the records, sorted.

        Examples
        --------
        >>> from helpers.streaming import KafkaUtils
        >>> settings = {"bootstrap.servers": kafka.bootstrap_servers}
        >>> rdd = KafkaUtils.createRDD(
        ...     spark.sparkContext, settings, [OffsetRange("events", 0, 10, 20)])
        >>> rdd.offsetRanges()
        [OffsetRange(topic='events', partition=0, fromOffset=10, untilOffset=20)]
        """
        return list(self._ranges)


class KafkaDirectStream(TransformedDStream):
    """A DStream of the records of Kafka topics, created by `KafkaUtils.createDirectStream`.

    Its elements are what the `messageHandler` returns, by default ``(key, value)``, and are made in
    Python. `foreachBatch` passes on DataFrames, which stay in the JVM.

    Each batch consists of the offset ranges that were planned for its interval. When all outputs of
    a batch have succeeded, its ranges are committed to the consumer group, in the order of the
    batches. When an output fails (in `foreachBatch`: twice), the stream stops, and neither that
    batch nor a later one is committed: the next stream of the group begins with the failed batch.

    With a checkpoint (`StreamingContext.getOrCreate`), the ranges of each batch are stored there
    before they are used. A restarted driver repeats the unfinished batches with the same ranges,
    and resumes after them, with or without a group. The checkpoint holds the settings, passwords
    included: let no one else read its folder.
    """

    def __init__(
        self, ssc: StreamingContext, batches: Batches, to_element: Callable[[Row], Any]
    ) -> None:
        self._batches = batches
        super().__init__(
            _PlannedTicks(_ticks(ssc), batches.plan),
            lambda batch_time, _: batches.elements(batch_time, to_element),
        )

    def foreachBatch(  # noqa: N802 (named as in Structured Streaming)
        self, function: Callable[[DataFrame, int], None]
    ) -> None:
        """Call a function with each batch that has records.

        If it raises, it is retried once with the same records. If it raises again, the stream
        stops, `awaitTermination` raises, and the batch is not committed.

        Parameters
        ----------
        function : callable
            Takes ``(df, batch_id)``: a DataFrame with the columns of Spark's Kafka source, and the
            batch's time in milliseconds since 1970. It runs on the driver, one batch at a time. Run
            a single Spark action in it, because each action reads and computes everything again.

        Examples
        --------
        >>> stream.foreachBatch(lambda df, batch_id: df.write.mode("append").parquet("events"))
        """
        self.for_each_planned_batch(lambda batch: function(batch.records, batch.batch_id))

    def for_each_planned_batch(self, function: Callable[[PlannedBatch], None]) -> None:
        """Call a function with each batch and its offset ranges, otherwise as `foreachBatch` does.

        Parameters
        ----------
        function : callable
            Takes a `PlannedBatch`.
        """
        batches = self._batches
        self.prev.foreachRDD(lambda batch_time, _: batches.run(function, batch_time))

    def foreachRDD(self, func: Callable) -> None:  # noqa: N802 (Spark's name)
        """Call a function with each batch's `KafkaRDD`, or with its time and the RDD.

        Parameters
        ----------
        func : callable
            Takes ``rdd`` or ``(time, rdd)``, the time as a `datetime.datetime`.

        Examples
        --------
        >>> stream.foreachRDD(lambda rdd: print(rdd.offsetRanges()))
        """
        super().foreachRDD(self._with_ranges(func))

    def transform(self, func: Callable) -> TransformedDStream:
        """Return a DStream of a function's results for the `KafkaRDD` of each batch.

        Parameters
        ----------
        func : callable
            Takes ``rdd`` or ``(time, rdd)``, the time as a `datetime.datetime`.

        Examples
        --------
        >>> stream.transform(lambda rdd: rdd.map(lambda record: record[1])).count().pprint()
        """
        batches, call = self._batches, self._with_ranges(func)

        def make(batch_time: datetime, rdd: RDD) -> RDD:
            try:
                return call(batch_time, rdd)
            except Exception as error:  # Spark itself would continue with the next interval
                batches.not_made(batch_time, error)
                raise

        return super().transform(make)

    def commitAsync(self, ranges: Iterable[OffsetRange]) -> None:  # noqa: N802 (Spark's name)
        """Commit offset ranges once the running batch has succeeded.

        Parameters
        ----------
        ranges : iterable of OffsetRange
            As returned by `KafkaRDD.offsetRanges`; a commit never moves the group back.

        Raises
        ------
        StreamError
            Unless the stream has a ``group.id``, and ``enable.auto.commit`` is false.

        Examples
        --------
        >>> stream.commitAsync([OffsetRange("events", 0, 0, 100)])
        Traceback (most recent call last):
        ...
        helpers.streaming.errors.StreamError: commitAsync is for streams with a group.id whose ...
        """
        self._batches.ledger.ask(ranges)

    def topic_ids(self) -> dict[str, str]:
        """Ask Kafka for the ids of the stream's topics, by name.

        Raises
        ------
        StreamError
            If a topic was deleted, or deleted and created again, since the stream began.

        Examples
        --------
        >>> list(stream.topic_ids())
        ['events']
        """
        return self._batches.source.planner.topic_ids_now()

    def positions(self) -> dict[TopicAndPartition, int]:
        """Return where the next batch to be planned begins in each partition.

        Examples
        --------
        >>> stream.positions()
        {TopicAndPartition(topic='events', partition=0): 0}
        """
        return self._batches.source.planner.positions()

    def finished(self) -> dict[TopicAndPartition, int]:
        """Return nothing: a direct stream keeps plans, and leaves what is stored to the sink."""
        return {}

    def ends(self) -> dict[TopicAndPartition, int]:
        """Return where the partitions ended at the last interval.

        Examples
        --------
        >>> stream.ends()
        {TopicAndPartition(topic='events', partition=0): 100}
        """
        return self._batches.source.planner.ends()

    def has_done(self, ends: Mapping[TopicAndPartition, int]) -> bool:
        """Return whether all batches with offsets before the given ones are done.

        Parameters
        ----------
        ends : mapping of TopicAndPartition to int
            An offset of each partition, such as one of `ends`.

        Examples
        --------
        >>> stream.has_done(stream.ends())
        False
        """
        return self._batches.ledger.has_done(ends)

    def lag(self) -> int:
        """Return how many of the offsets available at the last interval are not done yet.

        Examples
        --------
        >>> stream.lag()
        100
        """
        return self._batches.ledger.lag()

    def lag_after(self, batch_id: int) -> int:
        """Return the `lag` that remains when a batch and all before it are done.

        The batch's function can call this, before the batch is committed.

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
        return self._batches.ledger.lag_after(batch_id)

    def _with_ranges(self, func: Callable) -> Callable[[datetime, RDD], Any]:
        """Return a function of time and RDD that calls another with a `KafkaRDD`."""
        batches = self._batches
        takes_time = _takes_time(func)

        def call(batch_time: datetime, rdd: RDD) -> Any:
            kafka_rdd = KafkaRDD(rdd, batches.ledger.ranges(batch_id_of(batch_time)))
            return func(batch_time, kafka_rdd) if takes_time else func(kafka_rdd)

        return call


def _takes_time(func: Callable) -> bool:
    """Return whether a function is called with a batch's time and RDD, not with the RDD alone.

    As in Spark, exactly one positional parameter, with or without a default, means the RDD alone.
    Unlike Spark, this inspects any callable, and wrappers that pass on all their arguments.
    """
    variadic = inspect.Parameter.VAR_POSITIONAL
    parameters = inspect.signature(func, follow_wrapped=False).parameters.values()
    if variadic in (parameter.kind for parameter in parameters):
        parameters = inspect.signature(func).parameters.values()
    named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(parameter.kind in named for parameter in parameters) != 1


class _PlannedTicks(TransformedDStream):
    """A DStream without records that plans a batch each interval, exactly once.

    It is a separate class because PySpark merges consecutive plain `TransformedDStream`s into one,
    which would plan once for each output.
    """


def _ticks(ssc: StreamingContext) -> DStream:
    """Return a DStream with an empty RDD each interval: the new files of a missing folder.

    Spark checks the folder at each interval, so this also works after recovery on another machine.
    """
    return ssc.textFileStream(f"file://{scratch_folder()}/no-files")
