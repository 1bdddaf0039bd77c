"""The network of the walkthrough: build it, send it to workers as bytes, and call it.

`servable_model` checks on the driver, before any job runs, whether a Keras model can be sent and
called; `scoring_function` calls it. The functions import Keras only when they are called, because
the import takes seconds, and a program that only parses its options does not need it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    import keras

Made = TypeVar("Made")

# With random weights, the fraction of events that the network assigns to class 0 is arbitrary,
# anything from none to all. With this seed it is about half, so there is something to see.
SEED = 39

_TRIED = 32  # random events per kind, on which a model and its copy must agree
_ALONE = 8  # of all of them, scored one by one
EPSILON = 1e-7  # Keras' default, with which workers compute
_OPEN_SIZES = (8, 64, 512)  # of the events that a model of any size is tried with

_ROUNDING = 0.01  # how far probabilities may be off, such as with float16

# Layers that leave a probability unchanged at the end of a network.
_UNCHANGING = ("Dropout", "Flatten", "Identity", "Reshape")

_SIGMOIDS = ("sigmoid", "hard_sigmoid")  # functions that return a probability

# Numbers between these have squares that are normal 32-bit floats.
_SMALL, _LARGE = 1e-3, 1e15

# How Keras says that it doesn't know something: its kind, and its name.
_UNKNOWN = re.compile(
    r"Could not locate (\w+) '([^']+)'|object of (type) `([^`]+)`"
    r"|Could not interpret (\w+) identifier: (\S+)"
)

_REGISTRY = threading.Lock()  # held while the classes that are registered with Keras are hidden


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
        _leave_out_training(path)
        return keras.saving.load_model(path, compile=False)


def _leave_out_training(path: Path) -> None:
    """Rewrite a ``.keras`` file without the losses and metrics of its parts, which may need code.

    Keras leaves out those of the outermost model only.
    """
    try:
        with zipfile.ZipFile(path) as found:
            text = found.read("config.json")
            if b'"compile_config"' not in text:
                return
            parts = {name: found.read(name) for name in found.namelist()}
        config = json.loads(text, object_hook=_uncompiled)
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError):
        return  # Keras says what is wrong with it
    with zipfile.ZipFile(path, "w") as kept:
        for name, part in {**parts, "config.json": json.dumps(config)}.items():
            kept.writestr(name, part)


def _uncompiled(part: dict[str, object]) -> dict[str, object]:
    """Return a part of a model's config without its loss, metrics and optimizer."""
    return {name: value for name, value in part.items() if name != "compile_config"}


def model_on_worker(content: bytes) -> keras.Model:
    """Return a model as a worker loads it from bytes, with Keras' classes only.

    Parameters
    ----------
    content : bytes
        The bytes that `model_to_bytes` returned.

    Raises
    ------
    UnservableModelError
        If the model has classes or functions that are not part of Keras.

    Examples
    --------
    >>> model_on_worker(model_to_bytes(build_model())).name
    'higgs'
    """
    try:
        return as_on_worker(model_from_bytes, content)
    except Exception as error:  # Keras may raise anything for a class that it doesn't know
        raise needs_code(error) from None


def as_on_worker(function: Callable[..., Made], *arguments: object) -> Made:
    """Call a function that loads something of Keras, as a worker would: with Keras' classes only.

    Meanwhile, classes and functions that were registered with Keras in this process are hidden,
    because workers don't have them.

    Parameters
    ----------
    function : callable
        Loads something.
    *arguments
        What it is called with.

    Examples
    --------
    >>> import keras
    >>> as_on_worker(keras.losses.deserialize, "mean_squared_error").__name__
    'mean_squared_error'
    """
    import keras

    registered = keras.saving.get_custom_objects()
    with _REGISTRY:
        hidden = dict(registered)
        registered.clear()
        try:
            # Keras' scopes of custom objects, and of loading code, belong to a thread.
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(function, *arguments).result()
        finally:
            registered.update(hidden)


