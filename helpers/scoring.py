"""Score a stream into a sink: the one place that joins source, function, sink and monitor.

    with ParquetSink(spark, path, signal_index=0) as sink:
        score_stream(stream, process_instances, sink, monitor)
        run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)

The function takes a DataFrame of Kafka records and returns a DataFrame of scored events. This
module does everything else, in the same way for DStreams and Structured Streaming.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection

from pyspark.sql import DataFrame

from helpers.monitor import Batch, Monitor
from helpers.records import keep_bad_records
from helpers.sinks import ParquetSink, SinkError, check_topics
from helpers.streaming import KafkaDirectStream, KafkaQuery, PlannedBatch

_LOGGER = logging.getLogger(__name__)

Score = Callable[[DataFrame], DataFrame]
Source = KafkaDirectStream | KafkaQuery


class Scoring:
    """A stream's scoring, as set up by `score_stream`.

    Attributes
    ----------
    offsets_done : int
        The number of offsets in its batches so far, all of which are in the sink.
    """

    def __init__(
        self, source: Source, score: Score, sink: ParquetSink, monitor: Monitor | None
    ) -> None:
        self._source, self._score, self._sink, self._monitor = source, score, sink, monitor
        self.offsets_done = 0

    def process(self, batch: PlannedBatch) -> None:
        """Score, store and count a batch, unless it is already stored; the stream calls this."""
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
            figures = Batch(
                batch.batch_id, counts.events, counts.signal, counts.bad, seconds,
                self._lag_after(batch.batch_id), batch.planned_at,
            )  # fmt: skip
            self._show(figures, counts.unused)

    def _show(self, figures: Batch, unused: Collection[str]) -> None:
        try:
            self._monitor.add(figures, unused)
        except Exception as error:  # the batch is stored: it must not be tried again
            _LOGGER.warning("batch %d can't be shown: %s", figures.batch_id, error)

    def _lag_after(self, batch_id: int) -> int | None:
        """Return the lag after a batch; None if it can't be found out."""
        try:
            return self._source.lag_after(batch_id)
        except Exception as error:  # the batch is stored: it must not be tried again
            _LOGGER.warning("the lag after batch %d is unknown: %s", batch_id, error)
            return None


def score_stream(
    source: Source, score: Score, sink: ParquetSink, monitor: Monitor | None = None
) -> Scoring:
    """Score a stream's batches into a sink, each event exactly once, while the stream runs.

    Parameters
    ----------
    source : Source
        A `KafkaDirectStream` or a `KafkaQuery` that is not running yet.
    score : callable
        Takes a DataFrame with the columns of Spark's Kafka source. Returns it with the columns
        ``event`` from `helpers.records.parse_events`, ``prediction`` (a vector of two) and
        ``predicted_index``. It must not trigger a Spark action, because each action scores the
        batch again.
    sink : ParquetSink
        An open sink for the scored events.
    monitor : Monitor, optional
        Displays the batches.

    Returns
    -------
    Scoring
        Reports the stream's progress.

    Raises
    ------
    SinkError
        If the sink already has a stream, or holds events of another topic with the same name; or
        if a query's checkpoint has batches that the sink lacks, which would never be stored.
    StreamError
        If a topic was deleted, or deleted and created again, since the stream began.
    ValueError
        If the monitor shows another running stream.

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
    topic_ids = source.topic_ids()
    stored = sink.positions(topic_ids)
    if any(stored.get(part, 0) < end for part, end in source.finished().items()):
        raise SinkError(
            f"the checkpoint is ahead of {sink.path}: give the output that belongs to it, or a new "
            "checkpoint."
        )
    if monitor is not None:
        monitor.begin(sink.while_open())
    sink.begin(source.positions(), topic_ids)
    scoring = Scoring(source, score, sink, monitor)
    source.for_each_planned_batch(scoring.process)
    return scoring
