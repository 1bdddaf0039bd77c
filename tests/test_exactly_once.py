"""A driver that dies at the worst moments: each event is in the sink once, with either engine."""

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
    """A topic with a number in each record."""
    numbers = [str(number).encode() for number in range(VALUES)]
    produce(topic, numbers, numbers)
    return topic


@pytest.fixture
def run(kafka, filled, tmp_path):
    """Run the program to its end, and return how it ended and what it printed."""

    def run(engine, point):
        command = [sys.executable, str(PROGRAM), engine, kafka.bootstrap_servers, filled]
        here = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
        with running([*command, str(tmp_path), point], env={**os.environ, **here}) as process:
            printed, _ = process.communicate(timeout=600)
        return process.returncode, printed

    return run


def stored(spark, folder):
    """Return the ids of the events that count so far."""
    return [row.EventId for row in read_scored(spark, f"{folder}/scored").collect()]


@pytest.mark.parametrize(
    "engine, points",
    [
        ("dstream", POINTS[:-1]),
        ("structured", ["before committing"]),
        pytest.param("structured", POINTS[:-1], marks=pytest.mark.long),
    ],
)
def test_a_driver_that_dies_anywhere_loses_and_repeats_nothing(
    spark, run, engine, points, tmp_path
):
    """Otherwise the results would be wrong after a crash, and nobody would see it."""
    before = 0
    for point in points:
        code, printed = run(engine, point)
        assert code == -signal.SIGKILL, printed
        now = stored(spark, tmp_path)
        assert len(now) == len(set(now)) and before < len(now) < VALUES
        before = len(now)
    shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)  # the sink alone knows where
    code, printed = run(engine, "nowhere")
    assert (code, printed.splitlines()[-1]) == (0, "done"), printed
    assert sorted(stored(spark, tmp_path)) == list(range(VALUES))
