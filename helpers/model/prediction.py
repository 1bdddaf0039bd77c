"""The input and output of a model, and the compiled function that scores events with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from helpers.model.errors import refusal

if TYPE_CHECKING:
    import keras

# Layers that leave a probability unchanged at the end of a network.
_UNCHANGING = ("Dropout", "Flatten", "Identity", "Reshape")

_SIGMOIDS = ("sigmoid", "hard_sigmoid")  # functions that return a probability


class Interface(NamedTuple):
    """The input and output of a network for one event.

    Attributes
    ----------
    shape : tuple of int
        The shape of the input. One of the sizes may be None: any size.
    dtype : str
        The type of the input.
    outputs : int
        How many numbers the network returns. A single one is the probability of class 1.
    """

    shape: tuple[int | None, ...]
    dtype: str
    outputs: int

    @property
    def features(self) -> int | None:
        """The number of features; None if the network accepts different numbers."""
        return None if None in self.shape else math.prod(self.shape)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return max(self.outputs, 2)

    def event_shape(self, features: int) -> tuple[int, ...]:
        """Return the shape of an event's features after `numpy.reshape`.

        Parameters
        ----------
        features : int
            The number of features.

        Raises
        ------
        ValueError
            If the network doesn't accept this number of features.

        Examples
        --------
        >>> Interface((None, 5, 1), "float32", outputs=2).event_shape(30)
        (6, 5, 1)
        """
        known = math.prod(size for size in self.shape if size is not None)
        if None in self.shape:
            fits, takes = features % known == 0, f"a multiple of {known}"
        else:
            fits, takes = features == known, known
        if not fits:
            raise ValueError(f"the model takes {takes} features, but a row has {features}.")
        return tuple(features // known if size is None else size for size in self.shape)


def interface_of(model: keras.Model) -> Interface:
    """Return the input and output of a model for one event.

    Parameters
    ----------
    model : keras.Model
        A model with one input, of numbers, and one output: a number per class, or the probability
        of class 1 from a sigmoid.

    Raises
    ------
    UnservableModelError
        If the model has other inputs or outputs.

    Examples
    --------
    >>> from helpers.model import build_model
    >>> interface_of(build_model())
    Interface(shape=(30,), dtype='float32', outputs=2)
    """
    fault = _fault(model)
    if fault:
        raise refusal(fault)
    (given,), (found,) = model.inputs, model.outputs
    return Interface(tuple(given.shape[1:]), given.dtype, found.shape[1])


def compiled_predict(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    """Return a model's fastest prediction function, compiled once for all batch sizes.

    `keras.Model.predict` sets up a data pipeline on each call and recompiles for each new size of
    the last batch, while a stream makes thousands of calls with batches of all sizes.

    Parameters
    ----------
    model : keras.Model
        A model with one input and one output.

    Returns
    -------
    callable
        Takes events in the shape and type of the model's input, returns the model's output.

    Examples
    --------
    >>> from helpers.model import build_model
    >>> compiled_predict(build_model())(np.zeros((3, 30), dtype="float32")).shape
    (3, 2)
    """
    import keras
    import tensorflow

    (given,) = model.inputs
    signature = tensorflow.TensorSpec([None, *given.shape[1:]], given.dtype)
    # AutoGraph rewrites Python control flow; there is none here, and it leaves files behind.
    graph = tensorflow.function(
        lambda features: keras.tree.flatten(model(features, training=False))[0],
        input_signature=[signature],
        autograph=False,
    ).get_concrete_function()
    return lambda features: graph(tensorflow.constant(features)).numpy()


def scoring_function(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from events' features to the values of their classes.

    Parameters
    ----------
    model : keras.Model
        A model as `interface_of` describes it.

    Returns
    -------
    callable
        Takes float64 of shape (events, features), which are converted to the type of the model's
        input. Returns float64 of shape (events, classes): the model's output, or [1 - p, p] if that
        is a single probability p. The values of an event are NaN if the input can't represent a
        feature (such as an infinite one, or 2.5 as an integer), or if the model fails on the event
        (such as an embedding on an unknown category).

    Examples
    --------
    >>> from helpers.model import build_model
    >>> scoring_function(build_model())(np.zeros((3, 30))).sum(axis=1).round(6).tolist()
    [1.0, 1.0, 1.0]
    """
    import tensorflow

    interface, predict = interface_of(model), compiled_predict(model)
    dtype = tensorflow.as_dtype(interface.dtype)

    def score(features: np.ndarray) -> np.ndarray:
        if not len(features):  # a network that takes any number of features can fail on none
            return np.empty((0, interface.classes))
        shape = (len(features), *interface.event_shape(features.shape[1]))
        with np.errstate(invalid="ignore", over="ignore"):  # unfit values are found below
            typed = features.astype(dtype.as_numpy_dtype)
            is_large = np.isinf(features.astype("float32"))  # as in a layer of 32-bit floats
        unfit = is_large | (np.isinf(typed) if dtype.is_floating else typed != features)
        unfit = unfit.any(axis=1)
        typed[unfit] = 0  # because a model, such as an embedding, could fail on them
        values = _predicted(predict, typed.reshape(shape), interface.outputs).astype("float64")
        if values.shape != (len(features), interface.outputs):
            raise refusal(
                f"it returns an array of shape {values.shape} for {len(features)} events: make it "
                "return one row per event"
            )
        if interface.outputs == 1:
            values = np.hstack([1 - values, values])
        values[unfit] = np.nan
        return values

    return score


