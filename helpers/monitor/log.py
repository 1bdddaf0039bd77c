"""Keep, sum up and display the batches of a stream."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import pandas as pd
from py4j.protocol import Py4JError
from pyspark.sql import SparkSession

from helpers.monitor.display import (
    Batch,
    about_unused,
    contents_of,
    in_notebook,
    open_display,
    shortened,
)
from helpers.monitor.listener import QueryListener

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How many of the last batches are kept for the table and plot. The totals include all batches.
BATCHES_KEPT = 1_000

# Limits of processing time, in seconds; the totals have the number of batches within each of them.
SECONDS_LIMITS = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

# Maximum number of names of unused fields to report.
NAMES_SHOWN = 20


class Monitor:
    """Sums up a stream's batches, and displays them while it runs.

    The last 1,000 batches are kept; the totals include all batches.

    One thread may add batches (Spark calls a batch's function in a separate thread) while another
    requests the table or the plot.

    Examples
    --------
    >>> monitor = Monitor()
    >>> monitor.add(Batch(1_700_000_000_000, 40_000, 22_221, bad=0, seconds=2.0, lag=60_000))
    time (UTC)  events  signal  bad  seconds  events/s     lag
    22:13:20    40,000  22,221    0      2.0    20,000  60,000
    >>> monitor.totals()
    {'events': 40000, 'signal': 22221, 'bad': 0, 'batches': 1}
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards everything below
        self._is_used: Callable[[], bool] = lambda: False
        self._batches: dict[int, Batch] = {}  # the last ones
        self._totals: Counter[str] = Counter()  # over all batches
        self._listener: QueryListener | None = None  # within `follow`
        self._display: Callable[[Batch], None] | None = None
        self._unused: set[str] = set()  # since `begin`
        self._warned: set[str] = set()  # already named in a warning, also before `begin`

    def begin(self, is_used: Callable[[], bool] = lambda: False) -> None:
        """Discard earlier batches, and open a new table.

        Parameters
        ----------
        is_used : callable
            Returns whether the stream that begins is still running.

        Raises
        ------
        ValueError
            If another stream that uses this monitor is still running.
        """
        with self._lock:
            if self._is_used():
                raise ValueError("the monitor shows another running stream: use one per stream.")
            self._is_used = is_used
            self._batches, self._totals, self._unused = {}, Counter(), set()
            self._display = open_display(self.contents)

    @contextlib.contextmanager
    def follow(self, spark: SparkSession) -> Iterator[None]:
        """Follow the progress of a query that runs within the ``with`` block.

        An added batch is displayed once Spark reports its progress, with the time when it was
        planned, and its total duration including planning and checkpointing. The block must not end
        before the query does.

        Parameters
        ----------
        spark : pyspark.sql.SparkSession
            The session that the query runs in.

        Examples
        --------
        >>> def count(df, batch_id):
        ...     monitor.add(Batch(batch_id, df.count(), signal=0, bad=0, seconds=0.0))
        >>> monitor = Monitor()
        >>> _ = (getfixture("tmp_path") / "lines").write_text("one")
        >>> lines = spark.readStream.text(str(getfixture("tmp_path"))).writeStream
        >>> with monitor.follow(spark):
        ...     query = lines.foreachBatch(count).trigger(availableNow=True).start()
        ...     ended = query.awaitTermination(600)
        time (UTC)  events  signal  bad  seconds  events/s  lag
        ...              1       0    0      ...
        """
        listener = self._listener = QueryListener(self._show)
        spark.streams.addListener(listener)
        try:
            yield
            listener.wait()
        finally:
            self._listener = None
            listener.show_the_rest()
            # If Java has died, that is the error to raise, not that it can't be asked.
            with contextlib.suppress(Py4JError, ConnectionError):
                spark.streams.removeListener(listener)

    def add(self, batch: Batch, unused: Iterable[str] = ()) -> None:
        """Add a batch, replacing a kept one with the same id, and display it.

        Within `follow`, it is displayed once Spark reports the batch's progress.

        Parameters
        ----------
        batch : Batch
            Its figures.
        unused : iterable of str
            Names of unused fields in its records.

        Warns
        -----
        UserWarning
            Lists the ``unused`` names, each once and no more than 20. A notebook shows them below
            the table instead.

        Examples
        --------
        >>> Monitor().add(Batch(1_700_000_000_000, events=0, signal=0, bad=3, seconds=0.5))
        time (UTC)  events  signal  bad  seconds  events/s  lag
        22:13:20         0       0    3      0.5         0    -
        """
        new_names = self._note_unused(unused)
        if self._listener is None:
            self._show(batch)
        else:
            self._listener.hold(batch)
        # In a kernel, a warning from Spark's thread may appear below another cell, or not at all.
        if new_names and not in_notebook():
            warnings.warn(about_unused(new_names), UserWarning, stacklevel=2)

    def _show(self, batch: Batch) -> None:
        """Add a batch to the table and the totals."""
        with self._lock:
            self._totals.update(_counts(batch))
            if (replaced := self._batches.get(batch.batch_id)) is not None:
                self._totals.subtract(_counts(replaced))
            self._batches[batch.batch_id] = batch
            if len(self._batches) > BATCHES_KEPT:
                del self._batches[min(self._batches)]
            if self._display is None:
                self._display = open_display(self.contents)
            self._display(batch)

    @property
    def batches(self) -> list[Batch]:
        """The last batches, at most 1,000, sorted by id."""
        with self._lock:
            return [self._batches[batch_id] for batch_id in sorted(self._batches)]

    def table(self) -> pd.DataFrame:
        """Return one row per batch: time (UTC), the counts, seconds, events_per_second, and lag.

        The table contains the last 1,000 batches.

        Examples
        --------
        >>> monitor = Monitor()
        >>> list(monitor.table())
        ['time', 'events', 'signal', 'bad', 'seconds', 'events_per_second', 'lag']
        """
        batches = self.batches
        times = pd.to_datetime([batch.time for batch in batches], unit="ms", utc=True)
        kinds = {
            "events": "int64",
            "signal": "int64",
            "bad": "int64",
            "seconds": "float64",
            "events_per_second": "float64",
            "lag": "Int64",  # nullable
        }
        columns = {
            name: pd.array([getattr(batch, name) for batch in batches], dtype=kind)
            for name, kind in kinds.items()
        }
        return pd.DataFrame({"time": times, **columns})

    def totals(self) -> dict[str, int]:
        """Return the sums of events, signal and bad over all batches, and the number of batches.

        Examples
        --------
        >>> Monitor().totals()
        {'events': 0, 'signal': 0, 'bad': 0, 'batches': 0}
        """
        with self._lock:
            return {name: self._totals[name] for name in ("events", "signal", "bad", "batches")}

    def snapshot(self) -> tuple[Counter[str], Batch | None]:
        """Return all sums and the last batch as of one moment, as metrics need them.

        Returns
        -------
        totals : collections.Counter
            The `totals` and the sum of ``seconds``. A limit of `SECONDS_LIMITS`, as text, has the
            number of batches that took no longer.
        last : Batch or None
            The batch with the largest id.

        Examples
        --------
        >>> Monitor().snapshot()
        (Counter(), None)
        """
        with self._lock:
            last = self._batches[max(self._batches)] if self._batches else None
            return Counter(self._totals), last

    def contents(self) -> dict[str, str]:
        """Return the table of the last batches for a notebook, as HTML and as text.

        Examples
        --------
        >>> print(Monitor().contents()["text/plain"])
        time (UTC)     events     signal      bad  seconds   events/s          lag
        total               0          0        0      0.0          -
        """
        with self._lock:
            return contents_of(self.batches, self._totals, self._unused)

    def plot(self) -> Figure:
        """Return a figure of the last 1,000 batches: events, seconds, signal fraction, and lag.

        As the value of a notebook cell, it is displayed; elsewhere, save it with `savefig`.

        Returns
        -------
        matplotlib.figure.Figure
            Three panels over the seconds since the first of these batches.

        Raises
        ------
        ValueError
            If there is no batch yet.

        Examples
        --------
        >>> Monitor().plot()
        Traceback (most recent call last):
        ...
        ValueError: there is no batch to plot yet: run the stream first.
        """
        # Here, because importing Matplotlib takes a second, and a job never plots.
        from helpers.monitor.plots import figure_of

        with self._lock:
            table, totals = self.table(), self.totals()
        if table.empty:
            raise ValueError("there is no batch to plot yet: run the stream first.")
        return figure_of(table, totals)

    def _note_unused(self, names: Iterable[str]) -> list[str]:
        """Keep names of unused fields for the table, and return the new ones.

        The names come from outside, so there may be any number of them, of any length.
        """
        names = {shortened(name) for name in names}
        with self._lock:
            self._unused.update(sorted(names - self._unused)[: NAMES_SHOWN - len(self._unused)])
            new = sorted(names - self._warned)[: NAMES_SHOWN - len(self._warned)]
            self._warned.update(new)
        return new


def _counts(batch: Batch) -> dict[str, float]:
    """Return a batch's contribution to the totals."""
    names = ("events", "signal", "bad", "seconds")
    within = {str(limit): 1 for limit in SECONDS_LIMITS if batch.seconds <= limit}
    return {"batches": 1, **{name: getattr(batch, name) for name in names}, **within}
