"""Folders of a running Spark: temporary files, the log, and settings that others can't read."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import subprocess
import tempfile
from pathlib import Path

from pyspark.sql import SparkSession

from helpers.spark.errors import JAVA_ERRORS
from helpers.spark.files import exact_path

_LOGGER = logging.getLogger(__name__)

# Names of files that Spark and the kit write into the checkpoint of a streaming context.
_CHECKPOINT_FILES = (
    r"\.?checkpoint-.*|[0-9a-f-]{36}|kafka-plans|receivedBlockMetadata|receivedData|temp"
)

# Repeated, because Java may still be shutting down and write more files. A service manager sends
# signals to all processes of a service, also to this one.
_REMOVE_AT_THE_END = """
trap '' TERM INT HUP
cat
for attempt in 1 2 3 4 5; do rm -rf "$1" && sleep 1 && test ! -e "$1" && exit; done
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


def protect_folder(spark: SparkSession, path: str) -> None:
    """Make a folder that holds settings, including passwords, private to this user.

    A missing folder is created. A folder that contains anything other than Spark's files stays
    unchanged, and a warning is logged.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client is used.
    path : str
        The folder's path or URI, such as a streaming context's checkpoint.

    Examples
    --------
    >>> protect_folder(spark, str(getfixture("tmp_path") / "checkpoint"))
    >>> oct((getfixture("tmp_path") / "checkpoint").stat().st_mode)
    '0o40700'
    """
    hadoop = spark._jvm.org.apache.hadoop.fs
    folder, only_mine = hadoop.Path(exact_path(spark, path)), hadoop.permission.FsPermission("700")
    files = folder.getFileSystem(spark._jsc.hadoopConfiguration())
    if not files.exists(folder):
        files.mkdirs(folder)
    elif not files.getFileStatus(folder).getPermission().toShort() & 0o077:
        return
    names = [found.getPath().getName() for found in files.listStatus(folder)]
    if all(re.fullmatch(_CHECKPOINT_FILES, name) for name in names):
        with contextlib.suppress(*JAVA_ERRORS):  # the folder belongs to another user
            files.setPermission(folder, only_mine)
            return
    _LOGGER.warning(
        "%s holds settings, including passwords, and other users can read it: chmod 700 it, or use "
        "a separate folder.", path,
    )  # fmt: skip
