"""The figures of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass


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