class UnservableModelError(ValueError):
    """Workers can't load the model, or can't score events with it; the message has the remedy."""


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
    >>> interface_of(build_model())
    Interface(shape=(30,), dtype='float32', outputs=2)
    """
    fault = _fault(model)
    if fault:
        raise _refusal(fault)
    (given,), (found,) = model.inputs, model.outputs
    return Interface(tuple(given.shape[1:]), given.dtype, found.shape[1])


class ServableModel(NamedTuple):
    """A model that workers can load and call.

    Attributes
    ----------
    content : bytes
        The model, for `model_from_bytes`.
    interface : Interface
        Its input and output for one event.
    gives_probabilities : bool
        Whether the values of its classes are probabilities, for some events.
    """

    content: bytes
    interface: Interface
    gives_probabilities: bool


def servable_model(model: keras.Model) -> ServableModel:
    """Return a model ready to be sent to workers, after checking that they can use it.

    It is loaded here as a worker loads it, must return the same numbers as the model itself, and
    scores some events. A model of a class that isn't part of Keras is sent as the functional model
    of the layers that its `call` uses.

    Parameters
    ----------
    model : keras.Model
        A model as `interface_of` describes it, of layers and functions that are part of Keras.

    Raises
    ------
    UnservableModelError
        If the workers can't load or call the model; the message says what to change.

    Examples
    --------
    >>> import keras
    >>> servable_model(keras.Sequential([keras.Input((30,)), keras.layers.Dense(1)]))
    Traceback (most recent call last):
    ...
    helpers.model.UnservableModelError: this model can't be served: its only output is not a
    probability: end it with a sigmoid, or with a softmax over the classes.
    """
    content, network = worker_copy(model)
    _check_numbers(network)
    values = _tried(network)
    if np.isfinite(values).all(axis=1).any():
        fits = are_probabilities(values)
    else:  # the output of a layer without activation has no bounds
        fits = _last_function(network.outputs[0]) != "linear"
    return ServableModel(content, interface_of(network), fits)


def worker_copy(model: keras.Model) -> tuple[bytes, keras.Model]:
    """Return a model as bytes, and as the model that workers load from them.

    Parameters
    ----------
    model : keras.Model
        A model as `servable_model` takes it.

    Raises
    ------
    UnservableModelError
        If the workers can't load the model, or their model returns other numbers.

    Examples
    --------
    >>> worker_copy(build_model())[1].name
    'higgs'
    """
    network = _functional(model)
    interface_of(network)
    try:
        content = model_to_bytes(network)
    except Exception as error:  # a layer's configuration may raise anything
        raise needs_code(error) from None
    copy = model_on_worker(content)
    check_copy(network, copy)
    if network is not model and not _agree(model, copy):
        raise _refusal(
            "its call returns other numbers than the functional model of its layers, such as for a "
            "layer that it calls with training=True: leave `training` to Keras"
        )
    return content, copy


def check_copy(network: keras.Model, copy: keras.Model) -> None:
    """Raise `UnservableModelError` if a network's saved copy returns other numbers for some events.

    Keras saves a function by its name, and if it has one of that name itself, it loads that one.

    Parameters
    ----------
    network, copy : keras.Model
        The network, and what was loaded of it.

    Examples
    --------
    >>> import keras
    >>> def relu(x): return 2 * x
    >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Activation(relu)])
    >>> check_copy(network, model_from_bytes(model_to_bytes(network)))
    Traceback (most recent call last):
    ...
    helpers.model.UnservableModelError: this model can't be served: its saved copy returns other
    numbers. ...
    """
    if not (_functions_agree(network, copy) and _agree(network, copy)):
        raise _refusal(
            "its saved copy returns other numbers. A function in it has the name of one of Keras, "
            "which was loaded in its place: write Keras' functions as strings, such as "
            'activation="gelu", and build others from keras.layers and keras.ops'
        )


def _functions_agree(network: keras.Model, copy: keras.Model) -> bool:
    """Return whether the activations of a network and its copy return the same numbers.

    They are tried with numbers of all sizes: an event that is tried may reach only some of them.
    """
    import keras

    sizes = np.concatenate([[0], np.logspace(-6, 30, 73)])
    grid = np.random.default_rng(0).permuted(np.tile([*-sizes, *sizes], (4, 1)), axis=1).T
    numbers = keras.ops.convert_to_tensor(grid, "float32")
    for functions in zip(_activations(network), _activations(copy), strict=False):
        if functions[0] is functions[1]:
            continue
        with contextlib.suppress(Exception):  # a function may take another shape only
            found = [keras.ops.convert_to_numpy(each(numbers)) for each in functions]
            known = np.isfinite(found[0]) & np.isfinite(found[1])  # a plain formula may overflow
            if not _are_close(found[0][known], found[1][known]):
                return False
    return True


def _activations(layer: keras.Layer) -> Iterator[object]:
    """Yield a layer's activations and those of the layers in it, of shared ones each time."""
    import keras

    yield getattr(layer, "activation", None)
    yield getattr(layer, "recurrent_activation", None)
    for part in layer.layers if isinstance(layer, keras.Model) else layer._layers:
        yield from _activations(part)


