"""The network, its serialization for workers, and its file with the serving contract."""

import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow

from helpers.higgs import EVENT_ID, FEATURES, generate_events
from helpers.model import (
    UnservableModelError,
    build_model,
    compiled_predict,
    model_from_bytes,
    model_to_bytes,
    normalized_network,
    scoring_function,
    servable_model,
    worker_copy,
)
from helpers.serving import (
    ServingModel,
    ServingModelError,
    fingerprint,
    load_serving_model,
    save_serving_model,
    scaled_network,
)
from helpers.serving.archive import CONTRACT, _digest


@pytest.fixture(scope="module")
def model():
    """The walkthrough's network."""
    return build_model()


@pytest.fixture(scope="module")
def features():
    """Generated events, each scaled to length 1 as in the walkthrough."""
    rows = generate_events(5_000, seed=3)[list(FEATURES)].to_numpy()
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype("float32")


def test_it_is_the_original_network(model):
    """The network has the layers, dropout rates and parameter count of the original."""
    assert [layer.units for layer in model.layers if hasattr(layer, "units")] == [500, 1000, 500, 2]
    assert [layer.rate for layer in model.layers if hasattr(layer, "rate")] == [0.4, 0.4]
    assert model.count_params() == 1_018_002
    assert model.input_shape == (None, 30)


def test_the_same_seed_gives_the_same_weights(model):
    """A seed determines the weights, and another seed gives different ones."""
    for weights, again in zip(model.get_weights(), build_model().get_weights(), strict=True):
        np.testing.assert_array_equal(weights, again)
    assert not np.array_equal(model.get_weights()[0], build_model(seed=1).get_weights()[0])


def test_random_weights_call_about_half_of_the_events_class_0(model, features):
    """With random weights, 30 to 70 % of the events are class 0."""
    chosen = compiled_predict(model)(features).argmax(axis=1)
    assert 0.3 <= (chosen == 0).mean() <= 0.7


def test_bytes_carry_the_model(model, features):
    """A network restored from bytes gives the same predictions."""
    copy = model_from_bytes(model_to_bytes(model))
    np.testing.assert_array_equal(
        compiled_predict(copy)(features), compiled_predict(model)(features)
    )


def sigmoid(x):
    """Return something else than Keras' function of this name."""
    return 5 * x


@pytest.mark.parametrize(
    "network",
    [
        [keras.layers.Dense(16, keras.ops.gelu), keras.layers.Dense(2, "softmax")],
        [keras.layers.Dense(1, sigmoid)],
    ],
    ids=["keras.ops", "own function"],
)
def test_a_function_that_keras_would_replace_is_refused(serving_model, tmp_path, network):
    """The error names the function, in whose place the workers would run that of Keras."""
    model = keras.Sequential([keras.Input((30,)), *network])
    with pytest.raises(UnservableModelError, match="saved copy returns other numbers"):
        servable_model(model)
    means, scales = serving_model.contract.means, serving_model.contract.scales
    with pytest.raises(UnservableModelError, match="saved copy returns other numbers"):
        scaled_network(model, means, scales)


@pytest.mark.parametrize(
    "layers",
    [
        [keras.Input((None, 1)), keras.layers.GRU(4)],
        [keras.Input((3,), dtype="int32"), keras.layers.Embedding(4, 4), keras.layers.Flatten()],
    ],
    ids=["any number of features", "few categories"],
)
def test_such_a_function_is_found_whatever_the_input(layers):
    """Inputs of any size, and of integers that an embedding knows, are tried as well."""
    with pytest.raises(UnservableModelError, match="saved copy returns other numbers"):
        servable_model(keras.Sequential([*layers, keras.layers.Dense(1, sigmoid)]))


def relu(x):
    """A function with the name of one of Keras that differs only far from 0."""
    return keras.ops.clip(x, 0, 20)


def with_category():
    """A network of two numbers and one of three categories, the others of which it refuses."""
    features = keras.Input((3,))
    category = keras.ops.cast(keras.ops.clip(features[:, 2], 0, 9), "int32")
    known = keras.layers.Embedding(3, 2)(category)
    both = keras.layers.Concatenate()([features[:, :2], known])
    hidden = keras.layers.Dense(16, keras.ops.gelu)(both)
    return keras.Model(features, keras.layers.Dense(2, "softmax")(hidden))


