"""How much of this machine a process may use: its cores, and its free memory.

In a container or on JupyterHub, that is less than the machine has. The limits come from Linux'
control groups, versions 1 and 2, and from the variables that JupyterHub sets.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

# Where Linux shows control groups, and those of this process.
_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")

_UNLIMITED = 2**60  # version 1 has a number near 2**63 for 'no limit'


def available_cores() -> int:
    """Return how many cores this process may use, rounded up, as Java does.

    Examples
    --------
    >>> 1 <= available_cores() <= os.cpu_count()
    True
    """
    try:
        cores: float = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    limits = [_number(os.environ.get("CPU_LIMIT", ""))]
    for group in _groups("cpu"):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        limits.append(_ratio(quota, period))
        limits.append(_ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")))
    return math.ceil(min([cores, *(limit for limit in limits if limit and limit > 0)]))


def available_memory() -> int:
    """Return how many bytes of memory are free for this process.

    Examples
    --------
    >>> available_memory() > 0
    True
    """
    import psutil  # workers, which import this package as well, may not have it

    free = [psutil.virtual_memory().available]
    limit = _number(os.environ.get("MEM_LIMIT", ""))
    if limit and limit > 0:
        free.append(int(limit))
    for group in _groups("memory"):
        for limit_file, used_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.high", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _number(_read(group / limit_file)), _number(_read(group / used_file))
            if limit is not None and used is not None and limit < _UNLIMITED:
                # Linux frees this part of the cache as soon as the memory is needed.
                free.append(int(limit - used + _statistic(group, cache)))
    return max(0, min(free))


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of the groups that limit this process, from the innermost outwards."""
    for line in _read(_MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root = _GROUPS
        elif controller in controllers.split(","):
            root = next(
                (_GROUPS / name for name in (controller, controllers) if (_GROUPS / name).exists()),
                _GROUPS,
            )
        else:
            continue
        # In a container, the path may be one outside of it. Its own group is then the root.
        folder = root / path.lstrip("/")
        yield from (each for each in (folder, *folder.parents) if each.is_relative_to(root))


def _read(file: Path) -> str:
    """Return a file's text; an empty one if there is no such file."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _number(text: str) -> float | None:
    """Return a finite number; None if the text is something else, such as 'max'."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    return None


def _ratio(quota: str, period: str) -> float | None:
    """Return how many cores a quota of microseconds per period is; None if there is no quota."""
    microseconds, each = _number(quota), _number(period)
    return microseconds / each if microseconds and each else None


def _statistic(group: Path, name: str) -> float:
    """Return a number from a group's statistics of memory."""
    lines = (line.partition(" ") for line in _read(group / "memory.stat").splitlines())
    return next((_number(value) or 0.0 for key, _, value in lines if key == name), 0.0)
