"""A stream that runs for a quarter of an hour and then drains a backlog."""

import itertools
import json
import os
import re
import signal
import statistics
import sys
import threading
import time

import pytest
from processes import ROOT, run_python, running, wait_until

PROGRAM = ROOT / "tests" / "long_stream.py"
PRODUCER = ROOT / "examples" / "kafka_producer.py"

RATE = 2_000  # events per second
MINUTES = 15
BACKLOG = 500_000
MINUTES_AFTER_BACKLOG = 4
STANDS_STILL = 120  # seconds without a batch; the largest lag depends on the machine
SETTLED = 120  # seconds after which memory no longer grows
LINE = re.compile(r"^\d\d:\d\d:\d\d +([\d,]+) .* ([\d,]+)$")  # a batch's events and lag


class Job:
    """A running job: the batches that it prints, and its memory samples."""

    def __init__(self, process, samples):
        self.process, self._samples = process, samples
        self.lags = []  # seconds since the start, events of the batch, lag after it
        self._began = time.monotonic()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            found = LINE.match(line.strip())
            if found:
                events, lag = (int(text.replace(",", "")) for text in found.groups())
                self.lags.append((time.monotonic() - self._began, events, lag))

    def events(self):
        """Return the number of events scored so far."""
        return sum(events for _, events, _ in self.lags)

    def samples(self):
        """Return the memory samples so far."""
        return [json.loads(line) for line in self._samples.read_text().splitlines()]

    def run_for(self, seconds):
        """Let the job run, and fail if it ends by itself."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the job ended by itself"
            time.sleep(1)  # elapsed time is what the test is about


def means(samples, name):
    """Return a size's medians over the first and the last two minutes of the samples."""
    sizes = [sample[name] for sample in samples]
    return statistics.median(sizes[:12]), statistics.median(sizes[-12:])


@pytest.mark.long
@pytest.mark.parametrize("engine", ["dstream", "structured"])
def test_a_stream_runs_for_a_quarter_of_an_hour_in_the_same_memory(
    kafka, topic, engine, tmp_path
):
    """Memory stays bounded, the stream never stands still, and it catches up with a backlog."""
    servers = kafka.bootstrap_servers
    events = str(RATE * 60 * (MINUTES + MINUTES_AFTER_BACKLOG + 15))  # more than the test takes
    source = [sys.executable, str(PRODUCER), servers, "--topic", topic, "--rate", str(RATE)]
    command = [
        sys.executable, str(PROGRAM), str(tmp_path / "samples"), "--engine", engine,
        "--bootstrap-servers", servers, "--topic", topic, "--output", str(tmp_path / "scored"),
        "--checkpoint", str(tmp_path / "checkpoint"),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    # Java with both of its compilers, as users run it.
    environment.pop("SPARK_SUBMIT_OPTS", None)
    with running([*source, "--events", events]), running(command, env=environment) as process:
        job = Job(process, tmp_path / "samples")
        wait_until(lambda: job.lags, 300)
        job.run_for(60 * MINUTES)
        steady = job.samples()
        before = job.events()
        filled = run_python(
            str(PRODUCER), servers, "--topic", topic, "--events", str(BACKLOG), seconds=300
        )
        assert filled.returncode == 0, filled.stderr
        wait_until(lambda: job.events() > before + BACKLOG and job.lags[-1][2] < 5 * RATE, 600)
        job.run_for(60 * MINUTES_AFTER_BACKLOG)
        after = job.samples()[-12:]
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    settled = [sample for sample in steady if sample["seconds"] > SETTLED]
    lags = [lag for when, _, lag in job.lags if SETTLED < when < 60 * MINUTES]
    times = [when for when, _, _ in job.lags]
    longest = max(later - earlier for earlier, later in itertools.pairwise(times))
    sizes = {}
    for name in ("heap", "java", "driver", "workers"):
        begins, ends = means(settled, name)
        sizes[name] = (begins, ends, statistics.median(sample[name] for sample in after))
    print(
        f"\n{engine}: {RATE} events/s for {MINUTES} min, {len(job.lags)} batches; lag "
        f"{statistics.median(lags):.0f} in the median, {max(lags)} at most; at most {longest:.0f} "
        f"s between batches; megabytes after two minutes, at the end, and after a backlog of "
        f"{BACKLOG:,}: {sizes}"
    )
    for name, (begins, ends, after_backlog) in sizes.items():
        assert ends < 1.25 * begins + 50, (name, sizes)
        assert after_backlog < 1.25 * begins + 100, (name, sizes)
    assert statistics.median(lags) < 5 * RATE and longest < STANDS_STILL