def of_length_16_or_more():
    """A network of any number of features from 16 on."""
    features = keras.Input((None, 1))
    hidden = keras.layers.Conv1D(4, 16, activation=keras.ops.gelu)(features)
    pooled = keras.layers.GlobalAveragePooling1D()(hidden)
    return keras.Model(features, keras.layers.Dense(2, "softmax")(pooled))


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.Sequential([keras.Input((2,)), keras.layers.Dense(8, relu),
                                  keras.layers.Dense(2, "softmax")]),
        lambda: keras.Sequential([keras.Input((4, 2)), keras.layers.LSTM(
            2, recurrent_activation=relu), keras.layers.Dense(2, "softmax")]),
        with_category,
        of_length_16_or_more,
    ],
    ids=["far from 0", "inside a layer", "a category", "an open size"],
)  # fmt: skip
def test_such_a_function_is_found_where_tried_events_do_not_show_it(make):
    """Functions are compared with numbers of all sizes; an event that fails hides no other."""
    with pytest.raises(UnservableModelError, match="saved copy returns other numbers"):
        servable_model(make())


def plain_softmax(x):
    """Softmax by its formula, which overflows for large numbers."""
    return keras.ops.exp(x) / keras.ops.sum(keras.ops.exp(x), axis=-1, keepdims=True)


def test_layers_that_are_shared_attached_or_by_their_formula_are_served():
    """A layer that is used twice or not at all, and a function that may overflow, are no fault."""
    shared = keras.layers.LeakyReLU(0.1)
    features = keras.Input((30,))
    hidden = keras.layers.Dense(4, shared)(keras.layers.Dense(8, shared)(features))
    plain_softmax.__name__ = "softmax"
    model = keras.Model(features, keras.layers.Dense(2, plain_softmax)(hidden))
    model.encoder = keras.Model(features, hidden)
    servable_model(model)


@pytest.mark.parametrize("place", [0, 1])
def test_of_several_outputs_inside_the_used_one_counts(place):
    """A network inside another one may have outputs that are not used."""
    inputs = keras.Input((3,))
    outputs = [keras.layers.Dense(1, "sigmoid")(inputs), keras.layers.Dense(1)(inputs)]
    inner = keras.Model(inputs, outputs if place == 0 else outputs[::-1])
    features = keras.Input((3,))
    servable_model(keras.Model(features, inner(features)[place]))
    with pytest.raises(UnservableModelError, match="not a probability"):
        servable_model(keras.Model(features, inner(features)[1 - place]))


@pytest.mark.parametrize(
    "row",
    [[1e20] + [1] * 29, [-1e20] + [5] * 29, [3e38] * 30, [1e-15] + [0] * 29, [1e-3] * 30, [0] * 30],
)
def test_very_large_and_very_small_events_are_scaled_to_length_1(model, row):
    """Their squares are not 32-bit floats, but the network gets what Spark's Normalizer returns."""
    features = np.array([row], "float64")
    length = np.linalg.norm(features) or 1
    np.testing.assert_allclose(
        compiled_predict(normalized_network(model))(features.astype("float32")),
        compiled_predict(model)((features / length).astype("float32")),
        atol=1e-6,
    )


def test_moderate_events_are_scaled_as_by_keras_alone(model, features):
    """The care for extremes changes no digit of the others."""
    alone = keras.Sequential([keras.Input((30,)), keras.layers.UnitNormalization(), model])
    np.testing.assert_array_equal(
        compiled_predict(normalized_network(model))(100 * features),
        compiled_predict(alone)(100 * features),
    )


