"""The manifests of a sink: numbered files, the last of which defines what is stored.

A manifest is published atomically, which fails if its name is taken. It lists all committed files,
so earlier manifests are not needed, and the sink removes all but the most recent ones. Because a
late sink could then reuse a removed number, it checks that its manifest is the last.
"""

from __future__ import annotations

import contextlib
import uuid
from collections import defaultdict, deque
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from pyspark.sql import SparkSession

from helpers.sinks.errors import taken_over
from helpers.sinks.progress import Progress
from helpers.spark import JsonFolder
from helpers.streaming import TopicAndPartition

# The files of this many batches are merged into one, and this many merged files are merged again,
# or as many as together stay below the size limit: rewriting a gigabyte takes minutes and gains
# nothing.
FAN_IN = 100
LARGEST_MERGE = 256 * 1024**2

# How long the original files are kept after a merge, for readers that started before it.
KEPT_SECONDS = 3600

# How many manifests are kept, for readers that have listed them but not yet read the last one.
MANIFESTS_KEPT = 20

_MEANING = ("event_id", "signal_index")


@dataclass(frozen=True)
class Part:
    """The files of a batch, or of several batches whose files were merged.

    Attributes
    ----------
    first : int
        The number of the first batch.
    level : int
        How many times the rows were merged.
    folder : str
        The folder in the sink's ``data``.
    files : list of str
        The file names.
    rows, size : int
        The total number of rows and bytes.
    """

    first: int
    level: int
    folder: str
    files: list[str]
    rows: int
    size: int

    def outermost(self) -> str:
        """Return the top-level folder in ``data``."""
        return self.folder.partition("/")[0]


