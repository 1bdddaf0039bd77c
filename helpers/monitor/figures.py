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
