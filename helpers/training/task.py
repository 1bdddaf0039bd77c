"""The Spark task of `helpers.training.AveragingTrainer`, which trains or evaluates a network.

A task depends only on its rows and the driver's broadcast, so Spark may retry it anywhere. Only the
compiled network stays in the Python process for the next round, cached by
`helpers.transformers.kept_network`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
from pyspark import TaskContext
from pyspark.broadcast import Broadcast

from helpers.model import model_from_bytes
from helpers.training.recipe import Format, Recipe, labels_of
from helpers.transformers import kept_network

Batches = Iterator[pyarrow.RecordBatch]
# The single row that a task returns. The state is empty after evaluation; `refused` says what is
# wrong with the rows.
RESULT = "worker long, totals array<double>, state binary, refused string"


# From which number to which the labels of a kind are.
_RANGES = {"probabilities": (0, 1), "signs": (-1, 1), "numbers": (-np.inf, np.inf)}


class InvalidRowsError(ValueError):
    """The rows don't fit the network, or contain values that are not finite numbers."""


class Rows(NamedTuple):
    """Rows: features (rows, inputs); labels in float32, (rows, outputs), or (rows,) for classes."""

    features: np.ndarray
    labels: np.ndarray


def read_rows(batches: Iterable[pyarrow.RecordBatch], format_: Format) -> Rows:
    """Return the rows in Arrow batches, holding them in memory only once, plus one batch.

    A batch has ``features``, lists with one number per input of the network, and ``label``: lists
    with one number per output, or numbers. Rows that don't fit raise `InvalidRowsError`.

    Examples
    --------
    >>> batch = pyarrow.record_batch({"features": [[2.0], [1.0]], "label": [1, 0]})
    >>> read_rows([batch, batch], Format(inputs=1, outputs=2, labels="classes")).labels.tolist()
    [1.0, 0.0, 1.0, 0.0]
    """
    features, labels, shape = bytearray(), bytearray(), ()
    for batch in batches:
        features += _features(batch["features"], format_).data
        part = _labels(batch["label"], format_)
        labels += part.data
        shape = part.shape[1:]
    return Rows(
        np.frombuffer(features, format_.dtype).reshape(-1, format_.inputs),
        np.frombuffer(labels, "float32").reshape(-1, *shape),
    )


def _features(column: pyarrow.Array, format_: Format) -> np.ndarray:
    """Return features in the type of the network's input."""
    numbers = _matrix(column, "features", format_.inputs, "inputs")
    with np.errstate(invalid="ignore"):  # unfit numbers are found below
        features = numbers.astype(format_.dtype, copy=False)
    if not np.issubdtype(features.dtype, np.floating):
        # From 2**53 on, Spark may have rounded a whole number to another one.
        for wrong in numbers[(features != numbers) | (np.abs(numbers) >= 2.0**53)]:
            limit = " and from 2**53 on, numbers may be rounded" if abs(wrong) >= 2.0**53 else ""
            raise InvalidRowsError(
                f"features has {wrong:g}, but the network's input is of type {format_.dtype}"
                f"{limit}: leave these rows out."
            )
    return features


def _labels(column: pyarrow.Array, format_: Format) -> np.ndarray:
    """Return labels in the shape that Keras' losses expect, if they are of the loss's kind."""
    outputs = format_.outputs
    if pyarrow.types.is_list(column.type):
        labels = _matrix(column, "label", outputs, "outputs").astype("float32", copy=False)
    else:
        labels = _numbers(column, "label").astype("float32", copy=False)
    if format_.labels == "classes":
        for wrong in labels[(labels != labels.round()) | (labels < 0) | (labels >= outputs)]:
            raise InvalidRowsError(
                f"label {wrong:g} is not one of the classes 0 to {outputs - 1}, for which the "
                "network has outputs."
            )
        return labels
    smallest, largest = _RANGES[format_.labels]
    for wrong in labels[(labels < smallest) | (labels > largest)]:
        raise InvalidRowsError(
            f"label {wrong:g} is not between {smallest} and {largest}, as the loss requires."
        )
    return labels.reshape(-1, outputs)  # with (rows,), a loss would make a matrix of (rows, 1)


def _matrix(column: pyarrow.Array, name: str, width: int, what: str) -> np.ndarray:
    """Return a column of lists as a matrix; raise if a list doesn't have this length."""
    lengths = pyarrow.compute.list_value_length(column).unique().drop_null().to_pylist()
    if set(lengths) - {width}:
        found = " or ".join(map(str, sorted(lengths)))
        raise InvalidRowsError(
            f"the column {name!r} has {found} entries per row, but the network has {width} {what}."
        )
    return _numbers(column, name).reshape(-1, width)


def _numbers(column: pyarrow.Array, name: str) -> np.ndarray:
    """Return the numbers in a column, or in its lists; raise if one is null or not finite."""
    nulls = column.null_count
    if pyarrow.types.is_list(column.type):
        column = column.flatten()
        nulls += column.null_count
    if nulls:
        raise InvalidRowsError(f"{name} has {nulls} nulls: leave these rows out.")
    values = column.to_numpy(zero_copy_only=False)
    if not np.isfinite(values).all():
        raise InvalidRowsError(f"{name} has values that are not finite: leave these rows out.")
    return values


