"""Helpers of the tests that start programs: run Python, and wait for conditions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, seconds: float = 120, **options) -> subprocess.CompletedProcess:
    """Run this Python with arguments, from the repository's root."""
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=seconds, **options
    )


def dry_run_make(*arguments: str) -> str:
    """Return the commands that `make` would run, as if typed in a shell of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    run = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=30, env=environment, check=True,
    )
    return run.stdout


def wait_until(condition: Callable[[], object], seconds: float = 60) -> object:
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
