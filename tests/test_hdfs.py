"""The sink on HDFS, where renames and errors differ from those on a local disk."""

import json
import os

import pytest
from processes import ROOT, run_python


@pytest.mark.long
def test_a_sink_on_hdfs_keeps_its_promises(tmp_path):
    """On HDFS, overlapping batches are stored once, and a second writer is refused."""
    program = str(ROOT / "tests" / "sink_on_hdfs.py")
    here = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    run = run_python(program, str(tmp_path / "hdfs"), env=here, seconds=300)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["path"].startswith("hdfs://")
    assert found["offsets"] == list(range(15))
    assert "another job writes to hdfs://" in found["second sink"]
    assert "another job writes to hdfs://" in found["second manifest"]
    assert found["checkpoint"] == found["path"].replace("scored", "checkpoint")
