"""A batch's figures, and their display: as a table in a notebook, line by line in a terminal."""

from __future__ import annotations

import html
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from urllib.parse import urlsplit

from pyspark import SparkContext

# How many of the last batches the table in a notebook shows.
ROWS_SHOWN = 20

# The maximum length of an unused field's name in a note.
CHARACTERS_SHOWN = 40

_HEADINGS = ("time (UTC)", "events", "signal", "bad", "seconds", "events/s", "lag")
_WIDTHS = (10, 9, 9, 7, 7, 9, 11)
_UNKNOWN = "-"

# A table's content for a notebook, by MIME type.
Contents = dict[str, str]


@dataclass(frozen=True)
class Batch:
    """The figures of one batch.

    Attributes
    ----------
    batch_id : int
        Spark's id of the batch; for a DStream, its time in milliseconds since 1970.
    events, signal, bad : int
        How many events the batch had, how many of them are signal, and how many records are bad.
    seconds : float
        Processing time.
    lag : int or None
        How many records were left in the topic after the batch; None if unknown.
    planned_at : int or None
        When the batch was planned, in milliseconds since 1970, if its id is not that time:
        Structured Streaming numbers its batches.

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
        """When the batch was planned, in milliseconds since 1970."""
        return self.batch_id if self.planned_at is None else self.planned_at

    @property
    def events_per_second(self) -> float:
        """Events per second of processing time; NaN if the batch took no time."""
        return self.events / self.seconds if self.seconds else math.nan


def open_display(contents: Callable[[], Contents]) -> Callable[[Batch], None]:
    """Display a new table below a notebook's cell; elsewhere, print a line per batch.

    Parameters
    ----------
    contents : callable
        Returns the table's current content.

    Returns
    -------
    callable
        Shows a batch that has been added.
    """
    if in_notebook():
        from IPython.display import display  # a driver on a cluster's machine may not have it

        table = display(contents(), raw=True, display_id=True)
        return lambda batch: table.update(contents(), raw=True)
    heading = [_line(_HEADINGS)]

    def show(batch: Batch) -> None:
        print(*heading, _line(_cells(batch)), sep="\n", flush=True)
        heading.clear()

    return show


def in_notebook() -> bool:
    """Return whether this is a Jupyter kernel, as opposed to IPython in a terminal."""
    ipython = sys.modules.get("IPython")  # which a kernel has imported
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def shortened(name: str) -> str:
    """Return a name, truncated if it is too long to show."""
    return name if len(name) <= CHARACTERS_SHOWN else f"{name[:CHARACTERS_SHOWN]}..."


def about_unused(names: Iterable[str]) -> str:
    """Return a sentence about unused fields in the records."""
    return f"fields that are not used: {', '.join(sorted(names))} (they are ignored)"


def _cells(batch: Batch) -> tuple[str, ...]:
    """Return a batch as strings, in the order of the headings."""
    moment = datetime.fromtimestamp(batch.time / 1000, UTC)
    lag = _UNKNOWN if batch.lag is None else f"{batch.lag:,}"
    return (f"{moment:%H:%M:%S}", *_figures(batch), lag)


def _figures(batch: Batch) -> tuple[str, ...]:
    rate = batch.events_per_second
    counts = (f"{count:,}" for count in (batch.events, batch.signal, batch.bad))
    return (*counts, f"{batch.seconds:,.1f}", _UNKNOWN if math.isnan(rate) else f"{rate:,.0f}")


def _line(cells: Sequence[str]) -> str:
    """Return cells as a line, with the time left-aligned and numbers right-aligned."""
    numbers = (cell.rjust(width) for cell, width in zip(cells[1:], _WIDTHS[1:], strict=True))
    return "  ".join([cells[0].ljust(_WIDTHS[0]), *numbers]).rstrip()


def contents_of(batches: Sequence[Batch], totals: Counter[str], unused: set[str]) -> Contents:
    """Return the table for notebooks, as HTML and as text."""
    rows = [_cells(batch) for batch in batches[-ROWS_SHOWN:]]
    names = ("events", "signal", "bad", "seconds")
    total = ("total", *_figures(Batch(0, **{name: totals[name] for name in names})), "")
    notes = []
    if totals["batches"] > ROWS_SHOWN:
        batches = f"{totals['batches']:,} batches"
        notes.append(f"the last {ROWS_SHOWN} of {batches}; the total includes all")
    if unused:
        notes.append(about_unused(unused))
    text = "\n".join([*map(_line, (_HEADINGS, *rows, total)), *notes])
    return {"text/html": _html(rows, total, notes), "text/plain": text}


def _html(rows: Iterable[Sequence[str]], total: Sequence[str], notes: Iterable[str]) -> str:
    """Return the table as HTML that inherits the page's colours, light or dark."""
    body = "".join(_html_row("td", row) for row in rows)
    notes = "".join(f"<div>{html.escape(note)}</div>" for note in notes)
    return (
        '<table style="border-collapse: collapse; font-variant-numeric: tabular-nums">'
        f"<thead>{_html_row('th', _HEADINGS, 'border-bottom: 1px solid; ')}</thead>"
        f"<tbody>{body}</tbody>"
        f"<tfoot>{_html_row('th', total, 'border-top: 1px solid; ')}</tfoot></table>{notes}"
        f"{_link_to_spark()}"
    )


def _html_row(tag: str, cells: Iterable[str], style: str = "") -> str:
    style += "text-align: right; padding: 0.2em 0.8em"
    row = "".join(f'<{tag} style="{style}">{cell}</{tag}>' for cell in cells)
    return f"<tr>{row}</tr>"


def _link_to_spark() -> str:
    """Return a link to Spark's web page, as HTML, if JupyterHub makes the page available."""
    prefix = os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    context = SparkContext._active_spark_context
    if not (prefix and context and find_spec("jupyter_server_proxy")):
        return ""
    try:
        page = context.uiWebUrl
    except Exception:  # the session is being stopped
        page = None
    if page is None:
        return ""
    address = html.escape(f"{prefix}proxy/{urlsplit(page).port}/jobs/")
    return f'<div><a href="{address}" target="_blank">Spark UI</a></div>'
