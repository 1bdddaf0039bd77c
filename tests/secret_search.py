"""Searches for secrets while a program runs: command lines, Spark's log, and Spark's pages."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
from processes import listening

PAGES = (
    "jobs", "stages", "storage", "environment", "executors", "executors/threadDump", "SQL",
    "StreamingQuery", "streaming",
)  # fmt: skip
SPARK_PORTS = range(4040, 4057)  # of Spark's pages: the first free one
CRAWL_SECONDS = 2  # between two looks at Spark's pages
LOOK_SECONDS = 0.05  # between two looks at the command lines


class SecretSearch:
    """Looks for secrets wherever another user, or a reader of a log, could see them.

    Parameters
    ----------
    secrets : iterable of str
        The secrets.
    process_id : int
        The program; Spark may be one of its descendants.
    temporary : pathlib.Path
        The program's TMPDIR, which has the folder with Spark's log.

    Attributes
    ----------
    found : set of str
        Where a secret was.
    pages : set of str
        The pages of Spark that were read.
    log : pathlib.Path
        Spark's log, which is kept.
    """

    def __init__(self, secrets: Iterable[str], process_id: int, temporary: Path) -> None:
        self._secrets = [secret.encode() for secret in secrets]
        self._process_id, self._temporary = process_id, temporary
        self.found: set[str] = set()
        self.pages: set[str] = set()
        self._known: set[str] = set()
        self.log = temporary / "kept.log"
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(look, seconds))
            for look, seconds in ((self._look, LOOK_SECONDS), (self._crawl, CRAWL_SECONDS))
        ]

    def __enter__(self) -> SecretSearch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def look_at(self, text: str | bytes, place: str) -> None:
        """Search a text."""
        content = text.encode() if isinstance(text, str) else text
        if any(secret in content for secret in self._secrets):
            self.found.add(place)

    def look_into(self, folder: Path) -> int:
        """Search all files in a folder, and return how many there are."""
        count = 0
        for parent, _, names in os.walk(folder):  # unlike `rglob`, it takes a folder that vanishes
            for file in (Path(parent, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # Java is still removing its files
                    if file.is_file():
                        self.look_at(file.read_bytes(), str(file))
                        count += 1
        return count

    def _repeat(self, look: Callable[[], None], seconds: float) -> None:
        while not self._over.is_set():
            look()
            self._over.wait(seconds)

    def _look(self) -> None:
        """Search the command lines of all processes, and keep Spark's log."""
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # the process has ended
                self.look_at(line := file.read_bytes(), f"command line {line[:200]!r}")
        if not self.log.exists():
            for file in self._temporary.glob("spark-*/spark.log"):
                os.link(file, self.log)

    def _crawl(self) -> None:
        """Search all pages of Spark."""
        for page, text in self._spark_pages():
            self.pages.add(page)
            self.look_at(text, page)

    def _spark_pages(self) -> Iterator[tuple[str, str]]:
        for address in self._spark_addresses():
            for page in PAGES:
                text = _read(f"{address}/{page}/")
                yield page, text
                # Jobs, stages and streaming queries have their own pages. A link to /kill ends one.
                for link in set(re.findall(r'href="(/(?![^"]*/kill)[^"]*\?id=[^"#]*)"', text)):
                    yield link.split("?")[0], self._first(address + link.replace("&amp;", "&"))
            for application in _items(_read(f"{address}/api/v1/applications")):
                api = f"{address}/api/v1/applications/{application['id']}"
                yield "api environment", _read(f"{api}/environment")
                queries = _read(f"{api}/sql?details=true&length=1000")
                yield "api sql", queries
                for query in _items(queries):
                    page = f"{address}/SQL/execution/?id={query['id']}"
                    yield "SQL execution", self._first(page)

    def _first(self, address: str) -> str:
        """Return a page the first time, then '': many pages take Spark's time."""
        if address in self._known:
            return ""
        self._known.add(address)
        return _read(address)

    def _spark_addresses(self) -> list[str]:
        try:
            ports = [port for name, _, port in listening(psutil.Process(self._process_id))
                     if name == "java"]  # fmt: skip
        except psutil.NoSuchProcess:
            return []
        return [f"http://127.0.0.1:{port}" for port in ports if port in SPARK_PORTS]


def _read(address: str) -> str:
    """Return a page; '' if there is none."""
    try:
        with urllib.request.urlopen(address, timeout=5) as page:
            return page.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _items(text: str) -> list[dict[str, object]]:
    """Return the objects of a JSON list; none if Spark's pages are not ready yet."""
    try:
        return json.loads(text)
    except ValueError:
        return []
