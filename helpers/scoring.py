"""From a stream to a sink: the one place that joins a source, a function, a sink and a monitor.

    with ParquetSink(spark, path, signal_index=0) as sink:
        score_stream(stream, process_instances, sink, monitor)
        run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)

The function takes a DataFrame of Kafka records and returns a DataFrame of scored events. All else
is done here, in the same way for a DStream and for a Structured Streaming query.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from pyspark.sql import DataFrame

from helpers.monitor import Batch, Monitor
from helpers.records import keep_bad_records
from helpers.sinks import ParquetSink, check_topics
from helpers.streaming import PlannedBatch, TopicAndPartition

Score = Callable[[DataFrame], DataFrame]


class Source(Protocol):
    """Where batches come from: a `KafkaDirectStream` or a `KafkaQuery`."""

    def for_each_planned_batch(self, function: Callable[[PlannedBatch], None]) -> None:
        """Call a function with each batch."""

    def topic_ids(self) -> Mapping[str, str]:
        """Ask Kafka for the ids of the topics now, by their names."""

    def positions(self) -> Mapping[TopicAndPartition, int]:
        """Return where the next batch begins in each partition."""

    def lag_after(self, batch_id: int) -> int:
        """Return how many offsets are left when a batch is done."""


class Scoring:
    """What `score_stream` has set up.

    Attributes
    ----------
    offsets_done : int
        How many offsets its batches had so far; they are all in the sink.
    """

    def __init__(
        self, source: Source, score: Score, sink: ParquetSink, monitor: Monitor | None
    ) -> None:
        self._source, self._score, self._sink, self._monitor = source, score, sink, monitor
        self.offsets_done = 0

    def process(self, batch: PlannedBatch) -> None:
        """Score, store and count a batch, unless it is stored already; the stream calls this."""
        if self._sink.left(batch.ranges):
            self._process(batch)
        self.offsets_done += sum(part.count() for part in batch.ranges)

    def _process(self, batch: PlannedBatch) -> None:
        began = time.monotonic()
        scored = keep_bad_records(self._score(batch.records))
        counts = self._sink.write(
            scored, batch.ranges, lambda: check_topics(batch.ranges, self._source.topic_ids())
        )
        seconds = time.monotonic() - began
        if self._monitor is not None:
            lag = self._source.lag_after(batch.batch_id)
            figures = Batch(
                batch.batch_id, counts.events, counts.signal, counts.bad, seconds, lag
            )
            self._monitor.add(figures, counts.unused)


def score_stream(
    source: Source, score: Score, sink: ParquetSink, monitor: Monitor | None = None
) -> Scoring:
    """Score the batches of a stream into a sink, each event once, when the stream runs.

    Parameters
    ----------
    source : Source
        A `KafkaDirectStream` or a `KafkaQuery`, which doesn't run yet.
    score : callable
        Takes a DataFrame with the columns of Spark's Kafka source. Returns it with the column
        ``event`` of `helpers.records.parse_events`, with ``prediction`` (a vector of two) and with
        ``predicted_index``; all in one pass, because each Spark action would score anew.
    sink : ParquetSink
        Where the scored events go; it is open.
    monitor : Monitor, optional
        Shows the batches.

    Returns
    -------
    Scoring
        Knows how far the stream is.

    Raises
    ------
    SinkError
        If the sink has a stream already, or is of another topic with the same name.

    Examples
    --------
    >>> from helpers.model import build_model
    >>> from helpers.records import parse_events
    >>> from helpers.streaming import run_stream
    >>> from helpers.transformers import LabelIndexTransformer, ModelPredictor
    >>> predictor = ModelPredictor(keras_model=build_model(), features_col="event")
    >>> def process_instances(records):
    ...     return LabelIndexTransformer().transform(predictor.predict(parse_events(records)))
    >>> path = str(getfixture("tmp_path") / "scored")
    >>> with ParquetSink(spark, path, signal_index=0, on_bad_record="skip") as sink:
    ...     scoring = score_stream(stream, process_instances, sink)
    ...     run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    ...     scoring.offsets_done
    100
    """
    sink.begin(source.positions(), source.topic_ids())
    scoring = Scoring(source, score, sink, monitor)
    if monitor is not None:
        monitor.begin()
    source.for_each_planned_batch(scoring.process)
    return scoring
