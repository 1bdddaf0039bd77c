"""The networks of the walkthrough: the original's, and the one that also scales its input."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

# With random weights, the fraction of events that the network assigns to class 0 is arbitrary,
# anything from none to all. With this seed it is about half, so there is something to see.
SEED = 39

# Numbers between these have squares that are normal 32-bit floats.
_SMALL, _LARGE = 1e-3, 1e15


def build_model(seed: int = SEED, feature_count: int = 30) -> keras.Model:
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
            dense(2, "softmax", 3, "classes"),
        ],
        name="higgs",
    )


def normalized_network(network: keras.Model) -> keras.Model:
    """Return a network that first scales the features of each event to length 1.

    Its first layers compute the same as Spark ML's `Normalizer` with ``p=2``, so the pipeline needs
    no such stage.

    Parameters
    ----------
    network : keras.Model
        A network that takes features of length 1.

    Examples
    --------
    >>> import keras
    >>> import numpy as np
    >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Activation("linear")])
    >>> normalized_network(network)(np.array([[3.0, 4.0]])).numpy().round(6).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    import keras

    features = keras.Input(network.input_shape[1:], name="features")
    # The layer adds up squares, which leave the range of 32-bit floats for very large or very small
    # numbers. These are divided by the largest one first; all others by 1, which changes no digit.
    largest = keras.ops.max(keras.ops.abs(features), axis=-1, keepdims=True)
    is_moderate = keras.ops.logical_and(largest > _SMALL, largest < _LARGE)
    divisor = keras.ops.where(is_moderate, keras.ops.ones_like(largest), largest)
    moderate = keras.ops.divide_no_nan(features, divisor)
    normalized = keras.layers.UnitNormalization(name="normalization")(moderate)
    return keras.Model(features, network(normalized))
