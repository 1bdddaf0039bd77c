"""Plot the batches of a stream."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_GREEN, _BROWN = "#3c7d4f", "#a0522d"
_POINTS = {"marker": "o", "markersize": 4, "clip_on": False}


def figure_of(table: pd.DataFrame, totals: Mapping[str, int]) -> Figure:
    """Return a figure of batches: events, seconds, signal fraction, and lag.

    Parameters
    ----------
    table : pandas.DataFrame
        The last batches, as `Monitor.table` returns them.
    totals : mapping of str to int
        The sums of all batches, as `Monitor.totals` returns them.
    """
    since_first = (table["time"] - table["time"].iloc[0]).dt.total_seconds()
    done = _done(since_first, table["seconds"])
    figure, (events, share, lag) = plt.subplots(
        3, 1, figsize=(9, 7), sharex=True, layout="constrained", height_ratios=(3, 2, 2)
    )
    # Otherwise a notebook shows it twice: as the cell's value and as an open figure.
    plt.close(figure)
    _plot_events(events, since_first, table)
    earlier = {name: totals[name] - table[name].sum() for name in ("events", "signal")}
    _plot_share(share, since_first, table, earlier)
    _plot_lag(lag, done, table)
    # The panels share their axis, and the last batch may be done long after it was planned.
    events.set_xlim(right=max(events.get_xlim()[1], 1.02 * done.iloc[-1]))
    shown = f" of the last {len(table):,}" if totals["batches"] > len(table) else ""
    lag.set_xlabel(f"seconds since the first batch{shown}")
    figure.align_ylabels()
    return figure


def _done(planned: pd.Series, seconds: pd.Series) -> pd.Series:
    """Return when each batch was done: a batch begins when it is planned and none is running."""
    ends = []
    for begin, duration in zip(planned, seconds, strict=True):
        ends.append(max(begin, ends[-1] if ends else begin) + duration)
    return pd.Series(ends, index=planned.index)


def _plot_events(axes: Axes, since_first: pd.Series, table: pd.DataFrame) -> None:
    """Draw events as bars, and the processing time of each batch on a second axis."""
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
    """Draw the cumulative percentage of signal events up to each batch."""
    sums = table[["events", "signal"]].cumsum() + pd.Series(earlier)
    share = 100 * sums["signal"] / sums["events"]
    axes.plot(since_first, share, color=_GREEN, **_POINTS)
    axes.set_ylabel("signal so far, %")
    axes.ticklabel_format(axis="y", useOffset=False)
    # A range of at least five percentage points, so that chance doesn't look like a trend.
    if share.notna().any():
        axes.set_ylim(share.min() - 2.5, share.max() + 2.5)


def _plot_lag(axes: Axes, done: pd.Series, table: pd.DataFrame) -> None:
    """Draw the number of records left after each batch, when it was done, where it is known."""
    known = table["lag"].notna()
    lag = table.loc[known, "lag"].astype("int64")
    axes.plot(done[known], lag, color=_GREEN, **_POINTS)
    axes.set_ylabel("lag, records")
    axes.set_ylim(0, max(1.05 * lag.max(), 1) if len(lag) else 1)
    axes.yaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    if lag.empty:
        axes.text(0.5, 0.5, "not known", transform=axes.transAxes, ha="center", va="center")