class Replica:
    """A network in training, made from its bytes and Keras' serialized optimizer and loss."""

    def __init__(self, model: bytes, optimizer: Any, loss: Any) -> None:
        import keras

        self.model = model_from_bytes(model)
        # A copy, because Keras takes some configs apart.
        optimizer = keras.optimizers.deserialize(copy.deepcopy(optimizer))
        loss = keras.losses.deserialize(loss)
        metrics = [_accuracy(loss, self.model.output_shape[-1])]
        self.model.compile(optimizer, loss, metrics=metrics, auto_scale_loss=False)
        self.model.optimizer.build(self.model.trainable_variables)
        self._variables = [*self.model.weights, *self.model.optimizer.variables]

    def train(self, rows: Rows, batch_size: int, key: Sequence[int]) -> np.ndarray:
        """Train on the rows once; return the totals, measured while the weights change.

        All randomness is derived from `key`: the order of the rows, and random layers.
        """
        random = np.random.default_rng(key)
        for variable in self.model.non_trainable_variables:
            if variable.name == "seed_generator_state":  # by default different in each process
                variable.assign(random.integers(0, 2**31, variable.shape))
        order = random.permutation(len(rows.labels))
        return self._totals(self.model.train_on_batch, rows, order, batch_size)

    def measure(self, rows: Rows) -> np.ndarray:
        """Return the totals with the current weights."""
        return self._totals(self.model.test_on_batch, rows, np.arange(len(rows.labels)), 4_096)

    @property
    def state(self) -> list[np.ndarray]:
        """The weights, then the optimizer's state."""
        return [variable.numpy() for variable in self._variables]

    @state.setter
    def state(self, values: Iterable[np.ndarray]) -> None:
        for variable, value in zip(self._variables, values, strict=True):
            variable.assign(value)

    def _totals(self, step: Callable, rows: Rows, order: np.ndarray, size: int) -> np.ndarray:
        """Return the number of rows, and the sums of loss and accuracy over them."""
        import tensorflow

        totals = np.zeros(3)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            try:
                means = step(rows.features[chosen], rows.labels[chosen], return_dict=True)
            except tensorflow.errors.InvalidArgumentError as error:
                *_, reason = error.message.partition("[[{{node")[0].strip().splitlines()
                raise InvalidRowsError(
                    f"the network fails on a row ({reason}): leave such rows out."
                ) from None
            totals += len(chosen) * np.array([1, means["loss"], means["accuracy"]])
        return totals


def _accuracy(loss: Any, outputs: int) -> Any:
    """Return the metric that counts how often the likelier class is the right one.

    With one output, Keras decides at 0.5, and compares with 0 and 1.
    """
    import keras

    labels = labels_of(loss)
    is_logit = getattr(loss, "get_config", dict)().get("from_logits")
    if outputs > 1 or not (is_logit or labels == "signs"):
        return "accuracy"

    def accuracy(expected: Any, found: Any) -> Any:
        is_right = (expected > (0.0 if labels == "signs" else 0.5)) == (found > 0.0)
        return keras.ops.cast(is_right, "float32")

    return accuracy


class Round(NamedTuple):
    """The driver's broadcast to all workers for a round."""

    training: str  # a unique name of the training
    recipe: Recipe
    format: Format
    batch_size: int
    state: Sequence[np.ndarray] = ()  # the state from which the workers start
    key: tuple[int, ...] | None = None  # the source of all randomness; None: evaluate only


def round_task(sent: Broadcast[Round]) -> Callable[[Batches], Batches]:
    """Return the function that Spark runs on each worker's rows; it yields at most one row.

    Invalid rows are reported in the result, because Spark would retry a failed task.
    """

    def run(batches: Batches) -> Batches:
        worker = TaskContext.get().partitionId()
        result = {"worker": worker, "totals": [0.0, 0.0, 0.0], "state": b"", "refused": ""}
        try:
            rows = read_rows(batches, sent.value.format)
            found = _result_of(sent.value, worker, rows) if len(rows.labels) else {}
        except InvalidRowsError as error:
            found = {"refused": str(error)}
            for _ in batches:  # Spark ends a Python process that leaves rows unread
                pass
        if found:
            yield pyarrow.RecordBatch.from_pylist([result | found])

    return run


def _result_of(round_: Round, worker: int, rows: Rows) -> dict[str, Any]:
    """Train or evaluate on a worker's rows, and return the result."""
    replica = kept_network(round_.training, lambda: Replica(*round_.recipe))
    replica.state = round_.state
    if round_.key is None:
        return {"totals": replica.measure(rows)}
    totals = replica.train(rows, round_.batch_size, [*round_.key, worker])
    return {"totals": totals, "state": pickle.dumps(replica.state)}
