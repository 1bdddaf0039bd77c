"""Describe what every replica is made of, and refuse what a copy of it would lose.

A network, an optimizer and a loss travel to the workers as Keras saves them. Keras saves functions
by their names, and leaves out some of what can be set on an object.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from pyspark.sql.types import ArrayType, DataType, NumericType

from helpers.model import (
    check_copy,
    missing_code,
    model_from_bytes,
    model_to_bytes,
    needs_code,
)

if TYPE_CHECKING:
    import keras

# The reductions of a Keras loss that take the mean over the rows of an update.
_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")

# Keras' losses by the labels that they take. All others take any number for each output.
_CLASSES = (
    "sparse_categorical_crossentropy", "categorical_generalized_cross_entropy", "circle",
)  # fmt: skip
_PROBABILITIES = (
    "binary_crossentropy", "categorical_crossentropy", "binary_focal_crossentropy",
    "categorical_focal_crossentropy", "kl_divergence",
)  # fmt: skip
# Of one output, Keras takes the share in the sum of all, which is 1: nothing would be learned.
_BETWEEN_CLASSES = ("categorical_crossentropy", "categorical_focal_crossentropy")
_SIGNS = ("hinge", "squared_hinge", "categorical_hinge")


class Recipe(NamedTuple):
    """A network as bytes, and Keras' configs of an optimizer and a loss."""

    model: bytes
    optimizer: dict[str, Any]
    loss: Any


class Format(NamedTuple):
    """The format of rows that a network and its loss take.

    Attributes
    ----------
    inputs, outputs : int
        The number of the network's inputs and of its outputs.
    dtype : str
        The type of the features: that of the network's input if its numbers need it.
    labels : str
        ``classes``: the number of a class; ``probabilities``: from 0 to 1 for each output;
        ``signs``: from -1 to 1; ``numbers``: any.
    """

    inputs: int
    outputs: int
    dtype: str = "float32"
    labels: str = "numbers"


def format_of(model: keras.Model, loss: Any) -> Format:
    """Return the format of rows for a network and a loss.

    Raises
    ------
    ValueError
        If the network doesn't take a table, or the loss isn't a mean over rows or needs several
        outputs.
    """
    import keras

    reduction = getattr(loss, "reduction", _MEANS[0])
    if reduction not in _MEANS:
        raise ValueError(
            f"the loss has the reduction {reduction!r}: use {_MEANS[0]!r}, the mean over the rows "
            "of an update."
        )
    try:
        shapes = {"inputs": model.input_shape, "outputs": model.output_shape}
    except AttributeError:
        raise ValueError("the network has no inputs yet: begin it with keras.Input.") from None
    for name, shape in shapes.items():
        if len(shape) != 2 or not all(isinstance(size, int) for size in shape[1:]):
            raise ValueError(
                f"the network's {name} have the shape {shape}: to train on a table, it must be "
                f"(rows, {name})."
            )
    if shapes["outputs"][1] == 1 and any(
        _function_of(loss) is getattr(keras.losses, name) for name in _BETWEEN_CLASSES
    ):
        raise ValueError(
            "the loss compares the outputs of all classes, but the network has only one output: "
            "use loss='binary_crossentropy'."
        )
    dtype = model.inputs[0].dtype
    if keras.backend.is_float_dtype(dtype) and dtype != "float64":
        dtype = "float32"  # the network rounds them to shorter ones
    return Format(shapes["inputs"][1], shapes["outputs"][1], dtype, labels_of(loss))


def check_labels(name: str, found: DataType, format_: Format) -> None:
    """Reject a column of labels of a kind that the loss doesn't take."""
    if format_.labels == "classes" and not isinstance(found, NumericType):
        raise ValueError(
            f"the loss takes the number of the class, which column {name!r} doesn't have: use "
            "loss='categorical_crossentropy'."
        )
    if format_.labels != "classes" and format_.outputs > 1 and not isinstance(found, ArrayType):
        raise ValueError(
            f"the loss takes an entry per class, which column {name!r} doesn't have: use "
            "loss='sparse_categorical_crossentropy'."
        )


def recipe_of(model: keras.Model, optimizer: keras.optimizers.Optimizer, loss: Any) -> Recipe:
    """Return copies of a network, an optimizer and a loss, to send to workers.

    Raises
    ------
    ValueError
        If a copy would be another network, optimizer or loss; the message says what is lost.
    """
    import keras

    try:
        content = model_to_bytes(model)
        copy = model_from_bytes(content)
    except Exception as error:  # Keras may raise anything for a class that it doesn't know
        raise needs_code(error) from None
    check_copy(model, copy)
    if _frozen(model) != _frozen(copy):
        raise ValueError(
            "a copy of the network would train other weights than the network: set `trainable` of "
            "whole layers, not of the network or of single weights."
        )
    optimizer_config = _optimizer_config(model, optimizer)
    _check_copy("loss", loss, keras.losses)
    return Recipe(content, optimizer_config, keras.losses.serialize(loss))


def _optimizer_config(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    import keras

    is_scaling = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    inner = optimizer.inner_optimizer if is_scaling else optimizer
    if any(getattr(inner, f"_exclude_from_weight_decay{end}", None) for end in ("", "_pattern")):
        raise ValueError(
            "a copy of the optimizer would forget exclude_from_weight_decay: leave it out, and "
            "give the layers whose weights shall decay a kernel_regularizer."
        )
    # As Keras does when it compiles a network, by the policy that the network was made with.
    if model.dtype_policy.name == "mixed_float16" and not is_scaling:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    _check_copy("optimizer", inner, keras.optimizers)
    return keras.optimizers.serialize(optimizer)


def _check_copy(what: str, given: Any, module: ModuleType) -> None:
    """Reject an object that Keras can't copy, or copies as one of its own with the same name."""
    name = getattr(given, "__name__", type(given).__name__)
    rule = "choose one of Keras' under its own name, because workers have no other code."
    try:
        copy = module.deserialize(module.serialize(given))
    except Exception as error:  # Keras may raise anything for a class that it doesn't know
        raise ValueError(
            f"the {what} {name!r} can't be copied, because {missing_code(error)}: {rule}"
        ) from None
    if type(given) is not type(copy) or _function_of(given) is not _function_of(copy):
        raise ValueError(
            f"the {what} {name!r} is not part of Keras, or only has the name of a part: {rule}"
        )


def _frozen(model: keras.Model) -> list[bool]:
    """Return for each weight whether training leaves it as it is."""
    trained = {id(weight) for weight in model.trainable_weights}
    return [id(weight) not in trained for weight in model.weights]


def labels_of(loss: Any) -> str:
    """Return the kind of labels that a loss takes, by its function, whatever its name is."""
    import keras

    function = _function_of(loss)
    kinds = {"classes": _CLASSES, "probabilities": _PROBABILITIES, "signs": _SIGNS}
    for kind, names in kinds.items():
        if any(function is getattr(keras.losses, name, None) for name in names):
            return kind
    return "numbers"


def _function_of(loss: Any) -> Any:
    """Return the function of a loss; itself, if it has none of its own."""
    return getattr(loss, "fn", loss if callable(loss) and hasattr(loss, "__name__") else type(loss))