def _predicted(
    predict: Callable[[np.ndarray], np.ndarray], events: np.ndarray, outputs: int
) -> np.ndarray:
    """Return a network's output; NaN for events on which it fails, unless it fails on all."""
    import tensorflow

    pending, found, has_failed = [events], [], False
    while pending:
        part = pending.pop()
        try:
            found.append(predict(part))
        except tensorflow.errors.InvalidArgumentError:
            has_failed, middle = True, len(part) // 2
            if middle:
                pending += [part[middle:], part[:middle]]  # the first half is next
            else:
                found.append(np.full((1, outputs), np.nan, "float32"))
    values = np.concatenate(found)
    if has_failed and np.isnan(values).all():
        predict(np.zeros_like(events[:1]))  # raises again if the network is at fault
    return values


def _fault(model: keras.Model) -> str | None:
    """Return the fault in a model's inputs or outputs, with the remedy; None if there is none."""
    import keras

    if keras.config.backend() != "tensorflow":
        found = keras.config.backend()
        return f"Keras' backend is {found}: set KERAS_BACKEND=tensorflow before Keras is imported"
    if not isinstance(model, keras.Model):
        return f"it is a {type(model).__name__}, not a keras.Model: load or build one"
    try:
        inputs, outputs = model.inputs, model.outputs
    except AttributeError:
        return (
            "it isn't built for one tensor of features: begin it with keras.Input, or call it on "
            "some events"
        )
    if len(inputs) != 1:
        return (
            f"it has {len(inputs)} inputs: give it a single keras.Input for all features, and "
            "split that inside"
        )
    if len(outputs) != 1:
        return (
            f"it has {len(outputs)} outputs: choose one, as in "
            "keras.Model(model.inputs, model.outputs[0])"
        )
    return _input_fault(inputs[0]) or _output_fault(outputs[0])


def _input_fault(tensor: keras.KerasTensor) -> str | None:
    """Return the fault in a model's input, with the remedy; None if there is none."""
    if not _is_numeric(tensor.dtype):
        return f"its input is of type {tensor.dtype}: convert it to numbers before Spark reads it"
    if tensor.shape[1:].count(None) > 1:
        return (
            f"its input has the shape {tensor.shape}: fix all sizes but one in keras.Input, so "
            "that there is only one way to arrange a list of features"
        )
    return None


def _output_fault(tensor: keras.KerasTensor) -> str | None:
    """Return the fault in a model's output, with the remedy; None if there is none."""
    if not _is_numeric(tensor.dtype):
        return f"its output is of type {tensor.dtype}: make it return a number per class"
    if len(tensor.shape) != 2 or not tensor.shape[1]:
        return (
            f"its output has the shape {tensor.shape}, not (None, classes): end it with a layer "
            "that returns one row per event, such as keras.layers.Flatten and Dense, or an LSTM "
            "without return_sequences"
        )
    if tensor.shape[1] == 1 and last_function(tensor).lower() not in _SIGMOIDS:
        return (
            "its only output is not a probability: end it with a sigmoid, or with a softmax over "
            "the classes"
        )
    return None


def _is_numeric(dtype: str) -> bool:
    """Return whether a type of Keras holds real numbers."""
    import keras

    return keras.backend.is_float_dtype(dtype) or keras.backend.is_int_dtype(dtype) or (
        dtype == "bool"
    )


def last_function(tensor: keras.KerasTensor) -> str:
    """Return the name of the function, or of the layer, that a network ends with.

    Parameters
    ----------
    tensor : keras.KerasTensor
        The network's output.

    Examples
    --------
    >>> from helpers.model import build_model
    >>> last_function(build_model().outputs[0])
    'softmax'
    """
    import keras

    operation, _, place = tensor._keras_history
    if isinstance(operation, keras.Model):
        return last_function(operation.outputs[place])
    function = getattr(operation, "activation", None)
    name = getattr(function, "__name__", type(operation).__name__)
    passes_on = isinstance(operation, keras.layers.Activation) and name == "linear"
    if passes_on or name in _UNCHANGING:
        return last_function(operation.input)
    return name
