"""Helpers for tests that start programs: run Python, and wait for conditions."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parent.parent


def run_python(*arguments: str, seconds: float = 1_200, **options) -> subprocess.CompletedProcess:
    """Run this Python interpreter with arguments, in the repository's root."""
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL, **options}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=seconds, **options
    )


def dry_run_make(*arguments: str) -> str:
    """Return the commands that `make` would run if it were called from a shell."""
    run = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=30, env=without_make(), check=True,
    )
    return run.stdout


@contextlib.contextmanager
def running(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """Run a command in the background; at exit, end its process group within 60 s."""
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


def end(process: subprocess.Popen) -> None:
    """End a process, first with SIGTERM, and wait for it."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    process.kill()
    process.wait(30)


def arrange_spark(package: Path, home: Path) -> Path:
    """Arrange a PySpark from PyPI as in Spark's archive, which SPARK_HOME names; return `home`."""
    (home / "python").mkdir()
    (home / "python" / "pyspark").symlink_to(package)
    (home / "python" / "lib").symlink_to(package / "python" / "lib")
    for folder in ("bin", "jars"):
        (home / folder).symlink_to(package / folder)
    return home


def listening(process: psutil.Process) -> set[tuple[str, str, int]]:
    """Return name, IP and port of the listening sockets of a process and its descendants."""
    found = set()
    for part in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {
                (part.name(), connection.laddr.ip, connection.laddr.port)
                for connection in part.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
    return found


def beyond_loopback(addresses: Iterable[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    """Return the IPv4 and IPv6 addresses that other machines can reach."""
    reachable = []
    for name, ip, port in sorted(addresses):
        address = ipaddress.ip_address(ip.partition("%")[0])
        if not (getattr(address, "ipv4_mapped", None) or address).is_loopback:
            reachable.append((name, ip, port))
    return reachable


@contextlib.contextmanager
def watched(
    command: list[str], **options
) -> Iterator[tuple[subprocess.Popen, set[tuple[str, str, int]]]]:
    """Run a command, and collect the addresses on which it and its descendants listen."""
    seen, over = set(), threading.Event()

    def look():
        while not over.is_set():
            with contextlib.suppress(psutil.NoSuchProcess):
                seen.update(listening(psutil.Process(process.pid)))
            over.wait(0.2)

    with running(command, **options) as process:
        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield process, seen
        finally:
            over.set()
            watcher.join()


def scraped(url: str) -> dict[str | tuple[str, ...], float]:
    """Return the metrics at a URL by name; those with a label by name and the label's value."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (sample.name, *sample.labels.values()) if sample.labels else sample.name: sample.value
        for family in families
        for sample in family.samples
    }


def without_make() -> dict[str, str]:
    """Return the environment without the variables that an enclosing `make` sets."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}


def wait_until(condition: Callable[[], object], seconds: float = 300) -> object:
    """Wait until a condition is true and return its value; fail after a time-out."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"still not true after {seconds} s")


def is_alive(process_id: int) -> bool:
    """Return whether a process is running; a zombie is not."""
    try:
        os.kill(process_id, 0)
        state = Path(f"/proc/{process_id}/stat")
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