def _agree(model: keras.Model, copy: keras.Model) -> bool:
    """Return whether two models return the same numbers for the tried events that both take."""
    (given,) = copy.inputs
    # A size that is open may be any, unless the network's layers say otherwise.
    for open_size in _OPEN_SIZES if None in given.shape[1:] else _OPEN_SIZES[:1]:
        shape = tuple(open_size if size is None else size for size in given.shape[1:])
        verdict = _agree_on(model, copy, _sample(copy, shape, given.dtype), given.dtype)
        if verdict is not None:
            return verdict
    return True


def _agree_on(model: keras.Model, copy: keras.Model, sample: np.ndarray, dtype: str) -> bool | None:
    """Return whether two models agree on events; None if they take none of them."""
    import keras

    events = keras.ops.convert_to_tensor(sample, dtype)

    def agree(part: slice) -> bool:
        with keras.StatelessScope():  # a call with training=True would change the model
            one, other = (
                keras.tree.flatten(each(events[part], training=False)) for each in (model, copy)
            )
        return all(map(_are_close, one, other))

    try:
        return agree(slice(None))
    except Exception:  # such as for an unknown category, or a size that must be another one
        verdicts = []
        for number in range(len(events)):
            with contextlib.suppress(Exception):
                verdicts.append(agree(slice(number, number + 1)))
        return all(verdicts) if verdicts else None


def _are_close(one: object, other: object) -> bool:
    """Return whether two tensors have the same numbers, except for rounding."""
    import keras

    return np.allclose(
        keras.ops.cast(one, "float64"), keras.ops.cast(other, "float64"),
        rtol=1e-5, atol=1e-6, equal_nan=True,
    )  # fmt: skip


def are_probabilities(values: np.ndarray) -> bool:
    """Return whether the values of all classes are probabilities, for events that have any.

    Parameters
    ----------
    values : numpy.ndarray
        What `scoring_function` returned, of shape (events, classes).

    Examples
    --------
    >>> are_probabilities(np.array([[0.25, 0.75], [np.nan, np.nan]]))
    True
    >>> are_probabilities(np.array([[0.6, 5.0]]))
    False
    """
    values = values[np.isfinite(values).all(axis=1)]  # a layer may not be defined for all events
    is_in_range = (values > -_ROUNDING).all() and (values < 1 + _ROUNDING).all()
    return bool(is_in_range and np.allclose(values.sum(axis=1), 1, atol=_ROUNDING))


