"""The folder of a running Spark's temporary files and log."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import subprocess
import tempfile
from pathlib import Path

# Repeated, because Java may still be shutting down and write more files. A service manager sends
# signals to all processes of a service, also to this one.
_REMOVE_AT_THE_END = """
trap '' TERM INT HUP
cat
for attempt in 1 2 3 4 5; do rm -rf "$1"; sleep 1; test -e "$1" || exit; done
"""

# Keeps the watchers' pipes open: a garbage-collected watcher would remove its folder too early.
_WATCHERS: list[subprocess.Popen] = []


def log_file() -> Path:
    """Return the log file of the Spark that `get_spark` started.

    Examples
    --------
    >>> log_file().name
    'spark.log'
    """
    return scratch_folder() / "spark.log"


@functools.cache
def scratch_folder() -> Path:
    """Return the folder for Spark's temporary files, which is removed when this process ends.

    Examples
    --------
    >>> scratch_folder().is_dir()
    True
    """
    folder = tempfile.mkdtemp(prefix="spark-")
    # The watcher reads from a pipe that only this process holds: end of file means it has ended.
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE_AT_THE_END, "watcher", folder],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    _WATCHERS.append(watcher)
    # systemd removes what has not been used in /tmp for ten days, but nothing in a locked folder.
    with contextlib.suppress(OSError):  # a file system may have no locks
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)
    return Path(folder)