@pytest.mark.parametrize(
    "mean, scale",
    [(1.7e9, 1000.0), (1_712_345_678.9, 60.0), (0.0, 1e-6), (0.0, 1e17), (-5.0, 2.0)],
)
def test_a_scale_of_any_size_is_served_as_it_was_trained(mean, scale):
    """A time in seconds has a large mean beside a small scale, also in a worker's copy."""
    network = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, "softmax")])
    scaled = scaled_network(network, [mean], [scale])
    expected = network.predict(np.array([[0.3]]), verbose=0)
    for each in (scaled, worker_copy(scaled)[1]):
        found = scoring_function(each)(np.array([[mean + 0.3 * scale]]))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_events_on_which_a_network_fails_have_no_prediction():
    """An unknown category fails in an embedding; the other events have their predictions."""
    network = keras.Sequential([
        keras.Input((2,), dtype="int32"), keras.layers.Embedding(9, 4), keras.layers.Flatten(),
        keras.layers.Dense(1, "sigmoid"),
    ])  # fmt: skip
    categories = np.random.default_rng(0).integers(0, 9, (1_000, 2))
    expected = network.predict(categories, verbose=0)[:, 0]
    unknown = [0, 7, 8, 999]
    categories[unknown, 1] = 12
    found = scoring_function(network)(categories.astype("float64"))[:, 1]
    assert np.flatnonzero(np.isnan(found)).tolist() == unknown
    np.testing.assert_allclose(np.delete(found, unknown), np.delete(expected, unknown), atol=1e-6)


def test_another_epsilon_or_backend_than_that_of_the_workers_is_refused(model, monkeypatch):
    """Workers compute with Keras' defaults on TensorFlow, which a setting here doesn't reach."""
    keras.config.set_epsilon(1e-3)
    try:
        with pytest.raises(UnservableModelError, match=r"call keras.config.set_epsilon\(1e-07\)"):
            servable_model(model)
    finally:
        keras.config.set_epsilon(1e-7)
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(UnservableModelError, match="backend is jax: set KERAS_BACKEND=tensorflow"):
        servable_model(model)


@pytest.mark.parametrize("activation", [None, "softmax"])
@pytest.mark.parametrize("kind", ["positive numbers", "beyond the tried numbers", "any size"])
def test_probabilities_are_told_from_logits_whatever_the_network_takes(kind, activation):
    """So that logits never get a class, also where most trial events have no prediction."""
    features = keras.Input((None, 1) if kind == "any size" else (8,))
    found = {
        "positive numbers": lambda: keras.ops.log(features),
        "beyond the tried numbers": lambda: keras.ops.log(features - 1_000),
        "any size": lambda: keras.layers.GRU(4)(features),
    }[kind]()
    network = keras.Model(features, keras.layers.Dense(2, activation)(found))
    assert servable_model(network).gives_probabilities == (activation == "softmax")


def leaky_relu(x):
    """The function of this name in other libraries; Keras' has another slope."""
    return keras.ops.where(x > 0, x, 0.01 * x)


MEANS, VARIANCES = [293.0, 101_300.0, 55.0], [16.0, 1e4, 25.0]  # kelvin, pascal, percent


@pytest.mark.parametrize(
    "scaling",
    [
        lambda: keras.layers.Normalization(mean=MEANS, variance=VARIANCES),
        lambda: keras.layers.Rescaling(1e-3, -101.3),
        lambda: with_moving_means(keras.layers.BatchNormalization()),
        lambda: keras.Sequential([keras.layers.Normalization(mean=MEANS, variance=VARIANCES)]),
    ],
    ids=["Normalization", "Rescaling", "BatchNormalization", "nested"],
)
@pytest.mark.parametrize(
    "layer, fault",
    [
        (
            lambda x: keras.layers.Dense(16, leaky_relu)(x),
            "its saved copy returns other numbers",
        ),
        (
            lambda x: x / keras.ops.max(keras.ops.abs(x), axis=0, keepdims=True),
            "an event's numbers depend on the other events",
        ),
    ],
    ids=["a function of Keras' name", "a batch's largest number"],
)
def test_a_fault_shows_although_the_network_scales_its_inputs(scaling, layer, fault):
    """A network is tried where its first layer expects the events, not around 0 alone."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,))
    network = keras.Model(inputs, keras.layers.Dense(2, "softmax")(layer(scaling()(inputs))))
    with pytest.raises(UnservableModelError, match=fault):
        servable_model(network)


def with_moving_means(layer):
    """Return a layer of batch normalization that has learned the means."""
    layer.build((None, 3))
    layer.set_weights([np.ones(3), np.zeros(3), np.array(MEANS), np.array(VARIANCES)])
    return layer


def test_a_loss_of_a_part_of_the_network_needs_no_code():
    """A network that was trained with a loss or metric of the user's can be a part of another."""

    def own_loss(expected, found):
        return keras.ops.mean(keras.ops.square(expected - found), axis=-1)

    part = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, "softmax")])
    part.compile("adam", own_loss, metrics=[own_loss])
    part.fit(np.zeros((4, 3)), np.zeros((4, 2)), verbose=0)
    whole = normalized_network(part)
    events = np.random.default_rng(1).normal(size=(8, 3))
    served = model_from_bytes(servable_model(whole).content)
    np.testing.assert_array_equal(scoring_function(served)(events), scoring_function(whole)(events))


