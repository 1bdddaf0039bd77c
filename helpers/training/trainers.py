"""Training of a Keras network on a Spark DataFrame, by one process or by several workers.

Both trainers have the call forms of Distributed Keras: made with a network and what training needs,
and `train(df)` returns a trained copy of the network. `SingleTrainer` trains on the driver.
`AveragingTrainer` trains in rounds of ordinary Spark jobs: each task trains the network on its part
of the rows, and the driver averages the weights, from which the next round starts.
"""

from __future__ import annotations

import math
import pickle
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter
from typing import Any

import keras
import numpy as np
import pyarrow
import pyarrow.compute
from py4j.protocol import Py4JJavaError
from pyspark import StorageLevel, inheritable_thread_target
from pyspark.errors import PySparkException
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DataType, NumericType

from helpers.model import model_from_bytes, model_to_bytes
from helpers.records import vector_entries
from helpers.spark import root_cause
from helpers.streaming import summary
from helpers.training.task import RESULT, InvalidRowsError, Replica, Round, read_rows, round_task

# The reductions of a Keras loss that are a mean over the rows of an update.
_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")

_Pass = Callable[..., np.ndarray]  # through rows; returns a replica's totals

_NO_ROWS = "there are no rows to train on."
_REMEDY = "scale the features, or lower the optimizer's learning rate."


class TrainingError(RuntimeError):
    """Training has failed; the message says why and what helps."""


class Trainer(ABC):
    """What trainers have in common.

    Parameters
    ----------
    keras_model : keras.Model
        The network, with inputs of shape (rows, features) and outputs of shape (rows, classes); it
        stays as it is.
    worker_optimizer : str or keras.optimizers.Optimizer
        Makes updates of gradients, as Keras names it.
    loss : str or keras.losses.Loss
        What is minimised, as Keras names it: its mean over the rows of an update.
    features_col : str
        A column of vectors or of arrays of numbers, as many as the network has inputs.
    label_col : str
        The right answers: vectors with one entry per class (for ``categorical_crossentropy``), or
        the number of the class (for ``sparse_categorical_crossentropy``). With one output: numbers.
    batch_size : int
        Rows of an update.
    num_epoch : int
        How often training goes through all rows.
    seed : int
        Seed of everything random: the order of the rows in each epoch, and what layers draw.
    """

    def __init__(
        self,
        keras_model: keras.Model,
        worker_optimizer: str | keras.optimizers.Optimizer = "adam",
        loss: str | keras.losses.Loss = "categorical_crossentropy",
        *,
        features_col: str = "features",
        label_col: str = "label",
        batch_size: int = 32,
        num_epoch: int = 1,
        seed: int = 0,
    ) -> None:
        _check_positive(batch_size=batch_size, num_epoch=num_epoch)
        if worker_optimizer is None:
            raise ValueError("worker_optimizer is None: name one, such as 'adam'.")
        loss = keras.losses.get(loss)
        _check_loss(loss)
        self._model, self._widths = keras_model, _widths(keras_model)
        # Copies: what an optimizer and a loss have learnt or counted stays with this training.
        self._optimizer = keras.optimizers.serialize(keras.optimizers.get(worker_optimizer))
        self._loss = keras.losses.serialize(loss)
        self._features_col, self._label_col = features_col, label_col
        self._batch_size, self._num_epoch, self._seed = batch_size, num_epoch, seed
        self._history: list[dict[str, float]] = []
        self._seconds = 0.0

    def train(self, df: DataFrame, validation: DataFrame | None = None) -> keras.Model:
        """Return a trained copy of the network; print a line after each epoch.

        Parameters
        ----------
        df : pyspark.sql.DataFrame
            The rows to train on; all are used, in each epoch.
        validation : pyspark.sql.DataFrame, optional
            Rows to measure loss and accuracy on after each epoch.

        Raises
        ------
        ValueError
            If a column is missing or doesn't fit the network, or a number in it is not finite.
        TrainingError
            If training fails.
        """
        began, self._history = time.monotonic(), []
        rows = self._rows(df).withColumn("validates", F.lit(False))
        if validation is not None:
            rows = rows.unionByName(self._rows(validation).withColumn("validates", F.lit(True)))
        loss = keras.losses.deserialize(self._loss)
        _check_labels(self._label_col, rows.schema["label"].dataType, loss)
        model = self._train(rows)
        self._seconds = time.monotonic() - began
        return model

    def get_training_time(self) -> float:
        """Return how long the last training took, in seconds, all of Spark's work included."""
        return self._seconds

    def get_history(self) -> list[dict[str, float]]:
        """Return a dictionary for each epoch of the last training.

        ``epoch`` (from 1), ``loss`` and ``accuracy``, both means over the rows while the epoch
        trained on them, ``validation_loss`` and ``validation_accuracy`` if there were rows for it,
        and ``seconds``.
        """
        return list(self._history)

    @abstractmethod
    def _train(self, rows: DataFrame) -> keras.Model:
        """Return the trained network; the rows have `features`, `label` and `validates`."""

    def _rows(self, df: DataFrame) -> DataFrame:
        if not isinstance(df, DataFrame):
            raise ValueError(
                f"{df!r} is not a DataFrame. If it is Distributed Keras' `shuffle`, leave it out: "
                "rows are shuffled in each epoch."
            )
        features, label = _entries(df, self._features_col), _entries(df, self._label_col)
        return df.select(features.alias("features"), label.alias("label"))

    def _recipe(self) -> tuple[bytes, Any, Any]:
        return model_to_bytes(self._model), self._optimizer, self._loss

    def _epochs(self, replica: Replica, train: _Pass, measure: _Pass) -> keras.Model:
        """Train a replica, and return the network that it becomes.

        `train` goes through all rows once, in a given epoch, and `measure` through those to
        validate with; both return a replica's totals.
        """
        for epoch in range(1, self._num_epoch + 1):
            began, found = time.monotonic(), {"epoch": epoch}
            for prefix, totals in (("", train(epoch)), ("validation_", measure())):
                rows, loss, accuracy = map(float, totals)
                if rows:
                    found |= {f"{prefix}loss": loss / rows, f"{prefix}accuracy": accuracy / rows}
            means = "  ".join(f"{k.replace('_', ' ')} {found[k]:.4f}" for k in [*found][1:])
            found["seconds"] = time.monotonic() - began
            self._history.append(found)
            if not math.isfinite(found["loss"]):
                raise TrainingError(f"the loss is {found['loss']} in epoch {epoch}: {_REMEDY}")
            print(f"epoch {epoch}/{self._num_epoch}  {means}  {found['seconds']:.1f} s", flush=True)
        # An optimizer may have averaged the weights over its updates; the average replaces them.
        replica.model.optimizer.finalize_variable_values(replica.model.trainable_variables)
        weights = replica.model.get_weights()
        if not all(np.isfinite(weight).all() for weight in weights):
            raise TrainingError(f"the weights are not finite after the last epoch: {_REMEDY}")
        trained = model_from_bytes(model_to_bytes(self._model))  # without the optimizer
        trained.set_weights(weights)
        return trained


