"""Helpers of the tests that start programs: run Python, and wait for conditions."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, seconds: float = 1_200, **options) -> subprocess.CompletedProcess:
    """Run this Python with arguments, from the repository's root."""
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=seconds, **options
    )


def dry_run_make(*arguments: str) -> str:
    """Return the commands that `make` would run, as if typed in a shell of its own."""
    run = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=30, env=without_make(), check=True,
    )
    return run.stdout


@contextlib.contextmanager
def running(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """Run a command beside the test; at the end, end it and all that it started, within 60 s."""
    options = {"cwd": ROOT, "stderr": subprocess.STDOUT, **options}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        start_new_session=True, **options,
    )
    try:
        yield process
    finally:
        for ending in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, ending)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=30)
                break


def without_make() -> dict[str, str]:
    """Return the environment without what a `make` around the tests has put into it."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}


def wait_until(condition: Callable[[], object], seconds: float = 300) -> object:
    """Return the condition's value when it is true; fail if that takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"still not true after {seconds} s")


def is_alive(process_id: int) -> bool:
    """Tell whether a process runs; one that has ended and waits to be buried doesn't."""
    try:
        os.kill(process_id, 0)
        state = Path(f"/proc/{process_id}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
