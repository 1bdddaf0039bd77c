"""Whether Java has exited, and why, for error messages: Python only notices refused connections."""

from __future__ import annotations

import os
import subprocess

from pyspark import SparkContext

from helpers.spark.scratch import log_file

_TAIL = 2**20  # bytes; the log of a long run may not fit in memory
_LOG_END = 500  # characters

END_SECONDS = 10  # how long Java may still be exiting when Python notices the first error


def java_has_exited(seconds: float = 0.0) -> bool:
    """Return whether the Java process that this one started has exited.

    Parameters
    ----------
    seconds : float
        How long to wait for that; `END_SECONDS` after an error.

    Examples
    --------
    >>> java_has_exited()
    False
    """
    process = getattr(SparkContext._gateway, "proc", None)
    if process is None:  # spark-submit started Java, which started this process
        return False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def java_ran_out_of_memory() -> bool:
    """Return whether Java's log reports that memory ran out.

    Examples
    --------
    >>> java_ran_out_of_memory()
    False
    """
    return "OutOfMemoryError" in _log_tail(_TAIL)


def log_end() -> str:
    """Return the end of Spark's log on one line, for a message that outlasts the log.

    Examples
    --------
    >>> len(log_end()) <= 500
    True
    """
    lines = " | ".join(_log_tail(_LOG_END).splitlines())
    text = "".join(letter if letter.isprintable() else " " for letter in lines)
    return text[-_LOG_END:] or "(nothing)"


def how_java_exited() -> str:
    """Return why Java exited, as far as its log says, and what to do.

    Examples
    --------
    >>> how_java_exited()[:24]
    'Java exited unexpectedly'
    """
    again = "restart Python (in a notebook, the kernel), because a process starts Java only once"
    if java_ran_out_of_memory():
        return (
            f"Java ran out of memory and exited; committed batches are kept. To go on, {again}, "
            'and give it more memory with get_spark(memory="4g") or spark-submit --driver-memory '
            "4g, or make batches smaller with spark.streaming.kafka.maxRatePerPartition or "
            "max.poll.records."
        )
    return (
        f"Java exited unexpectedly; committed batches are kept. To go on, {again}. The system may "
        f"have killed it to free memory. Its log ends with: {log_end()}"
    )


def _log_tail(size: int) -> str:
    """Return the last bytes of Spark's log as text; '' if there is no log."""
    try:
        with log_file().open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - size))
            return log.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
