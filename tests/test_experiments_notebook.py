"""The notebook on experiments: the solutions of its exercises."""

import pytest
from notebook_cells import run_cells, solution

NAME = "4_experiments"


@pytest.fixture(scope="module")
def notebook_names():
    """The names of the notebook that the exercises use, with its events."""
    names = run_cells(NAME, ["parameters", "process-instances"], {}) | {"events": 5_000}
    names = run_cells(NAME, ["values", "send", "then", "from-json", "network-run"], names)
    size = sum(map(len, names["values"])) / len(names["values"])
    return names | {"sizes": {"JSON": size}}


def test_a_limit_per_partition_follows_from_the_size_of_a_batch(notebook_names):
    """A batch has the rate, times the interval, from each partition."""
    rate_per_partition, seconds = solution(NAME, 1, notebook_names)
    assert rate_per_partition * 4 * 1.0 == 5_000
    assert seconds * 5_000 == 1_000_000


def test_primitive_features_are_a_good_half_of_an_event(notebook_names):
    """The other features can be computed from these 17; their decoding is measured."""
    features, share, share_of_time = solution(NAME, 2, notebook_names)
    assert features == 17
    assert 0.45 < share < 0.65
    assert share_of_time > 0


def test_a_smaller_layer_halves_the_network(notebook_names):
    """The two largest matrices have the layer's size in common; the speed is measured."""
    share, share_of_time = solution(NAME, 3, notebook_names)
    assert 0.45 < share < 0.55
    assert share_of_time > 0
