"""The benchmark: what it prints, and that its figures measure real work."""

import json

import pytest
from processes import run_python

ENGINES = ["dstream", "structured"]


@pytest.mark.long
@pytest.mark.parametrize("engine", ENGINES)
def test_it_prints_one_line_of_json(engine):
    """The benchmark prints its throughput, and the ratio to the limit, as one JSON line."""
    options = ["--events", "5000", "--runs", "1", "--engine", engine]
    run = run_python("examples/benchmark.py", "drain", *options)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    result = json.loads(line)
    assert (result["engine"], result["events"]) == (engine, 5_000)
    speeds = result["drain_events_per_s"]
    assert 0 < speeds["min"] <= speeds["median"] <= speeds["max"]
    ratio = speeds["median"] / result["limit_events_per_s"]
    assert abs(result["ratio"] - ratio) < 0.001
    assert run.stderr.count("5,000") >= 3  # each drain, including the warm-up, scored all events


@pytest.mark.long
def test_small_batches_are_measured_with_each_engine():
    """A line per engine says how long a batch of 500 events takes, and how busy the cores are."""
    run = run_python("examples/benchmark.py", "small", "--seconds", "12", seconds=600)
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    assert [result["engine"] for result in results] == ENGINES
    for result in results:
        assert 200 < result["events_a_batch"] < 2_000 and result["partitions"] == 4
        assert 0 < result["seconds"]["min"] <= result["seconds"]["median"]
        assert result["seconds"]["median"] <= result["seconds"]["max"]
        assert result["cores_busy"] > 0


@pytest.mark.long
def test_latency_is_measured_with_each_engine_and_interval():
    """A line per engine and interval has the quantiles of the time from producing to storing."""
    run = run_python("examples/benchmark.py", "latency", "--seconds", "12", seconds=900)
    assert run.returncode == 0, run.stderr
    results = [json.loads(line) for line in run.stdout.splitlines()]
    expected = [(engine, interval) for engine in ENGINES for interval in (1.0, 5.0)]
    assert [(result["engine"], result["interval"]) for result in results] == expected
    for result in results:
        assert result["events_per_s"] == 2_000
        assert 0 < result["p50"] <= result["p95"] <= result["p99"]


@pytest.mark.long
def test_training_is_judged_on_events_that_it_did_not_see():
    """The trainers are compared by their AUC on events that training did not use."""
    run = run_python("examples/benchmark.py", "train", "--events", "3000", seconds=300)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    result = json.loads(line)
    assert result["events"] == 3_000
    for name in ("SingleTrainer", "AveragingTrainer"):
        assert 0.8 < result[name]["auc"] < 0.95
        assert len(result[name]["seconds"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fill"], "invalid choice: 'fill'"),
        (["drain", "--events", "0"], "--events must be a number above 0."),
        (["latency", "--seconds", "inf"], "--seconds must be a number of at least 5."),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys, example):
    """An unknown benchmark name, or a size that can't be measured, is a usage error."""
    with pytest.raises(SystemExit) as end:
        example("benchmark").main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err
