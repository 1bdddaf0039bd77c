"""The sink on a standalone cluster whose executor doesn't share the driver's folder."""

import contextlib
import json
import os
import re
import subprocess

import pytest
from processes import ROOT, run_python, running, wait_until

from helpers.spark import spark_home

# The worker sees an empty file system in place of the folder.
HIDE = 'mount -t tmpfs tmpfs "$1" && shift && exec "$@"'


def can_hide_folders():
    """Return whether this user may mount a file system for a single process."""
    command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs "$0"', "/mnt"]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


def line_with(log, pattern):
    """Wait until a pattern matches in a log, and return the match."""
    return wait_until(lambda: re.search(pattern, log.read_text(errors="replace")))


@pytest.mark.long
@pytest.mark.skipif(not can_hide_folders(), reason="needs the right to mount file systems")
def test_a_batch_that_an_executor_writes_elsewhere_is_not_stored(tmp_path):
    """A batch whose files the driver can't read is refused, and no manifest is written."""
    folders = [tmp_path / name for name in ("hidden", "shared", "work")]
    for folder in folders:
        folder.mkdir()
    hidden, shared, work = map(str, folders)
    local = {
        **os.environ, "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_HOME": str(spark_home()),
        "SPARK_WORKER_DIR": work, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    start = [str(spark_home() / "bin" / "spark-class")]
    deploy, web = "org.apache.spark.deploy", ("--webui-port", "0")
    logs = [tmp_path / "master.log", tmp_path / "worker.log"]
    with contextlib.ExitStack() as processes:
        first, second = (processes.enter_context(log.open("w")) for log in logs)
        master = [*start, f"{deploy}.master.Master", "--host", "127.0.0.1", "--port", "0", *web]
        processes.enter_context(running(master, env=local, stderr=first))
        address = line_with(logs[0], r"spark://127\.0\.0\.1:\d+").group()
        worker = [*start, f"{deploy}.worker.Worker", "--host", "127.0.0.1", "--cores", "1",
                  "--memory", "1g", *web, address]  # fmt: skip
        hiding = ["unshare", "--mount", "sh", "-c", HIDE, "sh", hidden, *worker]
        processes.enter_context(running(hiding, env=local, stderr=second))
        line_with(logs[1], "Successfully registered with master")
        program = str(ROOT / "tests" / "sink_on_cluster.py")
        run = run_python(program, address, hidden, shared, env=local, seconds=200)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert "driver and all executors must reach the same files" in found["hidden"]
    assert (found["manifests"], found["shared"]) == (0, 1_000)
