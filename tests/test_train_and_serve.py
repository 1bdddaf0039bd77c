"""The exercises of the notebook on training."""

import nbformat
import pytest
from notebook_cells import solution

from helpers.notebook import find_notebook

NOTEBOOK = "3_train_and_serve"


def sources():
    """Return the code of the notebook, without plots, before and after its stream begins."""
    parts = [], []
    streams = False
    for cell in nbformat.read(find_notebook(NOTEBOOK), as_version=4).cells:
        streams |= "## Usage: the stream" in cell.source.splitlines()
        if cell.cell_type == "code" and "plt.show" not in cell.source:
            parts[streams].append(cell.source)
    return parts


@pytest.fixture(scope="module")
def names(spark, kafka):
    """The notebook's names, after a short training on few events."""
    names = {}
    (parameters, *others), stream = sources()
    exec(parameters, names)
    names.update(events=1_000, epochs=2, bootstrap_servers=kafka.bootstrap_servers)
    (process_instances,) = [source for source in stream if "def process_instances" in source]
    for source in [*others, process_instances]:
        exec(source, names)
    return names


def test_a_higher_threshold_selects_fewer_events(names):
    """Fewer events are called signal at 0.8 than at 0.5, and a larger share of them is signal."""
    (called, signal), (fewer, fewer_signal) = solution(NOTEBOOK, 1, names)
    assert called > fewer > fewer_signal > 0
    assert fewer_signal / fewer > signal / called


def test_a_network_without_a_feature_is_served(names):
    """The network has an input less, and so has the schema of the stream's events."""
    assert solution(NOTEBOOK, 2, names) == ((None, 29), 30)


def test_a_broken_record_has_its_reason(names):
    """The parser or the network reports why a record is bad."""
    assert solution(NOTEBOOK, 3, names) == [
        "DER_mass_MMC is missing",
        "DER_mass_MMC is null, not a number",
        "the model has no finite prediction for its features",
    ]