def test_a_network_that_fails_on_all_events_is_an_error():
    """Its events are not bad records: the network has a fault."""
    reshaped = keras.layers.Reshape((4, 2))  # of a number of features that it learns too late
    network = keras.Sequential([keras.Input((None, 2)), reshaped, keras.layers.Flatten(),
                                keras.layers.Dense(1, "sigmoid")])  # fmt: skip
    score = scoring_function(network)
    assert score(np.ones((3, 8))).shape == (3, 2)
    with pytest.raises(tensorflow.errors.InvalidArgumentError):
        score(np.ones((3, 6)))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e300])
def test_a_feature_that_the_input_cannot_hold_gives_no_prediction(value):
    """A sigmoid would turn infinity into a certain class."""
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid")])
    found = scoring_function(network)(np.array([[1.0, 2.0], [1.0, value]]))
    assert np.isfinite(found).tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e20, float("nan")])
def test_a_scale_that_keras_would_replace_is_refused(model, scale):
    """Keras divides by 1e-7 where the scale is smaller, and says nothing."""
    with pytest.raises(ValueError, match=r"is not between 1e-07 and 1e.18: give the feature in"):
        scaled_network(model, [0.0] * 30, [1.0] * 29 + [scale])


def test_bytes_that_are_no_model_are_refused():
    """Bytes that are not a Keras model are refused."""
    with pytest.raises(ValueError, match="keras"):
        model_from_bytes(b"no model")


@pytest.mark.parametrize("size", [1, 2, 4_999, 5_000])
def test_compiled_predict_equals_keras(model, features, size):
    """The compiled prediction equals `model.predict` for batches of any size, even one row."""
    expected = model.predict(features[:size], verbose=0)
    np.testing.assert_allclose(compiled_predict(model)(features[:size]), expected, atol=1e-6)


def test_scores_are_those_of_the_compiled_prediction(model, features):
    """Scores are the compiled prediction's, bit by bit, and no events have no scores."""
    scores = scoring_function(model)(features.astype("float64"))
    np.testing.assert_array_equal(scores, compiled_predict(model)(features))
    open_network = keras.Sequential(
        [keras.Input((None, 1)), keras.layers.GRU(4), keras.layers.Dense(1, "sigmoid")]
    )
    assert scoring_function(open_network)(np.empty((0, 0))).shape == (0, 2)


def test_a_vocabulary_is_part_of_the_file_and_of_its_version(serving_model, tmp_path):
    """Keras keeps what a lookup layer has learned beside the weights."""
    saved = []
    for categories in ([10, 20, 30, 30], [10, 20, 40, 40]):
        keras.utils.set_random_seed(1)
        lookup = keras.layers.IntegerLookup(output_mode="one_hot")
        lookup.adapt(np.array(categories))
        inputs = keras.Input((3,))
        found = lookup(keras.ops.cast(inputs[:, :1], "int64"))
        found = keras.ops.concatenate([found, inputs[:, 1:]], axis=-1)
        network = keras.Model(inputs, keras.layers.Dense(2, "softmax")(found))
        means, scales = (0.0,) * 3, (1.0,) * 3
        contract = replace(
            serving_model.contract, feature_names=("a", "b", "c"), means=means, scales=scales
        )
        model = ServingModel(scaled_network(network, means, scales), contract)
        path = tmp_path / "model.keras"
        saved.append(save_serving_model(model, path))
        events = np.array([[10.0, 1, 2], [30, 1, 2], [40, 1, 2], [7, 1, 2]])
        expected = scoring_function(model.network)(events)
        found = scoring_function(load_serving_model(path).network)(events)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    first, second = saved
    assert first.version != second.version


