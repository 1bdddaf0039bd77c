"""The manifests of a sink: numbered files, of which the last one says what is stored.

A manifest gets its name in one step that fails where the name is taken. It names all files that
count, so nobody needs the manifests before it, and the sink removes all but the last ones. A late
sink could then write one of a removed number: it looks whether its number is the last.
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

# So many batches' files are merged into one, and so many merged ones again, or as many of them as
# are no larger than this together: a rewritten gigabyte takes minutes, and brings nothing.
FAN_IN = 100
LARGEST_MERGE = 256 * 1024**2

# How long merged files stay where they were, for readers that began before.
KEPT_SECONDS = 3600

# How many manifests are kept, for readers that have listed them and not read the last one yet.
MANIFESTS_KEPT = 20

_MEANING = ("event_id", "signal_index")
_OLD_MANIFEST = (
    "batch bigint, event_id string, folder string, files array<string>, events bigint, bad bigint"
)


@dataclass(frozen=True)
class Part:
    """Files with the events of a batch, or of several batches whose files were merged.

    Attributes
    ----------
    first : int
        The number of its first batch.
    level : int
        How often its rows were merged.
    folder : str
        The folder in the sink's ``data``.
    files : list of str
        The files' names.
    rows, size : int
        How many rows they have, and how many bytes.
    """

    first: int
    level: int
    folder: str
    files: list[str]
    rows: int
    size: int

    def outermost(self) -> str:
        """Return the folder directly in ``data``."""
        return self.folder.partition("/")[0]


@dataclass(frozen=True)
class State:
    """What is stored after a manifest.

    Attributes
    ----------
    number : int
        The manifest's number; -1 if there is none yet.
    meaning : dict
        What must not change from batch to batch: ``event_id`` and ``signal_index``.
    progress : Progress
        How far the sink has come.
    parts : list of Part
        The files that count, in the order of their batches.
    replaced : list of (str, float)
        Folders in ``data``, or in those there, whose files were merged, and when that was.
    """

    number: int = -1
    meaning: dict[str, Any] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    parts: list[Part] = field(default_factory=list)
    replaced: list[tuple[str, float]] = field(default_factory=list)

    def mergeable(self, failed: Collection[str] = ()) -> list[Part]:
        """Return the files to merge next: as many of a level's full group as may become one.

        Parameters
        ----------
        failed : collection of str
            The folders of parts with which a merge fails, and need not be tried again.

        Returns
        -------
        list of Part
            Two or more; none if there is nothing to merge.

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
            # Two of any others fit together.
            if is_full and part.size <= LARGEST_MERGE // 2:
                groups[part.level, part.first // span].append(part)
        for group in groups.values():
            run = _longest_run(group)
            if len(run) > 1 and not any(part.folder in failed for part in run):
                return run
        return []

    def new_folder(self) -> str:
        """Return a name for the folder of the next batch: those that are merged stand together."""
        number = self.number + 1
        return f"{number // FAN_IN:020d}/{number:020d}-{uuid.uuid4()}"

    def with_batch(self, part: Part, progress: Progress) -> State:
        """Return the state after the next batch."""
        return replace(self, number=self.number + 1, progress=progress, parts=[*self.parts, part])

    def merged(self, group: list[Part], part: Part, now: float) -> State:
        """Return the next state, with a part in the place of those that were merged into it."""
        parts = sorted([*(p for p in self.parts if p not in group), part], key=_first)
        kept = [(folder, since) for folder, since in self.replaced if now - since < KEPT_SECONDS]
        used = {part.outermost() for part in parts}
        # A folder of many batches goes as a whole, unless it has some that weren't merged.
        folders = (p.folder if p.outermost() in used else p.outermost() for p in group)
        kept += [(folder, now) for folder in dict.fromkeys(folders)]
        return replace(self, number=self.number + 1, parts=parts, replaced=kept)

    def outdated(self, now: float) -> list[str]:
        """Return folders in ``data`` that no reader needs any more."""
        used = {part.outermost() for part in self.parts}
        return [
            folder
            for folder, since in self.replaced
            if now - since >= KEPT_SECONDS and folder not in used
        ]

    def folders(self) -> set[str]:
        """Return the folders in ``data`` that belong to the sink."""
        replaced = {folder.partition("/")[0] for folder, _ in self.replaced}
        return {part.outermost() for part in self.parts} | replaced


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
        self._spark, self._path = spark, path
        self._files = JsonFolder(spark, f"{path}/commits")

    def last(self) -> State:
        """Return what the last manifest says."""
        names = self._files.names()
        if not names:
            return State()
        content = self._files.read(names[-1])
        meaning = {name: content[name] for name in _MEANING if name in content}
        positions = {
            TopicAndPartition(topic, partition): offset
            for topic, partition, offset in content["positions"]
        }
        # An older kit wrote no ids: the next batch of each topic brings its id.
        progress = Progress(positions, content.get("topic_ids", {}))
        parts = [Part(*part) for part in content["parts"]] if "parts" in content else self._old()
        replaced = [tuple(entry) for entry in content.get("replaced", [])]
        return State(content["batch"], meaning, progress, parts, replaced)

    def write(self, state: State, batch: Mapping[str, Any] | None = None) -> None:
        """Write a manifest, from which on its files count.

        Parameters
        ----------
        state : State
            What is stored with it.
        batch : mapping, optional
            What is new in it, for people who look.

        Raises
        ------
        SinkError
            If another sink has written one of this number.
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
        name = _name(state)
        try:
            self._files.write(name, content)
        except FileExistsError:
            raise taken_over(self._path) from None
        names = self._files.names()
        if names[-1] != name:  # it was free because another sink has removed it
            self._files.delete(name)
            raise taken_over(self._path)
        with contextlib.suppress(Exception):  # the next batch tries it again
            for old in names[:-MANIFESTS_KEPT]:
                self._files.delete(old)

    def is_last(self, state: State) -> bool:
        """Tell whether the last manifest is that of a state, whose files nobody else has."""
        name = _name(state)
        if self._files.names()[-1:] != [name]:
            return False
        return [Part(*part) for part in self._files.read(name)["parts"]] == state.parts

    def _old(self) -> list[Part]:
        """Return the files of an older kit's manifests, each of which named its own only."""
        manifests = self._spark.read.schema(_OLD_MANIFEST).json(self._files.uri).collect()
        parts = [
            Part(found.batch, 0, found.folder, found.files, found.events + found.bad, size=0)
            for found in manifests
        ]
        return sorted(parts, key=_first)


def _longest_run(group: list[Part]) -> list[Part]:
    """Return the most parts of a group, one after another, that are small enough together."""
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


def _name(state: State) -> str:
    return f"{state.number:020d}"


def _first(part: Part) -> int:
    return part.first