class SingleTrainer(Trainer):
    """Trains on the driver, on all its cores; the rows must fit in its memory.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax")])
    >>> trainer = SingleTrainer(keras_model=model, label_col="class",
    ...                         loss="sparse_categorical_crossentropy")
    >>> df = spark.createDataFrame([([1.0, 0.0], 0), ([0.0, 1.0], 1)], "features array<float>, class int")
    >>> trained = trainer.train(df)
    epoch 1/1  loss ...  accuracy ...
    """  # noqa: E501

    def _train(self, rows: DataFrame) -> keras.Model:
        table = _interruptible(rows.sparkSession, lambda: _collect(_in_order(rows, 1)))
        validates = pyarrow.compute.field("validates")
        training, validation = (
            read_rows(table.filter(chosen).to_batches(), *self._widths)
            for chosen in (~validates, validates)
        )
        if not len(training.labels):
            raise InvalidRowsError(_NO_ROWS)
        replica = Replica(*self._recipe())
        return self._epochs(
            replica,
            lambda epoch: replica.train(training, self._batch_size, [self._seed, epoch]),
            lambda: replica.measure(validation),
        )


class AveragingTrainer(Trainer):
    """Trains in rounds: each worker on its part of the rows; then their weights are averaged.

    Parameters
    ----------
    keras_model, worker_optimizer, loss
        As in `Trainer`.
    num_workers : int
        The number of parts that the rows are cut into, and of the tasks of a round. Where Spark
        has fewer slots, tasks wait for each other.
    communication_window : int, optional
        The length of a round: how many updates a worker makes from one average to the next, at
        most. An epoch is cut into rounds of equal length. By default a round is an epoch.
    **options
        As in `Trainer`. Of the `batch_size` rows of an update each worker takes its share, so an
        epoch has as many updates as with one worker. (In Distributed Keras each takes as many.)

    Notes
    -----
    The optimizer's state is averaged with the weights. Started again in each round it is as good in
    rounds of an epoch and worse in shorter ones: on 6,000 events of ATLAS, five splits, mean AUC of
    2 workers 0.866 (again: 0.867), in three rounds per epoch 0.867 (0.863), of 8 workers 0.861
    (0.859). The same seed and rows give the same weights, to the last bit, however Spark has cut
    the rows or repeats tasks, as long as the processors are of one kind.

    References
    ----------
    S. U. Stich, "Local SGD converges fast and communicates little", ICLR 2019,
    https://arxiv.org/abs/1805.09767

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax")])
    >>> trainer = AveragingTrainer(keras_model=model, num_workers=2, label_col="class",
    ...                            loss="sparse_categorical_crossentropy")
    >>> df = spark.createDataFrame([([1.0, 0.0], 0), ([0.0, 1.0], 1)], "features array<float>, class int")
    >>> trained = trainer.train(df)
    epoch 1/1  loss ...  accuracy ...
    """  # noqa: E501

    def __init__(
        self,
        keras_model: keras.Model,
        worker_optimizer: str | keras.optimizers.Optimizer = "adam",
        loss: str | keras.losses.Loss = "categorical_crossentropy",
        *,
        num_workers: int = 2,
        communication_window: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(keras_model, worker_optimizer, loss, **options)
        _check_positive(num_workers=num_workers, communication_window=communication_window)
        self._num_workers, self._window = num_workers, communication_window

    def _train(self, rows: DataFrame) -> keras.Model:
        # On disk, so that no round computes the rows again or takes memory from other jobs.
        parts = _in_order(rows, self._num_workers).persist(StorageLevel.DISK_ONLY)
        try:
            return _interruptible(rows.sparkSession, lambda: self._train_on(parts))
        finally:
            parts.unpersist(blocking=True)

    def _train_on(self, parts: DataFrame) -> keras.Model:
        workers = parts.where("NOT validates").groupBy(F.spark_partition_id()).count()
        most_rows = _collect(workers.agg(F.max("count")))[0][0].as_py()
        if not most_rows:
            raise InvalidRowsError(_NO_ROWS)
        batch_size = max(1, self._batch_size // self._num_workers)
        rounds = math.ceil(math.ceil(most_rows / batch_size) / (self._window or math.inf)) or 1
        common = Round(secrets.token_hex(8), self._recipe(), self._widths, batch_size)
        replica = Replica(*common.recipe)

        def train(epoch: int) -> np.ndarray:
            totals = np.zeros(3)
            order = np.random.default_rng([self._seed, epoch]).permutation(rounds)
            for number in order.tolist():
                rows = parts.where("NOT validates").where(_is_in_round(number, rounds))
                key = (self._seed, epoch, number)
                passed, results = _run(common._replace(state=replica.state, key=key), rows)
                if results:  # a short round of few rows may have none
                    replica.state = _average(results)
                totals += passed
            return totals

        def measure() -> np.ndarray:
            return _run(common._replace(state=replica.state), parts.where("validates"))[0]

        return self._epochs(replica, train, measure)


def _run(round_: Round, rows: DataFrame) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the totals, and the results of the workers that have rows, in the workers' order."""
    sent = rows.sparkSession.sparkContext.broadcast(round_)
    try:
        results = _collect(rows.mapInArrow(round_task(sent), RESULT)).to_pylist()
    finally:
        sent.destroy()
    results.sort(key=itemgetter("worker"))
    for refused in filter(None, map(itemgetter("refused"), results)):
        raise InvalidRowsError(refused)
    return np.sum([[0.0] * 3, *map(itemgetter("totals"), results)], axis=0), results


def _average(results: list[dict[str, Any]]) -> list[np.ndarray]:
    """Return the average of the workers' states, weighted by their rows.

    The sums are in the workers' order and in double precision: the same states have the same
    average, to the last bit. Of what is counted, such as updates, the largest is taken.
    """
    rows = [result["totals"][0] for result in results]
    return [
        np.max(values, axis=0)
        if values[0].dtype.kind in "biu"
        else np.average(np.array(values, "float64"), axis=0, weights=rows)
        for values in zip(*(pickle.loads(result["state"]) for result in results), strict=True)
    ]


def _in_order(rows: DataFrame, parts: int) -> DataFrame:
    """Return rows in so many partitions, cut and sorted by a hash of what is in them.

    So it doesn't matter how Spark had them, and a partition that is computed again is the same.
    """
    keyed = rows.withColumn("key", F.xxhash64("label", "features"))
    return keyed.repartition(parts, "key").sortWithinPartitions("key", "label", "features")


def _is_in_round(number: int, rounds: int) -> Column:
    """Return whether a row's hash is in the range of one of an epoch's rounds.

    Spark reads only blocks with rows in the range, because the rows are sorted by their hash.
    """
    first, end = (2**64 * n // rounds - 2**63 for n in (number, number + 1))
    return F.col("key").between(first, end - 1)


def _collect(df: DataFrame) -> pyarrow.Table:
    try:
        return df.toArrow()
    except Py4JJavaError as error:
        reason = str(root_cause(error).getMessage()).partition("\n")[0]
    except PySparkException as error:
        reason = summary(str(error))
    raise TrainingError(f"Spark could not train: {reason}")


def _interruptible(spark: SparkSession, work: Callable[[], Any]) -> Any:
    """Return what `work` returns; if it is interrupted, its Spark jobs end.

    It runs in another thread, because an interrupt would break into an exchange with Java and
    leave the connection unusable.
    """
    group = f"training-{secrets.token_hex(8)}"

    def run() -> Any:
        spark.sparkContext.setJobGroup(group, "training")
        return work()

    with ThreadPoolExecutor(1, group) as threads:
        future = threads.submit(inheritable_thread_target(spark)(run))
        try:
            return future.result()
        except BaseException:
            spark.sparkContext._jsc.sc().cancelJobGroupAndFutureJobs(group)
            raise


def _entries(df: DataFrame, name: str) -> Column:
    """Return a column of vectors, of arrays or of numbers as one of arrays or numbers."""
    if not isinstance(name, str):
        raise ValueError(
            f"{name!r} is not the name of a column: put several into one with "
            "pyspark.ml.feature.VectorAssembler."
        )
    if name not in df.columns:
        raise ValueError(f"there is no column {name!r}; the columns are {df.columns}.")
    found, column = df.schema[name].dataType, F.col(f"`{name}`")
    if isinstance(found, VectorUDT):
        return vector_entries(column).cast("array<float>")
    if isinstance(found, ArrayType) and isinstance(found.elementType, NumericType):
        return column.cast("array<float>")
    if isinstance(found, NumericType):
        return column.cast("float")
    raise ValueError(f"column {name!r} must hold vectors or numbers, not {found.simpleString()}.")


def _widths(model: keras.Model) -> tuple[int, int]:
    """Return the numbers of a network's inputs and outputs; refuse what doesn't take a table."""
    try:
        shapes = {"inputs": model.input_shape, "outputs": model.output_shape}
    except AttributeError:
        raise ValueError("the network has no inputs yet: let it begin with keras.Input.") from None
    for name, shape in shapes.items():
        if len(shape) != 2 or not all(isinstance(size, int) for size in shape[1:]):
            raise ValueError(
                f"the network's {name} have the shape {shape}: to train on a table they must have "
                f"(rows, {name})."
            )
    return shapes["inputs"][1], shapes["outputs"][1]


def _check_loss(loss: Any) -> None:
    reduction = getattr(loss, "reduction", _MEANS[0])
    if reduction not in _MEANS:
        raise ValueError(
            f"the loss has the reduction {reduction!r}: an update takes the mean over its rows, "
            f"which is {_MEANS[0]!r}."
        )


def _check_labels(name: str, found: DataType, loss: Any) -> None:
    """Refuse labels of the other kind than a loss of classes takes."""
    kinds = {
        "categorical_crossentropy": (ArrayType, "an entry per class"),
        "sparse_categorical_crossentropy": (NumericType, "the number of the class"),
    }
    given = getattr(loss, "name", None) or getattr(loss, "__name__", "")
    if given in kinds and not isinstance(found, kinds[given][0]):
        (other,) = kinds.keys() - {given}
        raise ValueError(
            f"the loss {given!r} takes {kinds[given][1]}, which column {name!r} doesn't hold: use "
            f"loss={other!r}."
        )


def _check_positive(**options: int | None) -> None:
    for name, number in options.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: it must be at least 1.")
