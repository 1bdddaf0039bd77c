"""The benchmark: what it prints, and that its figures measure real work."""

import json

import pytest
from processes import run_python


@pytest.mark.long
def test_it_prints_one_line_of_json():
    """The benchmark prints its throughput, and the ratio to the limit, as one JSON line."""
    run = run_python("examples/benchmark.py", "drain", "--events", "5000", "--runs", "1")
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    result = json.loads(line)
    assert result["events"] == 5_000
    speeds = result["drain_events_per_s"]
    assert 0 < speeds["min"] <= speeds["median"] <= speeds["max"]
    ratio = speeds["median"] / result["limit_events_per_s"]
    assert abs(result["ratio"] - ratio) < 0.001
    assert run.stderr.count("5,000") >= 3  # each drain, including the warm-up, scored all events


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


def test_bad_options_are_refused():
    """An unknown benchmark name is a usage error."""
    run = run_python("examples/benchmark.py", "fill")
    assert run.returncode == 2
    assert "invalid choice: 'fill'" in run.stderr