def test_a_network_that_mixes_the_events_of_a_batch_is_not_saved(serving_model, tmp_path):
    """The results would depend on which events come together."""
    means, scales = (293.0, 101_300.0, 55.0), (4.0, 100.0, 5.0)
    inputs = keras.Input((3,))
    largest = keras.ops.max(keras.ops.abs(inputs), axis=0, keepdims=True)
    network = keras.Model(inputs, keras.layers.Dense(2, "softmax")(inputs / largest))
    contract = replace(
        serving_model.contract, feature_names=("a", "b", "c"), means=means, scales=scales
    )
    model = ServingModel(scaled_network(network, means, scales), contract)
    with pytest.raises(ServingModelError, match="depend on the other events of its batch"):
        save_serving_model(model, tmp_path / "model.keras")


def test_a_serving_model_comes_back_as_it_was_saved(serving_model, tmp_path):
    """A saved serving model loads unchanged, and Keras alone can read its file."""
    path = tmp_path / "model.keras"
    saved = save_serving_model(serving_model, path)
    loaded = load_serving_model(path)
    assert loaded.contract == saved.contract == serving_model.contract
    assert loaded.version == saved.version != ""
    assert loaded.schema.names == [EVENT_ID, *FEATURES]
    assert "keras" in loaded.contract.libraries
    rows = generate_events(100, seed=3)[list(FEATURES)].to_numpy(dtype="float32")
    expected = serving_model.network.predict(rows, verbose=0)
    for network in (loaded.network, keras.saving.load_model(path)):
        np.testing.assert_array_equal(network.predict(rows, verbose=0), expected)
    assert [found.name for found in tmp_path.iterdir()] == ["model.keras"]


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"feature_names": FEATURES[1:]}, "it has 30 means for 29 features"),
        ({"feature_names": (*FEATURES[1:], "PRI_met")}, "features are named twice: PRI_met"),
        ({"feature_names": (EVENT_ID, *FEATURES[1:])}, "the id 'EventId' is also a feature"),
        ({"feature_names": (*FEATURES[1:], "PRI_MET")}, "named twice: PRI_MET, PRI_met"),
        ({"feature_names": ("Prediction", *FEATURES[1:])}, "'Prediction' has the name of a column"),
        ({"event_id": "Offset"}, "the id 'Offset' has the name of a column of Kafka"),
        ({"class_names": ("signal",)}, "it has 1 classes, not two"),
        ({"feature_names": "ab"}, "an invalid contract: feature_names is not a list"),
        ({"signal_index": 2}, "signal_index is 2"),
        ({"signal_index": True}, "signal_index is True"),
        ({"metrics": "good"}, "an invalid contract: .*'str'"),
        ({"metrics": {"auc": float("nan")}}, "a metric is not finite"),
        ({"threshold": 1.5}, "threshold is 1.5, not between 0 and 1"),
        ({"means": (float("nan"),) * 30}, "means are not all finite"),
        ({"scales": (0.0,) * 30}, "a scale isn't above 0"),
        ({"means": (1.0,) * 30}, "doesn't scale its inputs with the contract's means and scales"),
    ],
)
def test_parts_that_disagree_are_refused(serving_model, tmp_path, change, fault):
    """An inconsistent contract, or one that doesn't fit the network, is not saved."""
    wrong = ServingModel(serving_model.network, replace(serving_model.contract, **change))
    with pytest.raises(ServingModelError, match=fault):
        save_serving_model(wrong, tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


def rewritten(path, name, content, compression=zipfile.ZIP_STORED):
    """Replace or remove one part of a .keras file."""
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for part, old in parts.items():
            new = content if part == name else old
            if new is not None:
                archive.writestr(part, new)


def test_files_that_were_changed_are_refused(make_serving_model, serving_model, tmp_path):
    """A file with parts of different saves, or with invalid parts, is refused."""
    path = tmp_path / "model.keras"
    save_serving_model(make_serving_model(seed=7), path)
    with zipfile.ZipFile(path) as archive:
        weights, content = archive.read("model.weights.h5"), json.loads(archive.read(CONTRACT))
    save_serving_model(serving_model, path)
    rewritten(path, "model.weights.h5", weights)
    with pytest.raises(ServingModelError, match="changed after they were saved together"):
        load_serving_model(path)
    save_serving_model(serving_model, path)
    swapped = {**content["contract"], "signal_index": 0}
    rewritten(path, CONTRACT, json.dumps({**content, "contract": swapped}))
    with pytest.raises(ServingModelError, match="changed after they were saved together"):
        load_serving_model(path)
    del content["contract"]["threshold"]
    rewritten(path, CONTRACT, json.dumps(content))
    with pytest.raises(ServingModelError, match=r"an invalid contract: .*threshold"):
        load_serving_model(path)
    content["contract"]["threshold"] = 10**400
    rewritten(path, CONTRACT, json.dumps(content))
    with pytest.raises(ServingModelError, match="can't serve: threshold is 1000"):
        load_serving_model(path)
    content["contract"]["metrics"] = {"auc": 10**400}
    rewritten(path, CONTRACT, json.dumps(content))
    with pytest.raises(ServingModelError, match=r"an invalid contract: .*too large"):
        load_serving_model(path)
    content["contract"]["metrics"] = {}
    content["contract"]["threshold"] = "0.5"
    rewritten(path, CONTRACT, json.dumps(content))
    with pytest.raises(ServingModelError, match=r"an invalid contract: .*'str'"):
        load_serving_model(path)
    save_serving_model(serving_model, path)
    rewritten(path, "config.json", "[" * 100_000)
    with pytest.raises(ServingModelError, match=r"has no network that can be loaded: .*recursion"):
        load_serving_model(path)
    rewritten(path, CONTRACT, "[" * 100_000)
    with pytest.raises(ServingModelError, match=r"an invalid contract: .*recursion"):
        load_serving_model(path)
    serving_model.network.save(path)
    with pytest.raises(ServingModelError, match=r"no contract: write it with .*save_serving_model"):
        load_serving_model(path)
    path.write_text("EventId")
    with pytest.raises(ServingModelError, match=r"is not a \.keras file, or is damaged"):
        load_serving_model(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_serving_model(tmp_path / "none.keras")


@pytest.mark.parametrize("place", range(5))
def test_a_file_that_was_damaged_is_refused(serving_model, tmp_path, place):
    """A file with a flipped bit is refused."""
    path = tmp_path / "model.keras"
    save_serving_model(serving_model, path)
    content = bytearray(path.read_bytes())
    content[(2 * place + 1) * len(content) // 10] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ServingModelError, match=r"is not a \.keras file, or is damaged"):
        load_serving_model(path)


def test_a_file_without_its_weights_is_refused(serving_model, tmp_path):
    """A file without weights is refused, and the missing part is named."""
    path = tmp_path / "model.keras"
    save_serving_model(serving_model, path)
    rewritten(path, "model.weights.h5", None)
    with pytest.raises(ServingModelError, match=r"it has no model\.weights\.h5"):
        load_serving_model(path)


def test_a_file_that_would_fill_the_memory_is_refused(serving_model, tmp_path):
    """A small file that would expand to 100 MB is refused."""
    path = tmp_path / "model.keras"
    save_serving_model(serving_model, path)
    rewritten(path, CONTRACT, " " * 100_000_000, zipfile.ZIP_DEFLATED)
    with pytest.raises(ServingModelError, match=r"contract\.json would be 100000000 bytes"):
        load_serving_model(path)


@pytest.mark.parametrize(
    "network", [keras.layers.Dense(2), keras.Sequential()], ids=["a layer", "no inputs"]
)
def test_what_is_no_network_is_refused(serving_model, tmp_path, network):
    """A Keras object that isn't a network with inputs is refused."""
    path = tmp_path / "model.keras"
    save_serving_model(serving_model, path)
    config = json.dumps(keras.saving.serialize_keras_object(network))
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    contract = json.loads(parts[CONTRACT])
    contract["digest"] = _digest({**parts, "config.json": config.encode()}, contract["contract"])
    rewritten(path, "config.json", config)
    rewritten(path, CONTRACT, json.dumps(contract))
    with pytest.raises(ServingModelError, match="has no network that can be loaded"):
        load_serving_model(path)


@pytest.mark.parametrize(
    "layers, fault",
    [
        ([keras.layers.Embedding(2, 2), keras.layers.Flatten()], "fails on all events around the"),
        ([keras.layers.Rescaling(float("nan"))], "returns no finite number for events around the"),
    ],
    ids=["categories", "nothing"],
)
def test_a_network_without_a_score_around_the_means_is_refused(
    serving_model, tmp_path, layers, fault
):
    """The served file stays as it is: no event would have a prediction."""
    means, scales = (-100.0,) * 30, (1.0,) * 30
    scaling = keras.layers.Normalization(mean=means, variance=scales)
    layers = [keras.Input((30,)), scaling, *layers, keras.layers.Dense(2, "softmax")]
    network = keras.Sequential(layers)
    contract = replace(serving_model.contract, means=means, scales=scales)
    with pytest.raises(ServingModelError, match=fault):
        save_serving_model(ServingModel(network, contract), tmp_path / "model.keras")
    assert not (tmp_path / "model.keras").exists()


def test_a_network_that_scales_otherwise_is_refused(serving_model, tmp_path):
    """A network that multiplies by the scales instead of dividing is refused."""
    contract = serving_model.contract
    variance = np.square(contract.scales)
    scaling = keras.layers.Normalization(mean=contract.means, variance=variance, invert=True)
    network = keras.Sequential([keras.Input((30,)), scaling, build_model()])
    with pytest.raises(ServingModelError, match=r"make it with helpers\.serving\.scaled_net"):
        save_serving_model(ServingModel(network, contract), tmp_path / "model.keras")


def test_another_file_system_is_refused(serving_model):
    """A path on another file system, such as HDFS, is refused for loading and saving."""
    path = "hdfs:///models/higgs.keras"
    for use in (load_serving_model, lambda path: save_serving_model(serving_model, path)):
        with pytest.raises(ServingModelError, match="is not a path on this machine: copy the file"):
            use(path)


def test_another_ending_is_refused(serving_model, tmp_path):
    """A file name that doesn't end in .keras is refused."""
    with pytest.raises(ServingModelError, match=r"model\.h5 must end in \.keras"):
        save_serving_model(serving_model, tmp_path / "model.h5")


def test_a_contract_takes_arrays(serving_model, tmp_path):
    """A contract accepts NumPy arrays and numbers."""
    contract = serving_model.contract
    arrays = replace(contract, means=np.array(contract.means), threshold=np.float64(0.5))
    saved = save_serving_model(ServingModel(serving_model.network, arrays), tmp_path / "a.keras")
    assert saved.contract == contract


def test_the_same_model_has_the_same_version(serving_model, tmp_path):
    """Saving an unchanged model keeps its version; another contract gives a new one."""
    first = save_serving_model(serving_model, tmp_path / "first.keras")
    with ThreadPoolExecutor() as stream:  # a batch function runs in a thread
        again = stream.submit(save_serving_model, first, tmp_path / "a folder" / "again.keras")
    assert again.result().version == first.version == serving_model.version
    other = replace(serving_model.contract, threshold=0.7)
    changed = save_serving_model(ServingModel(first.network, other), tmp_path / "first.keras")
    assert changed.version != first.version


def test_code_in_a_file_does_not_run(serving_model, tmp_path):
    """A network with a Lambda layer is refused, so that no code from a file runs."""
    scaling = serving_model.network.layers[0]
    network = keras.Sequential(
        [keras.Input((30,)), scaling, keras.layers.Lambda(lambda x: x), build_model()]
    )
    model = ServingModel(network, serving_model.contract)
    with pytest.raises(ServingModelError, match="has no network that can be loaded"):
        save_serving_model(model, tmp_path / "model.keras")


def test_a_fingerprint_tells_data_apart(spark):
    """A fingerprint depends on values and column names, not on the order of rows or columns."""
    df = spark.createDataFrame([(1, "s"), (2, "b")], "EventId int, Label string")
    assert fingerprint(df) == fingerprint(df.orderBy("Label").select("Label", "EventId"))
    assert fingerprint(df) != fingerprint(df.withColumnRenamed("Label", "label"))
    assert fingerprint(df) != fingerprint(df.limit(1))
    assert fingerprint(df) != fingerprint(df.replace("s", "b"))
    one, other = (spark.createDataFrame([row], "a int, b int") for row in ((1, None), (None, 1)))
    assert fingerprint(one) != fingerprint(other)
    one, other = (spark.createDataFrame([(row,)], "a array<int>") for row in ([1, None], [None, 1]))
    assert fingerprint(one) != fingerprint(other)
