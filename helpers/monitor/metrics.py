"""Serve a stream's figures to Prometheus."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from helpers.monitor.log import SECONDS_LIMITS, Monitor

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# Only programs on this machine can scrape the metrics.
_ADDRESS = "127.0.0.1"


@contextlib.contextmanager
def serve_metrics(
    monitor: Monitor, port: int, model_version: Callable[[], str] | None = None
) -> Iterator[str]:
    """Serve a monitor's figures to Prometheus within a ``with`` block, on this machine only.

    The figures are those of the monitor's table and totals at the moment of the request. At the end
    of the block, the port is free again.

    Parameters
    ----------
    monitor : Monitor
        The monitor of the stream that runs within the block.
    port : int
        The port on 127.0.0.1; 0 chooses a free one.
    model_version : callable, optional
        Returns the version of the model that scores the events.

    Yields
    ------
    str
        The URL that Prometheus scrapes.

    Raises
    ------
    OSError
        If the port is in use, or this user may not use it.

    Examples
    --------
    >>> import urllib.request
    >>> monitor = Monitor()
    >>> with serve_metrics(monitor, 0) as url, urllib.request.urlopen(url) as answer:
    ...     print(answer.read().decode())
    # HELP scoring_events_total Events that were scored and stored.
    # TYPE scoring_events_total counter
    scoring_events_total 0.0
    ...
    """
    # Here, because a driver on a cluster's machine may not have the package.
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise OSError(
            "the metrics need the package prometheus-client, which this machine lacks: install it "
            "where the driver runs, or do without metrics."
        ) from None

    registry = CollectorRegistry()
    registry.register(_Figures(monitor, model_version))
    try:
        server, thread = start_http_server(port, _ADDRESS, registry)
    except (OSError, OverflowError) as error:
        raise OSError(
            f"port {port} can't serve the metrics ({getattr(error, 'strerror', error)}): stop the "
            "program that uses it, or choose another port."
        ) from None
    try:
        yield f"http://{_ADDRESS}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Figures:
    """Turns a monitor's figures into metrics at each request."""

    def __init__(self, monitor: Monitor, model_version: Callable[[], str] | None) -> None:
        self._monitor, self._model_version = monitor, model_version

    def collect(self) -> Iterator[Metric]:
        """Return the metrics; the registry calls this."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
            InfoMetricFamily,
        )

        totals, last = self._monitor.snapshot()
        for name, documentation, total in (
            ("scoring_events", "Events that were scored and stored.", "events"),
            ("scoring_signal_events", "Scored events of the class signal.", "signal"),
            ("scoring_bad_records", "Records that are not valid events.", "bad"),
        ):
            yield CounterMetricFamily(name, documentation, totals[total])
        buckets = [(limit, totals[limit]) for limit in map(str, SECONDS_LIMITS)]
        yield HistogramMetricFamily(
            "scoring_batch_seconds", "Processing times of batches.",
            [*buckets, ("+Inf", totals["batches"])], totals["seconds"],
        )  # fmt: skip
        if last is not None:
            yield GaugeMetricFamily(
                "scoring_last_batch_timestamp_seconds", "When the last batch was planned.",
                last.time / 1000,
            )  # fmt: skip
            if last.lag is not None:
                yield GaugeMetricFamily(
                    "scoring_lag_records", "Records left in the topics after the last batch.",
                    last.lag,
                )  # fmt: skip
        if self._model_version is not None:
            yield InfoMetricFamily(
                "scoring_model", "The model that scores the events.",
                {"version": self._model_version()},
            )  # fmt: skip
