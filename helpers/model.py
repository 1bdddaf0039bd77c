"""The network of the walkthrough: build it, send it to workers as bytes, and call it.

The functions import Keras when they are called: it takes ten seconds, and a program that only
parses its options does not need it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import keras

FEATURE_COUNT = 30

CLASS_COUNT = 2

# With random weights, the fraction of events that the network assigns to class 0 is arbitrary,
# anything from none to all. With this seed it is about half, so there is something to see.
SEED = 39


def build_model(seed: int = SEED, feature_count: int = FEATURE_COUNT) -> keras.Model:
    """Return the original notebook's network with random weights: 30-500-1000-500-2.

    Dense layers with ReLU, dropout of 0.4 after the first two, softmax at the end: 1,018,002
    parameters. The same seed gives the same weights.

    Parameters
    ----------
    seed : int
        Seed of the random weights.
    feature_count : int
        The number of inputs.

    Returns
    -------
    keras.Model
        Takes float32 of shape (events, feature_count), returns probabilities of shape (events, 2).

    References
    ----------
    The layers are those of the Distributed Keras notebook "Kafka and Spark High Throughput Deep
    Learning Production Pipeline" (CERN, 2016), https://github.com/cerndb/dist-keras.

    Examples
    --------
    >>> build_model().count_params()
    1018002
    """
    import keras

    def dense(units: int, activation: str, layer: int, name: str) -> keras.layers.Dense:
        weights = keras.initializers.GlorotUniform(seed=seed + layer)
        return keras.layers.Dense(units, activation, kernel_initializer=weights, name=name)

    return keras.Sequential(
        [
            keras.Input(shape=(feature_count,), name="features"),
            dense(500, "relu", 0, "hidden_1"),
            keras.layers.Dropout(0.4, seed=seed, name="dropout_1"),
            dense(1000, "relu", 1, "hidden_2"),
            keras.layers.Dropout(0.4, seed=seed, name="dropout_2"),
            dense(500, "relu", 2, "hidden_3"),
            dense(CLASS_COUNT, "softmax", 3, "classes"),
        ],
        name="higgs",
    )


def normalized_network(network: keras.Model) -> keras.Model:
    """Return a network that first scales the features of each event to length 1.

    Its first layer computes the same as Spark ML's `Normalizer` with ``p=2``, so the pipeline needs
    no such stage.

    Parameters
    ----------
    network : keras.Model
        A network that takes features of length 1.

    Examples
    --------
    >>> import keras
    >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Activation("linear")])
    >>> normalized_network(network)(np.array([[3.0, 4.0]])).numpy().round(6).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    import keras

    layer = keras.layers.UnitNormalization(name="normalization")
    return keras.Sequential([keras.Input(network.input_shape[1:], name="features"), layer, network])


def model_to_bytes(model: keras.Model) -> bytes:
    """Return a model as the bytes of a ``.keras`` file.

    Examples
    --------
    >>> model_from_bytes(model_to_bytes(build_model())).count_params()
    1018002
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        return path.read_bytes()


def model_from_bytes(content: bytes) -> keras.Model:
    """Return the model that `model_to_bytes` serialized. Keras' safe mode runs no code from it.

    Raises
    ------
    ValueError
        If the bytes are not a Keras model.
    """
    import keras

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        path.write_bytes(content)
        return keras.saving.load_model(path, compile=False)


def compiled_predict(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    """Return a model's fastest prediction function, compiled once for all batch sizes.

    `keras.Model.predict` sets up a data pipeline on each call and recompiles for each new size of
    the last batch, while a stream makes thousands of calls with batches of all sizes.

    Parameters
    ----------
    model : keras.Model
        A model with one input of shape (features,) and one output of shape (classes,).

    Returns
    -------
    callable
        Takes float32 of shape (events, features), returns float32 of shape (events, classes).

    Examples
    --------
    >>> compiled_predict(build_model())(np.zeros((3, 30), dtype="float32")).shape
    (3, 2)
    """
    import tensorflow

    signature = tensorflow.TensorSpec([None, *model.input_shape[1:]], tensorflow.float32)
    # AutoGraph rewrites Python control flow; there is none here, and it leaves files behind.
    graph = tensorflow.function(
        lambda features: model(features, training=False),
        input_signature=[signature],
        autograph=False,
    )
    return lambda features: graph(features).numpy()
