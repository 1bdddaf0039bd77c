"""Exactly-once delivery to the sink when the driver dies, with either engine."""

import os
import shutil
import signal
import sys

import pytest
from failing_stream import POINTS
from processes import ROOT, running

from helpers.sinks import read_scored

PROGRAM = ROOT / "tests" / "failing_stream.py"
VALUES = 500


@pytest.fixture
def filled(topic, produce):
    """A topic whose records are numbers."""
    numbers = [str(number).encode() for number in range(VALUES)]
    produce(topic, numbers, numbers)
    return topic


@pytest.fixture
def run(kafka, filled, tmp_path):
    """Run the program to its end, and return its exit status and output."""

    def run(engine, point):
        command = [sys.executable, str(PROGRAM), engine, kafka.bootstrap_servers, filled]
        here = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
        with running([*command, str(tmp_path), point], env={**os.environ, **here}) as process:
            printed, _ = process.communicate(timeout=600)
        return process.returncode, printed

    return run


def stored(spark, folder):
    """Return the ids of the events committed so far."""
    return [row.EventId for row in read_scored(spark, f"{folder}/scored").collect()]


@pytest.mark.parametrize(
    "engine, points",
    [
        ("dstream", ["before committing"]),
        ("structured", ["before committing"]),
        pytest.param("dstream", POINTS[:-1], marks=pytest.mark.long),
        pytest.param("structured", POINTS[:-1], marks=pytest.mark.long),
    ],
)
def test_a_driver_that_dies_anywhere_loses_and_repeats_nothing(
    spark, run, engine, points, tmp_path
):
    """Each event is stored exactly once, wherever the driver dies."""
    before = 0
    for point in points:
        code, printed = run(engine, point)
        assert code == -signal.SIGKILL, printed
        now = stored(spark, tmp_path)
        assert len(now) == len(set(now)) and before < len(now) < VALUES
        before = len(now)
    shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)  # only the sink knows the offsets
    code, printed = run(engine, "nowhere")
    assert (code, printed.splitlines()[-1]) == (0, "done"), printed
    assert sorted(stored(spark, tmp_path)) == list(range(VALUES))