@dataclass(frozen=True)
class State:
    """The state of a sink after a manifest.

    Attributes
    ----------
    number : int
        The manifest's number; -1 if there is none yet.
    meaning : dict
        Settings that must not change from batch to batch: ``event_id`` and ``signal_index``.
    progress : Progress
        The offsets stored so far.
    parts : list of Part
        The committed files, in the order of their batches.
    replaced : list of (str, float)
        Folders below ``data`` whose files were merged, and when.
    """

    number: int = -1
    meaning: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    parts: list[Part] = field(default_factory=list)
    replaced: list[tuple[str, float]] = field(default_factory=list)

    def mergeable(self, failed: Collection[str] = ()) -> list[Part]:
        """Return the parts to merge next: as many from a full group of one level as fit.

        Parameters
        ----------
        failed : collection of str
            The folders of parts whose merge failed and need not be retried.

        Returns
        -------
        list of Part
            Two or more, or none.

        Examples
        --------
        >>> parts = [Part(number, 0, "folder", ["file"], 10, 1_000) for number in range(101)]
        >>> len(State(99, parts=parts[:99]).mergeable())
        99
        >>> State(98, parts=parts[:99]).mergeable()
        []
        """
        groups = defaultdict(list)
        for part in self.parts:
            span = FAN_IN ** (part.level + 1)
            is_full = part.first // span < (self.number + 1) // span
            # Two parts of up to half the limit always fit together.
            if is_full and part.size <= LARGEST_MERGE // 2:
                groups[part.level, part.first // span].append(part)
        for group in groups.values():
            run = _longest_run(group)
            if len(run) > 1 and not any(part.folder in failed for part in run):
                return run
        return []

    def new_folder(self) -> str:
        """Return the next batch's folder; batches that will be merged share a parent folder."""
        number = self.number + 1
        return f"{number // FAN_IN:020d}/{number:020d}-{uuid.uuid4()}"

    def with_batch(self, part: Part, progress: Progress) -> State:
        """Return the state after the next batch."""
        return replace(self, number=self.number + 1, progress=progress, parts=[*self.parts, part])

    def merged(self, group: list[Part], part: Part, now: float) -> State:
        """Return the next state, in which a part replaces those that were merged into it."""
        parts = sorted([*(p for p in self.parts if p not in group), part], key=lambda p: p.first)
        kept = [(folder, since) for folder, since in self.replaced if now - since < KEPT_SECONDS]
        used = {part.outermost() for part in parts}
        # A folder of many batches is replaced as a whole, unless some of them weren't merged.
        folders = (p.folder if p.outermost() in used else p.outermost() for p in group)
        kept += [(folder, now) for folder in dict.fromkeys(folders)]
        return replace(self, number=self.number + 1, parts=parts, replaced=kept)

    def outdated(self, now: float) -> list[str]:
        """Return folders in ``data`` that no reader needs any longer."""
        used = {part.outermost() for part in self.parts}
        return [
            folder
            for folder, since in self.replaced
            if now - since >= KEPT_SECONDS and folder not in used
        ]

    def folders(self) -> set[str]:
        """Return the folders in ``data`` that belong to the sink, and those that contain them."""
        names = {part.folder for part in self.parts} | {folder for folder, _ in self.replaced}
        return names | {name.partition("/")[0] for name in names}


class CommitLog:
    """The manifests of a sink.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        The session whose Hadoop client is used.
    path : str
        The sink's path.

    Examples
    --------
    >>> log = CommitLog(spark, str(getfixture("tmp_path") / "scored"))
    >>> log.write(State(number=0, progress=Progress({TopicAndPartition("events", 0): 10})))
    >>> log.last().progress.positions
    {TopicAndPartition(topic='events', partition=0): 10}
    """

    def __init__(self, spark: SparkSession, path: str) -> None:
        self._path = path
        self._files = JsonFolder(spark, f"{path}/commits")

    def last(self) -> State:
        """Return the state in the last manifest."""
        names = self._files.names()
        if not names:
            return State()
        content = self._files.read(names[-1])
        meaning = {name: content[name] for name in _MEANING if name in content}
        positions = {
            TopicAndPartition(topic, partition): offset
            for topic, partition, offset in content["positions"]
        }
        progress = Progress(positions, content["topic_ids"])
        parts = [Part(*part) for part in content["parts"]]
        replaced = [tuple(entry) for entry in content["replaced"]]
        return State(content["batch"], meaning, progress, parts, replaced)

    def write(self, state: State, batch: Mapping[str, Any] | None = None) -> None:
        """Write a manifest, which commits its files.

        Parameters
        ----------
        state : State
            The state to write.
        batch : mapping, optional
            Information about the new batch, for people who read the manifest.

        Raises
        ------
        SinkError
            If another sink has written a manifest with this number.
        """
        positions = state.progress.positions.items()
        content = {
            "batch": state.number,
            **state.meaning,
            **(batch or {}),
            "positions": [[*astuple(part), offset] for part, offset in positions],
            "topic_ids": state.progress.topic_ids,
            "parts": [astuple(part) for part in state.parts],
            "replaced": state.replaced,
        }
        name = f"{state.number:020d}"
        try:
            self._files.write(name, content)
        except FileExistsError:
            raise taken_over(self._path) from None
        names = self._files.names()
        if names[-1] != name:  # the name was free only because another sink removed it
            self._files.delete(name)
            raise taken_over(self._path)
        with contextlib.suppress(Exception):  # the next batch retries
            for old in names[:-MANIFESTS_KEPT]:
                self._files.delete(old)

    def is_last(self, state: State) -> bool:
        """Return whether the last manifest is a state's; no other state has the same files."""
        last = self.last()
        return (last.number, last.parts) == (state.number, state.parts)


def _longest_run(group: list[Part]) -> list[Part]:
    """Return the longest run of consecutive parts that together stay below the size limit."""
    longest: list[Part] = []
    run: deque[Part] = deque()
    size = 0
    for part in group:
        run.append(part)
        size += part.size
        while size > LARGEST_MERGE:
            size -= run.popleft().size
        if len(run) > len(longest):
            longest = list(run)
    return longest
