"""Limits the size of batches by Spark's settings, as Spark's direct stream does."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pyspark import SparkContext

from helpers.streaming.offsets import TopicAndPartition

_PREFIX = "spark.streaming"


class RateLimit:
    """Limits the size of a stream's batches by the settings of its Spark session.

    ``spark.streaming.kafka.maxRatePerPartition``
        The most records per second and partition (default 0: no limit).
    ``spark.streaming.kafka.minRatePerPartition``
        The fewest records per partition, even if another limit is lower (default 1).
    ``spark.streaming.backpressure.enabled``
        Whether to read only as many records as the stream can process, by an estimate from its
        completed batches.
    ``spark.streaming.backpressure.initialRate``
        Records per second until there is an estimate (default 0: no limit).

    Parameters
    ----------
    context : pyspark.SparkContext
        The context with the settings.
    interval : float
        The interval of the micro-batches, in seconds.

    References
    ----------
    Spark 4.2's ``DirectKafkaInputDStream.maxMessagesPerPartition`` and ``RateController``; Spark's
    ``PIDRateEstimator`` makes the estimate, with its ``spark.streaming.backpressure.pid`` settings.

    Examples
    --------
    >>> limit = RateLimit(spark.sparkContext, interval=1.0)
    >>> limit.most({TopicAndPartition("events", 0): 100})
    {TopicAndPartition(topic='events', partition=0): 100}
    """

    def __init__(self, context: SparkContext, interval: float) -> None:
        self._conf = context.getConf()
        self._interval = interval
        self._max = self._number("kafka.maxRatePerPartition", 0) or math.inf
        self._min = self._number("kafka.minRatePerPartition", 1)
        self._initial = self._number("backpressure.initialRate", 0)
        self._rate = 0.0  # records per second, of all partitions; 0 if unknown
        self._estimator = None
        if self._conf.get(f"{_PREFIX}.backpressure.enabled", "false").lower() == "true":
            self._rate = self._initial
            rate = context._jvm.org.apache.spark.streaming.scheduler.rate
            self._estimator = rate.PIDRateEstimator(
                round(interval * 1000),
                self._number("backpressure.pid.proportional", 1.0),
                self._number("backpressure.pid.integral", 0.2),
                self._number("backpressure.pid.derived", 0.0),
                self._number("backpressure.pid.minRate", 100),
            )

    def most(self, left: Mapping[TopicAndPartition, int]) -> dict[TopicAndPartition, int]:
        """Return how many offsets of each partition the next batch may have.

        Parameters
        ----------
        left : mapping of TopicAndPartition to int
            How many offsets are left in each partition.
        """
        total, rate, most = sum(left.values()), self._rate, dict(left)
        for partition, count in left.items():
            # A partition's share of the rate is its share of the offsets that are left.
            share = rate * count / total if rate and total else math.inf
            if min(share, self._max) < math.inf:
                allowed = int(min(share, self._max) * self._interval)
                most[partition] = max(allowed, int(self._min))
        return most

    def completed(self, records: int, ended: int, processing: int, waiting: int) -> None:
        """Update the estimate with a completed batch.

        Parameters
        ----------
        records : int
            How many offsets it had.
        ended : int
            When it ended, in milliseconds since 1970.
        processing, waiting : int
            How long it took, and how long it waited before, in milliseconds.
        """
        if self._estimator is None:
            return
        estimate = self._estimator.compute(ended, records, processing, waiting)
        if estimate.isDefined():
            self._rate = int(estimate.get()) or self._initial

    def _number(self, name: str, default: float) -> float:
        return float(self._conf.get(f"{_PREFIX}.{name}", str(default)))
