"""Receive Spark's progress reports for the batches of a Structured Streaming query."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from operator import attrgetter
from typing import Any

from pyspark import SparkContext
from pyspark.sql.streaming import StreamingQueryListener
from pyspark.sql.streaming.listener import StreamingQueryProgress

from helpers.monitor.display import Batch

# How long to wait for the report of a query's termination, after the query ends.
_REPORT_SECONDS = 10

# Spark's property of the thread that runs a query, StreamExecution.QUERY_ID_KEY.
_QUERY_ID = "sql.streaming.queryId"


class QueryListener(StreamingQueryListener):
    """Holds batches until Spark reports their progress, and completes them with it.

    Spark reports all queries of the session. A batch belongs to the query whose thread adds it.

    Parameters
    ----------
    show : callable
        Called with each completed batch.
    """

    def __init__(self, show: Callable[[Batch], None]) -> None:
        self._show = show
        self._held: dict[tuple[str | None, int], Batch] = {}
        self._running: set[str] = set()
        self._changed = threading.Condition()

    def hold(self, batch: Batch) -> None:
        """Hold a batch until Spark reports its progress."""
        query_id = SparkContext._active_spark_context.getLocalProperty(_QUERY_ID)
        with self._changed:
            self._held[query_id, batch.batch_id] = batch

    def onQueryStarted(self, event: Any) -> None:  # noqa: N802 (Spark's name)
        """Record a running query, so that `wait` waits for it; Spark calls this."""
        self._running.add(str(event.runId))

    def onQueryProgress(self, event: Any) -> None:  # noqa: N802
        """Complete the reported batch and earlier ones; Spark calls this."""
        progress: StreamingQueryProgress = event.progress
        planned_at = round(datetime.fromisoformat(progress.timestamp).timestamp() * 1000)
        reported: dict[str, Any] = {"planned_at": planned_at}
        if "triggerExecution" in progress.durationMs:
            reported["seconds"] = progress.durationMs["triggerExecution"] / 1000
        # Not the lag: Spark's is that of the plan, which is 0 unless batches are limited.
        with self._changed:
            # Earlier batches are done; Spark dropped their reports.
            keys = sorted(
                (batch_id, query_id) for query_id, batch_id in self._held
                if query_id in (None, str(progress.id)) and batch_id <= progress.batchId
            )  # fmt: skip
            batches = [self._held.pop((query_id, batch_id)) for batch_id, query_id in keys]
        for batch in batches:
            if batch.batch_id == progress.batchId:
                batch = replace(batch, **reported)
            elif batch.planned_at is None:
                batch = replace(batch, planned_at=planned_at)
            self._show(batch)

    def onQueryTerminated(self, event: Any) -> None:  # noqa: N802
        """Record the end of a query, its last report; Spark calls this."""
        with self._changed:
            self._running.discard(str(event.runId))
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait for outstanding reports."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running, _REPORT_SECONDS)

    def show_the_rest(self) -> None:
        """Show batches whose report has not come, with their own figures."""
        with self._changed:
            batches = sorted(self._held.values(), key=attrgetter("batch_id"))
            self._held.clear()
        for batch in batches:
            self._show(batch)
