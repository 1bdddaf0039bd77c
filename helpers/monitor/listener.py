"""Receive Spark's progress reports for the batches of a Structured Streaming query."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

from pyspark.sql.streaming import StreamingQueryListener
from pyspark.sql.streaming.listener import SourceProgress, StreamingQueryProgress

from helpers.monitor.figures import Batch

# How long to wait for the report of a query's termination, after the query ends.
_REPORT_SECONDS = 10


class QueryListener(StreamingQueryListener):
    """Holds batches until Spark reports their progress, and completes them with it.

    Parameters
    ----------
    show : callable
        Called with each completed batch.
    """

    def __init__(self, show: Callable[[Batch], None]) -> None:
        self._show = show
        self._held: dict[int, Batch] = {}
        self._running: set[str] = set()
        self._changed = threading.Condition()

    def hold(self, batch: Batch) -> None:
        """Hold a batch until Spark reports its progress."""
        with self._changed:
            self._held[batch.batch_id] = batch

    def onQueryStarted(self, event: Any) -> None:  # noqa: N802 (Spark's name)
        """Record a running query, so that `wait` waits for it; Spark calls this."""
        self._running.add(str(event.runId))

    def onQueryProgress(self, event: Any) -> None:  # noqa: N802
        """Complete the reported batch and earlier ones; Spark calls this."""
        progress: StreamingQueryProgress = event.progress
        planned_at = round(datetime.fromisoformat(progress.timestamp).timestamp() * 1000)
        with self._changed:
            # Earlier batches are done; Spark dropped their reports.
            ids = sorted(batch_id for batch_id in self._held if batch_id <= progress.batchId)
            batches = [self._held.pop(batch_id) for batch_id in ids]
        for batch in batches:
            if batch.batch_id == progress.batchId:
                seconds = progress.durationMs["triggerExecution"] / 1000
                lag = _left(progress.sources[0])
                batch = replace(batch, seconds=seconds, lag=lag, planned_at=planned_at)
            elif batch.planned_at is None:
                batch = replace(batch, planned_at=planned_at)
            self._show(batch)

    def onQueryIdle(self, event: Any) -> None:  # noqa: N802
        """Do nothing; Spark calls this when there is no new data."""

    def onQueryTerminated(self, event: Any) -> None:  # noqa: N802
        """Record the end of a query, its last report; Spark calls this."""
        with self._changed:
            self._running.discard(str(event.runId))
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait for outstanding reports."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running, _REPORT_SECONDS)


def _left(source: SourceProgress) -> int | None:
    """Return how many offsets a query has left in Kafka; None for any other source."""
    if not source.description.startswith("Kafka"):
        return None
    ends, latest = json.loads(source.endOffset), json.loads(source.latestOffset)
    return sum(
        offset - ends.get(topic, {}).get(partition, 0)
        for topic, partitions in latest.items()
        for partition, offset in partitions.items()
    )
