"""The sink on a standalone cluster whose executor doesn't share the driver's folder."""

import contextlib
import json
import os
import subprocess

import pytest
from processes import ROOT, run_python
from standalone import standalone

# The worker sees an empty file system in place of the folder.
HIDE = 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"'


def can_hide_folders():
    """Return whether this user may mount a file system for a single process."""
    command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0"', "/mnt"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


@pytest.mark.long
@pytest.mark.skipif(not can_hide_folders(), reason="needs the right to mount file systems")
def test_a_batch_that_an_executor_writes_elsewhere_is_not_stored(tmp_path):
    """A batch whose files the driver can't read is refused, and no manifest is written."""
    hidden, shared = tmp_path / "hidden", tmp_path / "shared"
    hidden.mkdir()
    shared.mkdir()
    program = str(ROOT / "tests" / "sink_on_cluster.py")
    environment = {**os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    hiding = ("unshare", "--mount", "sh", "-c", HIDE, "sh", str(hidden))
    with standalone(tmp_path, wrapper=hiding) as address:
        folders = (str(hidden), str(shared))
        run = run_python(program, address, *folders, env=environment, seconds=200)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert "driver and all executors must reach the same files" in found["hidden"]
    assert (found["manifests"], found["shared"]) == (0, 1_000)
