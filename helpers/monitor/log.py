"""What a stream does, batch by batch: a table while it runs, and a plot when it is done.

    monitor = Monitor()
    monitor.begin(lag=stream.lag_after)

    def process_instances(df, batch_id):
        with monitor.batch(batch_id) as counts:
            scored = score(df).observe(counts, F.count(F.lit(1)).alias("events"))
            scored.write.parquet(f"scores/batch={batch_id}")

In a notebook the table is below the cell that called `begin`, and changes there with each batch;
elsewhere each batch is a printed line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import json
import math
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from py4j.protocol import Py4JJavaError
from pyspark.sql import Observation, SparkSession
from pyspark.sql.streaming import StreamingQueryListener
from pyspark.sql.streaming.listener import SourceProgress, StreamingQueryProgress

from helpers.records import COUNTS_SECONDS, observed

# How many batches the table in a notebook shows: the last ones.
ROWS_SHOWN = 20

# How many batches a monitor keeps for its table and plot: the last ones. The totals are of all.
BATCHES_KEPT = 1_000

# How many names of unused fields it tells, and how many characters of each.
NAMES_SHOWN = 20
CHARACTERS_SHOWN = 40

_HEADINGS = ("time (UTC)", "events", "signal", "bad", "seconds", "events/s", "lag")
_WIDTHS = (10, 9, 9, 7, 7, 9, 11)
_UNKNOWN = "-"

_GREEN, _BROWN = "#3c7d4f", "#a0522d"
_POINTS = {"marker": "o", "markersize": 4, "clip_on": False}


class MonitorError(RuntimeError):
    """A batch has no counts; the message says what to change in its function."""


@dataclass(frozen=True)
class Batch:
    """The figures of one batch.

    Attributes
    ----------
    batch_id : int
        What Spark calls the batch; of a DStream, its time in milliseconds since 1970.
    events, signal, bad : int
        How many events it had, how many of these are signal, and how many records are no events.
    seconds : float
        How long it took.
    lag : int or None
        How many records of the topic were left after it; None where nobody knows.
    planned_at : int or None
        When it was planned, in milliseconds since 1970, if that isn't its id: Structured Streaming
        numbers its batches.

    Examples
    --------
    >>> Batch(1_700_000_000_000, events=500, signal=270, bad=0, seconds=0.5).events_per_second
    1000.0
    """

    batch_id: int
    events: int
    signal: int
    bad: int
    seconds: float
    lag: int | None = None
    planned_at: int | None = None

    @property
    def time(self) -> int:
        """When it was planned, in milliseconds since 1970."""
        return self.batch_id if self.planned_at is None else self.planned_at

    @property
    def events_per_second(self) -> float:
        """How many events it did in a second; not a number if it took no time."""
        return self.events / self.seconds if self.seconds else math.nan


class Monitor:
    """Counts a stream's batches, and shows them while it runs.

    It keeps the last 1,000 batches, and the totals of all.

    One thread may add batches (Spark calls a batch's function in a thread of its own) while another
    asks for the table or the plot.

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
        self._lock = threading.RLock()  # of all below
        self._batches: dict[int, Batch] = {}  # the last ones
        self._totals: Counter[str] = Counter()  # of all
        self._lag: Callable[[int], int | None] | None = None
        self._held: dict[int, Batch] | None = None  # until Spark reports them, if it is to do so
        self._display: _Table | _Lines | None = None
        self._unused: set[str] = set()  # in the batches that are shown
        self._told: set[str] = set()  # of these and of earlier ones, what a warning has named

    def begin(self, lag: Callable[[int], int | None] | None = None) -> None:
        """Forget earlier batches, and open a new table.

        Parameters
        ----------
        lag : callable, optional
            Takes a batch's id, and returns how many records are left when it is done, or None.
            `KafkaDirectStream.lag_after` is one.

        Examples
        --------
        >>> monitor = Monitor()
        >>> monitor.begin(lag=lambda batch_id: 0)
        """
        with self._lock:
            self._batches, self._totals = {}, Counter()
            self._unused, self._lag = set(), lag
            self._display = _open_display()

    @contextlib.contextmanager
    def batch(self, batch_id: int) -> Iterator[Observation]:
        """Take a batch's time and counts, and add it when the ``with`` block ends.

        A block that raises adds nothing. A batch that is done again replaces what it added before.

        Parameters
        ----------
        batch_id : int
            The batch's time, in milliseconds since 1970.

        Yields
        ------
        pyspark.sql.Observation
            What `observe` of a DataFrame takes. The block must run an action on the DataFrame that
            `observe` returns. It counts ``events``; if you like also ``signal`` and ``bad``, and
            collects ``unused``: names of fields, or arrays of names, that the records have but
            nobody uses.

        Raises
        ------
        MonitorError
            If nothing was counted.

        Warns
        -----
        UserWarning
            Names what is ``unused``, each name once, and no more than 20. A notebook says so below
            the table instead.

        Examples
        --------
        >>> from pyspark.sql import functions as F
        >>> monitor = Monitor()
        >>> with monitor.batch(1_700_000_000_000) as counts:
        ...     events = spark.range(500).observe(counts, F.count(F.lit(1)).alias("events"))
        ...     events.write.format("noop").mode("overwrite").save()
        time (UTC)  events  signal  bad  seconds  events/s  lag
        22:13:20       500       0    0  ...                  -
        """
        counts = Observation()
        started = time.monotonic()
        yield counts
        seconds = time.monotonic() - started
        found = _counts_of(counts, batch_id)
        signal, bad = found.get("signal") or 0, found.get("bad") or 0
        lag = None if self._lag is None else self._lag(batch_id)
        new_names = self._note_unused(found.get("unused") or ())
        self._add_or_hold(Batch(batch_id, found["events"], signal, bad, seconds, lag))
        # In a kernel, a warning from Spark's thread may end up below another cell, or nowhere.
        if new_names and not _in_notebook():
            # The caller's line is the third: between it and this one is contextlib's.
            warnings.warn(_about_unused(new_names), UserWarning, stacklevel=3)

    @contextlib.contextmanager
    def follow(self, spark: SparkSession) -> Iterator[None]:
        """Let Spark tell of the batches of a query that runs within the ``with`` block.

        What a batch's function counted in `batch` is added when Spark reports the batch's progress:
        with the time it was planned at, how long it took in all, planning and checkpoint included,
        and how many records are left. The block must not end before its query.

        Parameters
        ----------
        spark : pyspark.sql.SparkSession
            The session that the query runs in.

        Examples
        --------
        >>> from pyspark.sql import functions as F
        >>> def count(df, batch_id):
        ...     with monitor.batch(batch_id) as counts:
        ...         counted = df.observe(counts, F.count("value").alias("events"))
        ...         counted.write.format("noop").mode("overwrite").save()
        >>> monitor = Monitor()
        >>> _ = (getfixture("tmp_path") / "lines").write_text("one")
        >>> lines = spark.readStream.text(str(getfixture("tmp_path"))).writeStream
        >>> with monitor.follow(spark):
        ...     query = lines.foreachBatch(count).trigger(availableNow=True).start()
        ...     ended = query.awaitTermination(60)
        time (UTC)  events  signal  bad  seconds  events/s  lag
        ...              1       0    0      ...
        """
        listener = _QueryListener(self)
        with self._lock:
            self._held = {}
        spark.streams.addListener(listener)
        try:
            yield
            listener.wait()
        finally:
            spark.streams.removeListener(listener)
            with self._lock:
                self._held = None

    def progressed(self, progress: StreamingQueryProgress) -> None:
        """Add a batch that was held for what Spark says of it; the listener calls this."""
        planned_at = round(datetime.fromisoformat(progress.timestamp).timestamp() * 1000)
        with self._lock:
            held = self._held or {}
            # Spark goes on to a batch when those before it are done: it has dropped their reports.
            ids = sorted(batch_id for batch_id in held if batch_id <= progress.batchId)
            batches = [dataclasses.replace(held.pop(i), planned_at=planned_at) for i in ids]
        for batch in batches:
            if batch.batch_id == progress.batchId:
                seconds = progress.durationMs["triggerExecution"] / 1000
                batch = dataclasses.replace(batch, seconds=seconds, lag=_left(progress.sources[0]))
            self.add(batch)

    def _add_or_hold(self, batch: Batch) -> None:
        """Add a batch now, or when Spark has reported its progress."""
        with self._lock:
            if self._held is not None:
                self._held[batch.batch_id] = batch
                return
        self.add(batch)

    def add(self, batch: Batch) -> None:
        """Add a batch, in the place of one with the same id that is kept, and show it.

        Examples
        --------
        >>> Monitor().add(Batch(1_700_000_000_000, events=0, signal=0, bad=3, seconds=0.5))
        time (UTC)  events  signal  bad  seconds  events/s  lag
        22:13:20         0       0    3      0.5         0    -
        """
        with self._lock:
            self._totals.update(_counts(batch))
            if (replaced := self._batches.get(batch.batch_id)) is not None:
                self._totals.subtract(_counts(replaced))
            self._batches[batch.batch_id] = batch
            if len(self._batches) > BATCHES_KEPT:
                del self._batches[min(self._batches)]
            if self._display is None:
                self._display = _open_display()
            self._display.show(batch, self)

    @property
    def batches(self) -> list[Batch]:
        """The last batches, 1,000 at most, in the order of their times."""
        with self._lock:
            return [self._batches[batch_id] for batch_id in sorted(self._batches)]

    def table(self) -> pd.DataFrame:
        """Return a row per batch: time (UTC), the counts, seconds, events_per_second, and lag.

        It has the last 1,000 batches.

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
            "lag": "Int64",  # the one that knows missing numbers
        }
        columns = {
            name: pd.array([getattr(batch, name) for batch in batches], dtype=kind)
            for name, kind in kinds.items()
        }
        return pd.DataFrame({"time": times, **columns})

    def totals(self) -> dict[str, int]:
        """Return the sums of events, signal and bad, and the number of batches, of all batches.

        Examples
        --------
        >>> Monitor().totals()
        {'events': 0, 'signal': 0, 'bad': 0, 'batches': 0}
        """
        with self._lock:
            return {name: self._totals[name] for name in ("events", "signal", "bad", "batches")}

    def contents(self) -> dict[str, str]:
        """Return the table of the last batches for a notebook, as HTML and as text.

        Examples
        --------
        >>> print(Monitor().contents()["text/plain"])
        time (UTC)     events     signal      bad  seconds   events/s          lag
        total               0          0        0      0.0          -
        """
        with self._lock:
            return _both_kinds(self.batches, self._totals, self._unused)

    def plot(self) -> Figure:
        """Return a figure of the last 1,000 batches: events, seconds, share of signal, and lag.

        As the value of a notebook's cell it is shown; elsewhere, write it to a file with `savefig`.

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
        table = self.table()
        if table.empty:
            raise ValueError("there is no batch to plot yet: run the stream first.")
        since_first = (table["time"] - table["time"].iloc[0]).dt.total_seconds()
        figure, (events, share, lag) = plt.subplots(
            3, 1, figsize=(9, 7), sharex=True, layout="constrained", height_ratios=(3, 2, 2)
        )
        # Otherwise a notebook shows it twice: as the cell's value, and as a figure that is open.
        plt.close(figure)
        _plot_events(events, since_first, table)
        earlier = {name: self.totals()[name] - table[name].sum() for name in ("events", "signal")}
        _plot_share(share, since_first, table, earlier)
        _plot_lag(lag, since_first, table)
        shown = f" of the last {len(table):,}" if self.totals()["batches"] > len(table) else ""
        lag.set_xlabel(f"seconds since the first batch{shown}")
        figure.align_ylabels()
        return figure

    def _note_unused(self, found: Iterable[str | Iterable[str | None]]) -> list[str]:
        """Keep names of unused fields for the table, and return those that are new.

        They come from outside, so there may be any number of them, of any length.
        """
        arrays = ([value] if isinstance(value, str) else value for value in found)
        names = {_shortened(name) for array in arrays for name in array if name is not None}
        with self._lock:
            self._unused.update(sorted(names - self._unused)[: NAMES_SHOWN - len(self._unused)])
            new = sorted(names - self._told)[: NAMES_SHOWN - len(self._told)]
            self._told.update(new)
        return new


class _QueryListener(StreamingQueryListener):
    """Hears from Spark how the batches of a query went."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._running: set[str] = set()
        self._ended = threading.Condition()

    def onQueryStarted(self, event: Any) -> None:  # noqa: N802 (Spark's name)
        """Note that there is an end to wait for; Spark calls this."""
        self._running.add(str(event.runId))

    def onQueryProgress(self, event: Any) -> None:  # noqa: N802
        """Tell the monitor of a batch; Spark calls this."""
        self._monitor.progressed(event.progress)

    def onQueryIdle(self, event: Any) -> None:  # noqa: N802
        """Do nothing; Spark calls this when there is nothing to read."""

    def onQueryTerminated(self, event: Any) -> None:  # noqa: N802
        """Note the end of a query, after which there is no more news; Spark calls this."""
        with self._ended:
            self._running.discard(str(event.runId))
            self._ended.notify_all()

    def wait(self) -> None:
        """Wait for the news that are on their way."""
        with self._ended:
            self._ended.wait_for(lambda: not self._running, COUNTS_SECONDS)


class _Table:
    """The table in a notebook, below the cell that makes it, wherever it is changed from."""

    def __init__(self) -> None:
        self._handle = display(Monitor().contents(), raw=True, display_id=True)

    def show(self, batch: Batch, monitor: Monitor) -> None:
        """Show the last batches instead of those before."""
        self._handle.update(monitor.contents(), raw=True)


class _Lines:
    """Lines for a terminal or a log."""

    def __init__(self) -> None:
        self._begun = False

    def show(self, batch: Batch, monitor: Monitor) -> None:
        """Print a batch, the first below a heading."""
        if not self._begun:
            print(_line(_HEADINGS), flush=True)
            self._begun = True
        print(_line(_cells(batch)), flush=True)


def _open_display() -> _Table | _Lines:
    return _Table() if _in_notebook() else _Lines()


def _in_notebook() -> bool:
    """Tell whether this is a Jupyter kernel; IPython in a terminal has none."""
    return getattr(get_ipython(), "kernel", None) is not None


def _counts_of(counts: Observation, batch_id: int) -> dict[str, Any]:
    """Return what Spark counted, or raise."""
    if counts._jo is None:
        raise MonitorError(
            f"batch {batch_id} was not counted: pass what `monitor.batch` gives to `observe`."
        )
    try:
        found = observed(counts)
    except Py4JJavaError as error:  # Spark's optimiser has left the observed part out
        raise MonitorError(
            f"batch {batch_id} was not counted, for its action needed no rows: call `observe` "
            "last, right before the action."
        ) from error
    if found is None:
        raise MonitorError(
            f"batch {batch_id} was not counted: run an action, such as a write, on the "
            "DataFrame that `observe` returns, within the `with` block, and not on its `rdd`."
        )
    if "events" not in found:
        raise MonitorError(
            f"batch {batch_id} has no count of events, only of {', '.join(found)}: "
            'observe F.count(F.lit(1)).alias("events") too.'
        )
    return found


def _left(source: SourceProgress) -> int | None:
    """Return how many offsets a query has left in Kafka; None where its source is another one."""
    if not source.description.startswith("Kafka"):
        return None
    ends, latest = json.loads(source.endOffset), json.loads(source.latestOffset)
    return sum(
        offset - ends.get(topic, {}).get(partition, 0)
        for topic, partitions in latest.items()
        for partition, offset in partitions.items()
    )


def _shortened(name: str) -> str:
    return name if len(name) <= CHARACTERS_SHOWN else f"{name[:CHARACTERS_SHOWN]}..."


def _about_unused(names: Iterable[str]) -> str:
    return f"fields that are not used: {', '.join(sorted(names))} (they are ignored)"


def _cells(batch: Batch) -> tuple[str, ...]:
    """Return a batch as texts, in the order of the headings."""
    moment = datetime.fromtimestamp(batch.time / 1000, UTC)
    lag = _UNKNOWN if batch.lag is None else f"{batch.lag:,}"
    return (f"{moment:%H:%M:%S}", *_figures(batch), lag)


def _figures(batch: Batch) -> tuple[str, ...]:
    rate = batch.events_per_second
    counts = (f"{count:,}" for count in (batch.events, batch.signal, batch.bad))
    return (*counts, f"{batch.seconds:,.1f}", _UNKNOWN if math.isnan(rate) else f"{rate:,.0f}")


def _counts(batch: Batch) -> dict[str, float]:
    """Return what a batch adds to the totals."""
    names = ("events", "signal", "bad", "seconds")
    return {"batches": 1, **{name: getattr(batch, name) for name in names}}


def _total_cells(totals: Counter[str]) -> tuple[str, ...]:
    """Return the totals as texts, in the order of the headings."""
    names = ("events", "signal", "bad", "seconds")
    return ("total", *_figures(Batch(0, **{name: totals[name] for name in names})), "")


def _line(cells: Sequence[str]) -> str:
    """Return cells as a line: the time on the left, numbers on the right of their columns."""
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], _WIDTHS[1:], strict=True))
    return "  ".join([cells[0].ljust(_WIDTHS[0]), *numbers]).rstrip()


def _both_kinds(batches: Sequence[Batch], totals: Counter[str], unused: set[str]) -> dict[str, str]:
    """Return the table for notebooks, as HTML and as text."""
    rows = [_cells(batch) for batch in batches[-ROWS_SHOWN:]]
    total = _total_cells(totals)
    notes = []
    if totals["batches"] > ROWS_SHOWN:
        notes.append(f"the last {ROWS_SHOWN} of {totals['batches']:,} batches; the total is of all")
    if unused:
        notes.append(_about_unused(unused))
    text = "\n".join([*map(_line, (_HEADINGS, *rows, total)), *notes])
    return {"text/html": _html(rows, total, notes), "text/plain": text}


def _html(rows: Iterable[Sequence[str]], total: Sequence[str], notes: Iterable[str]) -> str:
    """Return the table as HTML that takes its colours from the page, light or dark."""
    body = "".join(_html_row("td", row) for row in rows)
    notes = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return (
        '<table style="border-collapse: collapse; font-variant-numeric: tabular-nums">'
        f"<thead>{_html_row('th', _HEADINGS, 'border-bottom: 1px solid; ')}</thead>"
        f"<tbody>{body}</tbody>"
        f"<tfoot>{_html_row('th', total, 'border-top: 1px solid; ')}</tfoot></table>{notes}"
    )


def _html_row(tag: str, cells: Iterable[str], style: str = "") -> str:
    style += "text-align: right; padding: 0.2em 0.8em"
    row = "".join(f'<{tag} style="{style}">{cell}</{tag}>' for cell in cells)
    return f"<tr>{row}</tr>"


def _plot_events(axes: Axes, since_first: pd.Series, table: pd.DataFrame) -> None:
    """Draw events as bars, and on an axis of its own how long each batch took."""
    gap = since_first.diff().min() if len(table) > 1 else 1.0
    axes.bar(since_first, table["events"], width=0.8 * gap, color=_GREEN, alpha=0.6)
    axes.set_xlim(-gap, since_first.iloc[-1] + gap)
    axes.set_ylabel("events a batch", color=_GREEN)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    seconds = axes.twinx()
    seconds.plot(since_first, table["seconds"], color=_BROWN, **_POINTS)
    seconds.set_ylabel("processing time, seconds", color=_BROWN)
    seconds.set_ylim(bottom=0)


def _plot_share(
    axes: Axes, since_first: pd.Series, table: pd.DataFrame, earlier: dict[str, int]
) -> None:
    """Draw how many percent of the events are signal, of all up to each batch."""
    sums = table[["events", "signal"]].cumsum() + pd.Series(earlier)
    share = 100 * sums["signal"] / sums["events"]
    axes.plot(since_first, share, color=_GREEN, **_POINTS)
    axes.set_ylabel("signal so far, %")
    axes.ticklabel_format(axis="y", useOffset=False)
    # At least five percent high, so that chance does not look like a trend.
    if share.notna().any():
        axes.set_ylim(share.min() - 2.5, share.max() + 2.5)


def _plot_lag(axes: Axes, since_first: pd.Series, table: pd.DataFrame) -> None:
    """Draw how many records were left after each batch of which that is known."""
    known = table["lag"].notna()
    lag = table.loc[known, "lag"].astype("int64")
    axes.plot(since_first[known], lag, color=_GREEN, **_POINTS)
    axes.set_ylabel("lag, records")
    axes.set_ylim(0, max(1.05 * lag.max(), 1) if len(lag) else 1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if lag.empty:
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", va="center")
