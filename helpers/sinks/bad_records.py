"""Policies for records that are not events, one function each.

A policy takes the bad records in a batch's files and the batch's offset ranges, and returns how
many of the records could not be sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from pyspark.sql import DataFrame

from helpers.records import BadRecordError
from helpers.sinks.dead_letters import send_dead_letters
from helpers.streaming import OffsetRange

Policy = Callable[[DataFrame, Iterable[OffsetRange]], int]

ON_BAD_RECORD = ("dead-letter", "skip", "stop")


def policy_for(on_bad_record: str, settings: Mapping[str, str] | None) -> Policy:
    """Return the function that handles bad records.

    Parameters
    ----------
    on_bad_record : str
        One of `ON_BAD_RECORD`.
    settings : mapping, optional
        Kafka client settings, required for dead letters.

    Raises
    ------
    ValueError
        If there is no such policy, or there are no settings for dead letters.

    Examples
    --------
    >>> policy_for("skip", None)(bad=None, ranges=[])
    0
    """
    if on_bad_record not in ON_BAD_RECORD:
        raise ValueError(
            f"on_bad_record is {on_bad_record!r}: it must be {', '.join(ON_BAD_RECORD)}."
        )
    if on_bad_record == "dead-letter" and not settings:
        raise ValueError("dead letters are sent to Kafka: pass its settings as well.")
    return {"dead-letter": partial(_send, settings), "skip": _skip, "stop": _stop}[on_bad_record]


def _stop(bad: DataFrame, ranges: Iterable[OffsetRange]) -> int:
    """Fail the batch, naming the offset of its first bad record."""
    place = ("topic", "partition", "offset")
    first = bad.select(*place, "bad.reason").orderBy(*place).first()
    raise BadRecordError(
        f"{first.topic}, partition {first.partition}, offset {first.offset} is not an event: "
        f"{first.reason}. To continue without such records, set on_bad_record to dead-letter "
        "or skip."
    )


def _skip(bad: DataFrame, ranges: Iterable[OffsetRange]) -> int:
    """Leave the records in the sink's files, where `read_bad_records` finds them."""
    return 0


def _send(settings: Mapping[str, str], bad: DataFrame, ranges: Iterable[OffsetRange]) -> int:
    """Send the records to their dead-letter topics."""
    return send_dead_letters(bad, settings, {part.topic: part.topic_id for part in ranges})
