"""The errors of a sink."""

from __future__ import annotations


class SinkError(RuntimeError):
    """Nothing is written or can be read; the message says why and what to do."""


def taken_over(path: str) -> SinkError:
    """Return the error for a sink whose path is owned by another sink.

    Examples
    --------
    >>> raise taken_over("scored")
    Traceback (most recent call last):
    ...
    helpers.sinks.errors.SinkError: another job writes to scored: stop it, or give this one
    another path. Nothing of this batch is committed.
    """
    return SinkError(
        f"another job writes to {path}: stop it, or give this one another path. Nothing of this "
        "batch is committed."
    )
