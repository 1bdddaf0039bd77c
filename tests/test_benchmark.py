"""The benchmark: what it prints, and that its figures are of real work."""

import json

from processes import run_python


def test_it_prints_one_line_of_json():
    """Otherwise a script could not use the result, and nobody could check what README says."""
    run = run_python("examples/benchmark.py", "drain", "--events", "5000", "--runs", "3")
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    result = json.loads(line)
    assert result["events"] == 5_000
    speeds = result["drain_events_per_s"]
    assert 0 < speeds["min"] <= speeds["median"] <= speeds["max"]
    ratio = speeds["median"] / result["limit_events_per_s"]
    assert abs(result["ratio"] - ratio) < 0.001
    assert run.stderr.count("5,000") >= 5  # each drain, the warming-up too, scored all events


def test_bad_options_are_refused():
    """Otherwise a typo would measure something else."""
    run = run_python("examples/benchmark.py", "fill")
    assert run.returncode == 2
    assert "invalid choice: 'fill'" in run.stderr
