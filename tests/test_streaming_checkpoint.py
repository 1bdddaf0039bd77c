"""A stream with a checkpoint: after a crash the same batches again, then those after them."""

import contextlib
import json
import os
import random
import sys
import time
import uuid
from collections import Counter

import psutil
import pytest
from checkpointed_stream import SECONDS, WINDOW
from processes import ROOT, running, wait_until

pytestmark = pytest.mark.long

PROGRAM = ROOT / "tests" / "checkpointed_stream.py"
LAST = b"-1"
KEYS = (b"1", b"2")  # of two partitions, by Kafka's hash


class Stream:
    """Runs of the program on one topic and one checkpoint."""

    def __init__(self, kafka, topic, folder, values, group, state):
        self.folder, self.values, self.state = folder, values, state
        self.kills = []  # when
        self.command = [sys.executable, str(PROGRAM), kafka.bootstrap_servers, topic, str(folder)]
        self.command += [group, *(["with-state"] if state else [])]

    def run(self):
        """Start the program; at the end of the `with` block it is ended, if it hasn't by itself."""
        # What a killed program leaves behind goes with the test.
        here = {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.folder)}
        return running(self.command, env={**os.environ, **here})

    def lines(self, name):
        """Return what the program has written down."""
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kill_after(self, batches):
        """Run the program until it has delivered some more batches, and kill it."""
        wanted = len(self.lines("delivered")) + batches
        with self.run() as process:
            wait_until(lambda: len(self.lines("delivered")) >= wanted, 120)
            self.kill(process)

    def kill_at_random(self, seconds, after_progress=False):
        """Run the program and kill it at a random moment after its start, or its first new records.

        Before those come the batch that was under way, once more, and the intervals in which it was
        not there.
        """
        before = self.different_records()
        with self.run() as process:
            assert "ready\n" in iter(process.stdout.readline, "")
            if after_progress:
                wait_until(lambda: self.different_records() > before, 600)
            # Not to wait for something: the moment of the kill is what is tried.
            time.sleep(random.uniform(0, seconds))
            self.kill(process)

    def kill(self, process):
        """End the driver as a crash does: its Python, its Java, and the workers, at once."""
        driver = psutil.Process(process.pid)
        for part in (driver, *driver.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        process.wait(30)
        self.kills.append(time.time())

    def was_away(self, moment):
        """Tell whether an interval began and ended while the driver was dead."""
        returns = [line["time"] for line in self.lines("starts")[1:]]
        return any(
            killed < moment - SECONDS and moment < returned
            for killed, returned in zip(self.kills, returns, strict=True)
        )

    def records(self):
        """Return how many records were delivered, repeated ones included."""
        return sum(len(line["values"]) for line in self.lines("delivered"))

    def different_records(self):
        """Return how many records were delivered, each counted once."""
        return len({value for line in self.lines("delivered") for value in line["values"]})

    def finish(self):
        """Run the program to its end."""
        with self.run() as process:
            assert process.stdout.read().endswith("done\n")
            assert process.wait(30) == 0

    def check(self):
        """Fail unless all was delivered, repeated batches alike; return which were repeated."""
        ranges = {}
        times, values = Counter(), Counter()
        for line in self.lines("delivered"):
            assert ranges.setdefault(line["time"], line["ranges"]) == line["ranges"]
            times[line["time"]] += bool(line["values"])
            values.update(line["values"])
        assert set(values) == {str(number) for number in range(self.values)} | {LAST.decode()}
        # A value comes twice only because its whole batch did.
        assert sum(values.values()) - len(values) == sum(
            (count - 1) * sum(end - start for _, start, end in ranges[batch])
            for batch, count in times.items() if count > 1
        )  # fmt: skip
        # Nothing is made up for the intervals in which no driver was there.
        missed = [line["values"] for line in self.lines("delivered") if self.was_away(line["time"])]
        assert not any(missed)
        # A window has the plans of its intervals again, also those from before a crash.
        for line in self.lines("in_windows"):
            intervals = [line["time"] - before * SECONDS for before in range(WINDOW)]
            sizes = [end - start for time in intervals for _, start, end in ranges.get(time, [])]
            assert line["count"] == sum(sizes)
        # The state is kept with the batches, so it counts each value once.
        if self.state:
            assert sum(self.lines("counted")[-1]["counts"].values()) == self.values + 1
        return {batch for batch, count in times.items() if count > 1}


@pytest.fixture
def stream_of(kafka, topic, produce, tmp_path):
    """Make a stream of so many numbers, 200 a second."""

    def make(values, group="", state=True):
        numbers = [str(number).encode() for number in range(values)]
        # As many in one partition as in the other: the last value is then the last to come.
        produce(topic, numbers, [KEYS[number % 2] for number in range(values)])
        return Stream(kafka, topic, tmp_path, values, group, state)

    return make


@pytest.fixture
def finish(topic, produce):
    """Let a stream run to the topic's end, and check what it did; return the repeated batches."""

    def run(stream):
        produce(topic, [LAST])
        stream.finish()
        return stream.check()

    return run


def test_a_killed_stream_goes_on_where_it_was(stream_of, finish):
    """After a crash, the planned batches run again as they were planned."""
    stream = stream_of(2_000, group=f"group-{uuid.uuid4()}")
    stream.kill_after(batches=3)
    assert stream.records() < 2_000
    finish(stream)
    assert any(stream.was_away(line["time"]) for line in stream.lines("delivered"))


def test_a_random_kill_loses_nothing(stream_of, finish):
    """A kill at any moment loses nothing, without a group as well."""
    stream = stream_of(2_000)
    stream.kill_at_random(9)
    finish(stream)


def test_twenty_random_kills_lose_nothing(stream_of, finish):
    """Twenty kills lose nothing, and repeat only whole batches."""
    # Without a state: when a driver dies while it catches up, Spark may have deleted files of the
    # state that its last checkpoint still names (one of 40 kills here), and doesn't start again.
    stream = stream_of(40_000, state=False)
    for _ in range(20):
        stream.kill_at_random(3, after_progress=True)
    repeated = finish(stream)
    again = stream.records() - 40_001
    print(f"\n20 kills: lost 0 of 40,001; {again} were delivered again in {len(repeated)} batches")
