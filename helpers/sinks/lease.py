"""A sink's exclusive claim on its path.

Claims are numbered files, and the highest number owns the path. A claim is only created, never
taken over: 1. wait until the last claim is closed, or hasn't changed for a while; 2. write the next
one, which fails if another sink did so first; 3. remove the lower ones. So two sinks that find the
same claim dead can't both own the path, and a sink that wakes up late finds a higher number.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid

from pyspark.sql import SparkSession

from helpers.sinks.errors import SinkError, taken_over
from helpers.spark import JAVA_ERRORS, JsonFolder, summary

_LOGGER = logging.getLogger(__name__)

# How often a sink renews its claim, and how long the next sink watches for a renewal. A sink that
# is merely slow but considered dead does no harm: it finds the higher claim, or its manifest's name
# taken.
HEARTBEAT_SECONDS = 1.0
PATIENCE_SECONDS = 5.0

_CLOSE_SECONDS = 10  # how long the last renewal may take

_STEP = 2_000  # ms; file systems keep the time of a change with a precision of up to a second


class Lease:
    """A sink's claim on a path, renewed while the sink is open.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client is used.
    path : str
        The sink's path.

    Raises
    ------
    SinkError
        If another sink is open on the path.

    Examples
    --------
    >>> lease = Lease(spark, str(getfixture("tmp_path") / "scored"))
    >>> lease.check()
    >>> lease.close()
    """

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._path = path
        self._claims = JsonFolder(spark, f"{path}/writer")
        self._id = str(uuid.uuid4())
        self._number = self._claim()
        self._check_times()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="sink-heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `SinkError` if another sink has since claimed the path, or the path is gone."""
        numbers = self._numbers()
        # After a removal, the next sink begins with the same number.
        if not numbers or (numbers[-1] == self._number and self._read(self._number) != self._id):
            raise SinkError(
                f"the files of {self._path} were removed while the sink was open. Nothing of this "
                "batch is committed: restore them, or begin with a new path and a new group or "
                "checkpoint."
            )
        if numbers[-1] != self._number:
            raise taken_over(self._path)

    def close(self) -> None:
        """Release the path."""
        self._closed.set()
        self._thread.join(_CLOSE_SECONDS)
        try:
            if self._thread.is_alive():
                raise TimeoutError(f"its file system gives no answer within {_CLOSE_SECONDS} s")
            if self._numbers()[-1:] == [self._number] and self._read(self._number) == self._id:
                self._claims.write(_name(self._number + 1), {"open": False})
                self._claims.delete(_name(self._number))
        except Exception as error:  # must not hide the error that ends the sink
            _LOGGER.warning(
                "the claim on %s can't be released, so the next job there waits %.0f s: %s",
                self._path, PATIENCE_SECONDS, error,
            )  # fmt: skip

    def _claim(self) -> int:
        """Write a claim above the last one, once that one is free, and return its number."""
        number = self._last_free() + 1
        try:
            self._claims.write(_name(number), {"open": True, "id": self._id})
        except FileExistsError:
            raise taken_over(self._path) from None
        *lower, highest = self._numbers()
        if highest != number:  # other sinks came and went while this one waited
            self._claims.delete(_name(number))
            raise taken_over(self._path)
        for old in lower:
            self._claims.delete(_name(old))
        return number

    def _check_times(self) -> None:
        """Raise `SinkError` if the claim's heartbeat can't be seen, as on an object store."""
        name = _name(self._number)
        before = self._claims.changed_at(name)
        if before is None:
            raise taken_over(self._path)
        reason = ""
        try:
            self._claims.touch(name, before + _STEP)
            is_seen = self._claims.changed_at(name) != before
        except (OSError, *JAVA_ERRORS) as error:
            is_seen, reason = False, f" ({summary(error)})"
        if not is_seen:
            self._claims.delete(name)
            raise SinkError(
                f"the file system of {self._path} can't set the time of a file{reason}, as object "
                "stores can't: two jobs could write there without noticing. Use HDFS or a shared "
                "disk."
            )

    def _last_free(self) -> int:
        """Return the last claim's number once it is closed or dead; raise if it is alive."""
        seen, since = None, 0.0
        while True:
            began = time.monotonic()  # a look may take long, and what it sees may be old by its end
            number = max(self._numbers(), default=-1)
            if number < 0 or not self._is_open(number):
                return number
            # The modification time is compared only with itself, because clocks may differ.
            now = number, self._claims.changed_at(_name(number))
            if seen is None:
                seen, since = now, time.monotonic()
            elif seen != now:
                raise taken_over(self._path)
            elif began - since > PATIENCE_SECONDS:
                return number
            time.sleep(HEARTBEAT_SECONDS / 4)

    def _is_open(self, number: int) -> bool:
        try:
            return self._claims.read(_name(number))["open"]
        except FileNotFoundError:  # removed in favour of a higher claim
            return True

    def _read(self, number: int) -> str | None:
        """Return the id in a claim; None if the claim is gone."""
        try:
            return self._claims.read(_name(number)).get("id")
        except FileNotFoundError:
            return None

    def _numbers(self) -> list[int]:
        return [int(name) for name in self._claims.names() if name.isdigit()]

    def _renew(self) -> None:
        """Renew the claim until the sink is closed, despite any errors."""
        failing = False
        while not self._closed.wait(HEARTBEAT_SECONDS):
            try:
                self._claims.touch(_name(self._number))
                failing = False
            except Exception as error:
                if not failing:
                    _LOGGER.warning(
                        "the claim on %s can't be renewed, and is retried: %s",
                        self._path, error,
                    )  # fmt: skip
                failing = True


def _name(number: int) -> str:
    return f"{number:020d}"
