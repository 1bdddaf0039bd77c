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
    began, done = _span(since_first, table["seconds"])
    figure, (events, share, lag) = plt.subplots(
        3, 1, figsize=(9, 7), sharex=True, layout="constrained", height_ratios=(3, 2, 2)
    )
    # Otherwise a notebook shows it twice: as the cell's value and as an open figure.
    plt.close(figure)
    _plot_events(events, began, done, table)
    earlier = {name: totals[name] - table[name].sum() for name in ("events", "signal")}
    _plot_share(share, done, table, earlier)
    _plot_lag(lag, done, table)
    shown = f" of the last {len(table):,}" if totals["batches"] > len(table) else ""
    lag.set_xlabel(f"seconds since the first batch{shown} was planned")
    figure.align_ylabels()
    return figure


def _span(planned: pd.Series, seconds: pd.Series) -> tuple[pd.Series, pd.Series]:
    """Return when each batch began and was done: it begins when planned and none is running."""
    began, done = [], []
    for plan, duration in zip(planned, seconds, strict=True):
        began.append(max(plan, done[-1] if done else plan))
        done.append(began[-1] + duration)
    return pd.Series(began, index=planned.index), pd.Series(done, index=planned.index)


def _plot_events(axes: Axes, began: pd.Series, done: pd.Series, table: pd.DataFrame) -> None:
    """Draw a bar of events for the time of each batch, and its length on a second axis."""
    end = max(1.02 * done.iloc[-1], 0.1)
    widths = (done - began).clip(lower=0.002 * end)  # wide enough to be seen
    # Lines between bars would hide those of a long stream.
    edges = {"linewidth": 0 if len(table) > 50 else 1, "edgecolor": "white"}
    axes.bar(began, table["events"], widths, align="edge", color=_GREEN, alpha=0.6, **edges)
    axes.set_xlim(0, end)
    axes.set_ylabel("events per batch", color=_GREEN)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    seconds = axes.twinx()
    seconds.plot(done, table["seconds"], color=_BROWN, **_POINTS)
    seconds.set_ylabel("processing time, seconds", color=_BROWN)
    seconds.set_ylim(bottom=0)


def _plot_share(
    axes: Axes, done: pd.Series, table: pd.DataFrame, earlier: dict[str, int]
) -> None:
    """Draw the percentage of signal in all events so far, when each batch was done."""
    sums = table[["events", "signal"]].cumsum() + pd.Series(earlier)
    share = 100 * sums["signal"] / sums["events"]
    axes.plot(done, share, color=_GREEN, **_POINTS)
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
