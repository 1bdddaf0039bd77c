"""Check on the driver, before any job runs, that workers can load a model and score events with it.

The model is loaded as a worker loads it, compared with the original, and tried with some events.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from helpers.model.copies import model_on_worker, model_to_bytes, needs_code
from helpers.model.errors import UnservableModelError, first_line, refusal
from helpers.model.prediction import (
    Interface,
    interface_of,
    last_function,
    scoring_function,
)

if TYPE_CHECKING:
    import keras

EPSILON = 1e-7  # Keras' default, with which workers compute

_TRIED = 32  # random events per kind, on which a model and its copy must agree
_ALONE = 8  # of all of them, scored one by one
_OPEN_SIZES = (8, 64, 512)  # of the events that a model of any size is tried with
_ROUNDING = 0.01  # how far probabilities may be off, such as with float16


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
    helpers.model.errors.UnservableModelError: this model can't be served: its only output is not a
    probability: end it with a sigmoid, or with a softmax over the classes.
    """
    content, network = worker_copy(model)
    _check_numbers(network)
    values = _tried(network)
    if np.isfinite(values).all(axis=1).any():
        fits = are_probabilities(values)
    else:  # the output of a layer without activation has no bounds
        fits = last_function(network.outputs[0]) != "linear"
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
    >>> from helpers.model import build_model
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
        raise refusal(
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
    >>> from helpers.model import model_from_bytes
    >>> def relu(x): return 2 * x
    >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Activation(relu)])
    >>> check_copy(network, model_from_bytes(model_to_bytes(network)))
    Traceback (most recent call last):
    ...
    helpers.model.errors.UnservableModelError: this model can't be served: its saved copy returns
    other numbers. ...
    """
    if not (_functions_agree(network, copy) and _agree(network, copy)):
        raise refusal(
            "its saved copy returns other numbers. A function in it has the name of one of Keras, "
            "which was loaded in its place: write Keras' functions as strings, such as "
            'activation="gelu", and build others from keras.layers and keras.ops'
        )


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
        raise refusal(
            f"keras.config.epsilon() is {keras.config.epsilon()} here, and {EPSILON} on the "
            f"workers: call keras.config.set_epsilon({EPSILON})"
        )
    if not all(np.isfinite(weight).all() for weight in network.get_weights()):
        raise refusal("its weights are not finite numbers: train it again, at a lower rate")


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
            raise refusal(fault)
        return values
    return np.full((1, 2), np.nan)


def _not_callable(error: Exception) -> UnservableModelError:
    """Return the error for a network that can't be called with events."""
    return refusal(
        f"Keras can't call it on some events, because {first_line(error)}: make it accept any "
        "number of events, and categories that it doesn't know (such as with num_oov_indices=1)"
    )
