"""The claim of one sink on its path."""

from __future__ import annotations

import logging
import threading
import time
import uuid

from pyspark.sql import SparkSession

from helpers.files import JsonFolder
from helpers.sinks.errors import taken_over

_LOGGER = logging.getLogger(__name__)

# How often a writer shows that it lives, and how long the next one watches for that. A writer that
# is only slow, and taken for dead, does no harm: the manifest that it can't write stops it.
HEARTBEAT_SECONDS = 1.0
PATIENCE_SECONDS = 5.0

_WRITER = "writer"


class Lease:
    """The claim of one sink on a path: a file that changes as long as the sink is open.

    Raises
    ------
    SinkError
        If another sink is open on the path.
    """

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._path, self._id = path, str(uuid.uuid4())
        self._folder = JsonFolder(spark, f"{path}/writer")
        self._closed = threading.Event()
        self._wait_for_a_dead_one()
        try:
            self._folder.write(_WRITER, {"id": self._id})
        except FileExistsError:
            raise taken_over(path) from None
        self._thread = threading.Thread(target=self._show_life, name="sink-heartbeat", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise `SinkError` if another sink has taken this one for dead."""
        if not self._is_mine():
            raise taken_over(self._path)

    def close(self) -> None:
        """Give the path free."""
        self._closed.set()
        self._thread.join()
        if self._is_mine():
            self._folder.delete(_WRITER)

    def _wait_for_a_dead_one(self) -> None:
        """Remove the claim of a sink that shows no life for a while; raise if it does."""
        seen = self._folder.changed_at(_WRITER)
        if seen is None:
            return
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (now := self._folder.changed_at(_WRITER)) == seen:
            if time.monotonic() > deadline:
                self._folder.delete(_WRITER)
                return
            time.sleep(HEARTBEAT_SECONDS / 4)
        if now is not None:
            raise taken_over(self._path)

    def _is_mine(self) -> bool:
        try:
            return self._folder.read(_WRITER)["id"] == self._id
        except FileNotFoundError:
            return False

    def _show_life(self) -> None:
        while not self._closed.wait(HEARTBEAT_SECONDS):
            try:
                self._folder.touch(_WRITER)
            except Exception as error:  # the sink goes on without, until its next batch checks
                if not self._closed.is_set():
                    _LOGGER.warning("the claim on %s can't be renewed: %s", self._path, error)
                return
