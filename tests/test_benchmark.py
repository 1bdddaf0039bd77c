"""The benchmark: what it prints, and that its figures are of real work."""

import json

import pytest
from processes import run_python


def test_it_prints_one_line_of_json():
    """Otherwise a script could not use the result, and nobody could check what README says."""
    run = run_python("examples/benchmark.py", "drain", "--events", "5000", "--runs", "1")
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    result = json.loads(line)
    assert result["events"] == 5_000
    speeds = result["drain_events_per_s"]
    assert 0 < speeds["min"] <= speeds["median"] <= speeds["max"]
    ratio = speeds["median"] / result["limit_events_per_s"]
    assert abs(result["ratio"] - ratio) < 0.001
    assert run.stderr.count("5,000") >= 3  # each drain, the warming-up too, scored all events


@pytest.mark.long
def test_training_is_judged_on_events_that_it_did_not_see():
    """Otherwise nobody could check what the README says of the trainers."""
    run = run_python("examples/benchmark.py", "train", "--events", "3000", seconds=300)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    result = json.loads(line)
    assert result["events"] == 3_000
    for name in ("SingleTrainer", "AveragingTrainer"):
        assert 0.8 < result[name]["auc"] < 0.95
        assert len(result[name]["seconds"]) == 1


def test_bad_options_are_refused():
    """Otherwise a typo would measure something else."""
    run = run_python("examples/benchmark.py", "fill")
    assert run.returncode == 2
    assert "invalid choice: 'fill'" in run.stderr