def dependence(
    score: Callable[[np.ndarray], np.ndarray], events: np.ndarray, values: np.ndarray
) -> str | None:
    """Return what is wrong with scores that depend on the other events; None if they don't.

    Parameters
    ----------
    score : callable
        What `scoring_function` returned.
    events : numpy.ndarray
        Features of events, of shape (events, features). A few of them are scored one by one.
    values : numpy.ndarray
        The scores of all events together, of shape (events, classes).

    Examples
    --------
    >>> dependence(lambda events: events / events.sum(), np.ones((2, 1)), np.full((2, 1), 0.5))[:54]
    "an event's numbers depend on the other events of its b"
    """
    step = max(len(events) // _ALONE, 1)
    alone = np.vstack([score(event[None]) for event in events[::step]])
    if np.allclose(values[::step], alone, _ROUNDING, _ROUNDING, equal_nan=True):
        return None
    return (
        "an event's numbers depend on the other events of its batch, or change from call to call: "
        "let layers and functions use each event alone (such as axis=-1)"
    )


def _sample(network: keras.Model, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Return random events for an input: zeros and ones for integers, which may be few categories.

    Some numbers are around 0, and some where the network's own layers expect them. Far away from
    there, all events would look alike.
    """
    import keras

    random = np.random.default_rng(0)
    if not keras.backend.is_float_dtype(dtype):
        return random.integers(0, 2, (_TRIED, *shape)).astype("float64")
    normal = random.normal(scale=2, size=(_TRIED, *shape))
    around = [mean + scale * normal for mean, scale in _expected(network, shape)]
    return np.concatenate([normal, *around])


def _expected(
    network: keras.Model, shape: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return the means and scales that layers of a network expect of an input of this shape."""
    import keras

    for layer in network.layers:
        if isinstance(layer, keras.Model):
            yield from _expected(layer, shape)
        elif isinstance(layer, keras.layers.Normalization) and not layer.invert:
            yield from _fitting(layer.mean, layer.variance, shape)
        elif isinstance(layer, keras.layers.BatchNormalization):
            yield from _fitting(layer.moving_mean, layer.moving_variance, shape)
        elif isinstance(layer, keras.layers.Rescaling) and np.all(layer.scale):
            mean, variance = -np.divide(layer.offset, layer.scale), 1 / np.square(layer.scale)
            yield from _fitting(mean, variance, shape)


def _fitting(
    mean: object, variance: object, shape: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Return a layer's means and scales if it has one of each per number, or one for all."""
    import keras

    means, variances = (
        keras.ops.convert_to_numpy(each).astype("float64").ravel() for each in (mean, variance)
    )
    if len(means) in (1, math.prod(shape)) and np.isfinite([*means, *variances]).all():
        yield np.resize(means, shape), np.resize(np.sqrt(variances), shape)


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
            raise _refusal(
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
    if tensor.shape[1] == 1 and _last_function(tensor).lower() not in _SIGMOIDS:
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


def _last_function(tensor: keras.KerasTensor) -> str:
    """Return the name of the function, or of the layer, that a network ends with."""
    import keras

    operation, _, place = tensor._keras_history
    if isinstance(operation, keras.Model):
        return _last_function(operation.outputs[place])
    function = getattr(operation, "activation", None)
    name = getattr(function, "__name__", type(operation).__name__)
    passes_on = isinstance(operation, keras.layers.Activation) and name == "linear"
    if passes_on or name in _UNCHANGING:
        return _last_function(operation.input)
    return name


def _functional(model: keras.Model) -> keras.Model:
    """Return a model of one of Keras' classes: a subclass becomes a model of its layers."""
    import keras

    is_subclass = not type(model).__module__.startswith("keras.")
    if not (isinstance(model, keras.Model) and is_subclass):
        return model
    known = getattr(model, "inputs", None)
    if known:
        shapes, dtype = [tensor.shape for tensor in known], known[0].dtype
    else:
        shapes, dtype = [(model.get_build_config() or {}).get("input_shape")], model.input_dtype
    if len(shapes) != 1 or not _is_shape(shapes[0]):
        return model  # it is not built, or has several inputs
    inputs = keras.Input(shapes[0][1:], dtype=dtype)
    takes_training = "training" in inspect.signature(model.call).parameters
    try:
        outputs = model.call(inputs, **({"training": False} if takes_training else {}))
        return keras.Model(inputs, outputs, name=model.name)
    except Exception as error:  # user code may raise anything
        raise needs_code(error) from None


def _is_shape(shape: object) -> bool:
    """Return whether an entry of Keras' build configuration is the shape of a single tensor."""
    return isinstance(shape, tuple) and all(isinstance(size, int | None) for size in shape)


def _check_numbers(network: keras.Model) -> None:
    """Raise `UnservableModelError` if Keras computes otherwise here than on workers, or nothing."""
    import keras

    if keras.config.epsilon() != EPSILON:
        raise _refusal(
            f"keras.config.epsilon() is {keras.config.epsilon()} here, and {EPSILON} on the "
            f"workers: call keras.config.set_epsilon({EPSILON})"
        )
    if not all(np.isfinite(weight).all() for weight in network.get_weights()):
        raise _refusal("its weights are not finite numbers: train it again, at a lower rate")


def _tried(network: keras.Model) -> np.ndarray:
    """Return what a network returns for random events; NaN if none of the tried sizes fits it."""
    interface = interface_of(network)
    try:
        score = scoring_function(network)
    except Exception as error:  # TensorFlow may raise anything for a network that doesn't fit
        raise _not_callable(error) from None
    for size in _OPEN_SIZES if None in interface.shape else (0,):
        features = math.prod(size if known is None else known for known in interface.shape)
        try:
            events = _sample(network, (features,), interface.dtype)
            events = np.concatenate([events, np.abs(events)])  # a layer may be undefined below 0
            values = score(events)
            fault = dependence(score, events, values)
        except UnservableModelError:
            raise
        except Exception as error:  # such as for an open size that must be a certain one after all
            if size:
                continue
            raise _not_callable(error) from None
        if fault:
            raise _refusal(fault)
        return values
    return np.full((1, 2), np.nan)


def _not_callable(error: Exception) -> UnservableModelError:
    """Return the error for a network that can't be called with events."""
    return _refusal(
        f"Keras can't call it on some events, because {first_line(error)}: make it accept any "
        "number of events, and categories that it doesn't know (such as with num_oov_indices=1)"
    )


def needs_code(error: Exception) -> UnservableModelError | OSError:
    """Return the error for a model that Keras can't copy without code.

    Parameters
    ----------
    error : Exception
        What Keras raised. An error of this machine, such as a full disk, is returned as it is.

    Examples
    --------
    >>> needs_code(TypeError("Could not locate class 'Mine'."))
    UnservableModelError("this model can't be served: the class 'Mine' is not part of Keras: ...
    """
    if isinstance(error, OSError) and error.errno:
        return error
    return _refusal(
        f"{missing_code(error)}: build it from keras.layers and keras.ops, because workers have no "
        "other code"
    )


def missing_code(error: Exception) -> str:
    """Return why Keras can't copy something.

    Parameters
    ----------
    error : Exception
        What Keras raised.

    Examples
    --------
    >>> missing_code(TypeError("Could not locate class 'Mine'."))
    "the class 'Mine' is not part of Keras"
    """
    text = str(error)
    unknown = _UNKNOWN.search(text)
    if unknown:
        kind, name = filter(None, unknown.groups())
        return f"the {kind} {name.rpartition('>')[2]!r} is not part of Keras"
    if "lambda" in text.lower():
        return "it has a Python lambda"
    return f"Keras can't copy it ({first_line(error)})"


def _refusal(fault: str) -> UnservableModelError:
    """Return the error for a model that can't be served."""
    return UnservableModelError(f"this model can't be served: {fault}.")


def first_line(error: Exception) -> str:
    """Return the beginning of an error's message, without a full stop.

    Parameters
    ----------
    error : Exception
        An error whose message may have many lines, or none.

    Examples
    --------
    >>> first_line(ValueError("The shapes differ."))
    'The shapes differ'
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
