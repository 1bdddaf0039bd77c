"""The cores and the memory that a process may use, in containers and on JupyterHub."""

import os
import shutil
import subprocess
import sys

import psutil
import pytest
from processes import ROOT

from helpers import preflight as checks
from helpers.spark import available_cores, available_memory, machine

GIB = 2**30


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """A function that makes this process a member of a control group with some files."""

    def make(membership, **files):
        for name, content in files.items():
            file = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        (tmp_path / "membership").write_text(membership)
        monkeypatch.setattr(machine, "_GROUPS", tmp_path)
        monkeypatch.setattr(machine, "_MEMBERSHIP", tmp_path / "membership")
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(64), raising=False)
        monkeypatch.delenv("CPU_LIMIT", raising=False)
        monkeypatch.delenv("MEM_LIMIT", raising=False)

    return make


@pytest.mark.parametrize("quota, cores", [("200000", 2), ("150000", 2), ("50000", 1), ("max", 64)])
def test_a_containers_cores_count_in_version_2(groups, quota, cores):
    """A pod with two cores on a machine with 64 gets two, and a part of a core is one."""
    groups("0::/", cpu_dot_max=f"{quota} 100000")
    assert available_cores() == cores


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("quota, cores", [("300000", 3), ("-1", 64)])
def test_a_containers_cores_count_in_version_1(groups, folder, quota, cores):
    """In version 1, controllers have folders, alone or together, and -1 is no limit."""
    files = {
        f"{folder}__cpu_dot_cfs_quota_us": quota, f"{folder}__cpu_dot_cfs_period_us": "100000"
    }  # fmt: skip
    groups("4:cpu,cpuacct:/docker/1234\n0::/", **files)
    assert available_cores() == cores


def test_the_tightest_group_counts(groups):
    """A service's limit counts inside of its slice's."""
    groups("0::/a/b", a__cpu_dot_max="200000 100000", a__b__cpu_dot_max="800000 100000")
    assert available_cores() == 2


@pytest.mark.parametrize(
    "variable, cores", [("2.0", 2), ("", 64), ("0", 64), ("many", 64), ("inf", 64), ("nan", 64)]
)
def test_jupyterhubs_limit_counts(groups, monkeypatch, variable, cores):
    """JupyterHub gives a server's limits in variables, which may be empty."""
    groups("")
    monkeypatch.setenv("CPU_LIMIT", variable)
    assert available_cores() == cores


@pytest.mark.skipif(not shutil.which("taskset"), reason="only Linux binds a process to cores")
def test_a_process_that_is_bound_to_one_core_has_one():
    """`taskset`, and Kubernetes' static policy, bind a process to some cores."""
    program = "from helpers.spark import available_cores; print(available_cores())"
    run = subprocess.run(
        ["taskset", "-c", str(min(os.sched_getaffinity(0))), sys.executable, "-c", program],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert run.stdout == "1\n"


@pytest.mark.parametrize(
    "membership, folder, limit, used, cache",
    [
        ("0::/", "", "max", "current", "inactive_file"),
        ("7:memory:/p", "memory__p__", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_containers_memory_counts(groups, membership, folder, limit, used, cache):
    """Free is what the limit leaves, and the part of the cache that can be freed."""
    files = {limit: str(GIB * 5 // 8), used: str(GIB // 4), "stat": f"{cache} {GIB // 8}\n"}
    groups(membership, **{f"{folder}memory_dot_{name}": text for name, text in files.items()})
    assert available_memory() == GIB // 2
    assert "0.5 GB free" in checks.check_memory("1g", cores=1).found


@pytest.mark.parametrize("limit", ["max", str(2**63 - 4096)])
def test_no_limit_is_the_machines_memory(groups, monkeypatch, limit):
    """Without a limit, the free memory is the machine's, also if a group is in use."""
    groups("0::/", memory_dot_max=limit, memory_dot_current=str(GIB))
    machines = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machines)
    assert available_memory() == machines.available


def test_a_session_has_a_task_per_available_core(groups, monkeypatch):
    """Spark runs as many tasks at a time as the container has cores."""
    groups("0::/", cpu_dot_max="300000 100000")
    from helpers.spark import session

    assert session._settings("app", None, 2, None, "1g", {})["spark.master"] == "local[3,4]"
