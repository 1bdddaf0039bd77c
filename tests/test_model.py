"""The network, and its way to the workers as bytes."""

import numpy
import pytest

from helpers.higgs import FEATURES, generate_events
from helpers.model import build_model, compiled_predict, model_from_bytes, model_to_bytes


@pytest.fixture(scope="module")
def model():
    """The walkthrough's network."""
    return build_model()


@pytest.fixture(scope="module")
def features():
    """Generated events, each scaled to length 1, as the walkthrough does it."""
    rows = generate_events(5_000, seed=3)[list(FEATURES)].to_numpy()
    return (rows / numpy.linalg.norm(rows, axis=1, keepdims=True)).astype("float32")


def test_it_is_the_original_network(model):
    """Otherwise speeds could not be compared with those of the original."""
    assert [layer.units for layer in model.layers if hasattr(layer, "units")] == [500, 1000, 500, 2]
    assert [layer.rate for layer in model.layers if hasattr(layer, "rate")] == [0.4, 0.4]
    assert model.count_params() == 1_018_002
    assert model.input_shape == (None, 30)


def test_the_same_seed_gives_the_same_weights(model):
    """Otherwise the notebook's counts would change from run to run."""
    for weights, again in zip(model.get_weights(), build_model().get_weights(), strict=True):
        numpy.testing.assert_array_equal(weights, again)
    assert not numpy.array_equal(model.get_weights()[0], build_model(seed=1).get_weights()[0])


def test_random_weights_call_about_half_of_the_events_class_0(model, features):
    """Otherwise the walkthrough's filter would keep all events or none."""
    chosen = compiled_predict(model)(features).argmax(axis=1)
    assert 0.3 <= (chosen == 0).mean() <= 0.7


def test_bytes_carry_the_model(model, features):
    """Otherwise the workers would score with other weights than the driver."""
    copy = model_from_bytes(model_to_bytes(model))
    numpy.testing.assert_array_equal(
        compiled_predict(copy)(features), compiled_predict(model)(features)
    )


def test_bytes_that_are_no_model_are_refused():
    """Otherwise a damaged file would fail later, on a worker."""
    with pytest.raises(ValueError, match="keras"):
        model_from_bytes(b"no model")


@pytest.mark.parametrize("size", [1, 2, 4_999, 5_000])
def test_compiled_predict_equals_keras(model, features, size):
    """Otherwise the fast way would not be the same network; batches of one row included."""
    expected = model.predict(features[:size], verbose=0)
    numpy.testing.assert_allclose(compiled_predict(model)(features[:size]), expected, atol=1e-6)
