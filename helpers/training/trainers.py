"""The trainers: the driver's part of training."""

from __future__ import annotations

import math
import numbers
import pickle
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.compute
from py4j.protocol import Py4JError
from pyspark import StorageLevel, inheritable_thread_target
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, NumericType

from helpers.model import as_on_worker, missing_code, model_from_bytes, model_to_bytes
from helpers.records import named, vector_entries
from helpers.spark import (
    END_SECONDS,
    JAVA_ERRORS,
    arrow_table,
    how_java_exited,
    java_has_exited,
    summary,
)
from helpers.training.recipe import check_labels, format_of, recipe_of
from helpers.training.task import RESULT, InvalidRowsError, Replica, Round, read_rows, round_task

if TYPE_CHECKING:
    import keras

_Pass = Callable[..., np.ndarray]  # a pass over the rows; returns a replica's totals

_ALWAYS_SHUFFLED = (
    "if it is Distributed Keras' `shuffle`, leave it out; rows are shuffled in each epoch."
)
_NO_ROWS = "there are no rows to train on."
_REMEDY = "scale the features, or lower the optimizer's learning rate."


class TrainingError(RuntimeError):
    """Training failed; the message says why and what to do."""


class Trainer(ABC):
    """The base class of trainers.

    Parameters
    ----------
    keras_model : keras.Model
        The network, with inputs of shape (rows, features) and outputs of shape (rows, classes); it
        is not changed.
    worker_optimizer : str or keras.optimizers.Optimizer
        The optimizer, by Keras' name or as an object.
    loss : str or keras.losses.Loss
        The loss, by Keras' name or as a function or object; its mean over the rows of an update is
        minimised.
    features_col : str
        A column of vectors or of arrays of numbers, with one entry per input of the network.
    label_col : str
        The labels: vectors or arrays with one entry per class (for ``categorical_crossentropy``),
        or the index of the class (for ``sparse_categorical_crossentropy``). With one output:
        numbers.
    batch_size : int
        Number of rows per update.
    num_epoch : int
        Number of passes over all rows.
    seed : int
        Random seed for the order of the rows in each epoch, and for random layers.
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
        import keras  # as in helpers.model, only when it is needed

        _check_positive(batch_size=batch_size, num_epoch=num_epoch)
        if worker_optimizer is None:
            raise ValueError("worker_optimizer is None: name one, such as 'adam'.")
        if not isinstance(seed, numbers.Integral) or seed < 0:
            raise ValueError(f"seed is {seed!r}: it must be a whole number of at least 0.")
        self._loss, self._optimizer = keras.losses.get(loss), keras.optimizers.get(worker_optimizer)
        self._model, self._format = keras_model, format_of(keras_model, self._loss)
        self._features_col, self._label_col = features_col, label_col
        self._batch_size, self._num_epoch, self._seed = batch_size, num_epoch, seed
        self._history: list[dict[str, float]] = []
        self._seconds = 0.0

    def train(
        self, df: DataFrame, validation: DataFrame | None = None, **others: object
    ) -> keras.Model:
        """Return a trained copy of the network; print a line after each epoch.

        Parameters
        ----------
        df : pyspark.sql.DataFrame
            The rows to train on; each epoch uses all of them.
        validation : pyspark.sql.DataFrame, optional
            Rows on which to evaluate loss and accuracy after each epoch.
        **others
            Rejected, such as `shuffle`, which Distributed Keras takes.

        Raises
        ------
        TypeError
            If there are other arguments.
        ValueError
            If a column is missing or doesn't fit network and loss, or a number in it is not finite.
            If workers would get another optimizer or loss, or other frozen weights.
        TrainingError
            If training fails.
        helpers.model.UnservableModelError
            If a saved copy of the network returns other numbers than the network.
        """
        if others:
            raise TypeError(f"train takes no {', '.join(others)}: {_ALWAYS_SHUFFLED}")
        began, self._history = time.monotonic(), []
        rows = self._rows(df).withColumn("validates", F.lit(False))
        if validation is not None:
            rows = rows.unionByName(self._rows(validation).withColumn("validates", F.lit(True)))
        check_labels(self._label_col, rows.schema["label"].dataType, self._format)
        try:
            model = self._train(rows)
        except (Py4JError, ConnectionError):
            if not java_has_exited(END_SECONDS):
                raise
            raise TrainingError(how_java_exited()) from None
        self._seconds = time.monotonic() - began
        return model

    def get_training_time(self) -> float:
        """Return the duration of the last training in seconds, including all of Spark's work."""
        return self._seconds

    def get_history(self) -> list[dict[str, float]]:
        """Return a dictionary per epoch of the last training.

        Its keys are ``epoch`` (from 1), ``loss`` and ``accuracy`` (means over the rows, measured
        during training), ``validation_loss`` and ``validation_accuracy`` if there were validation
        rows, and ``seconds``.
        """
        return list(self._history)

    @abstractmethod
    def _train(self, rows: DataFrame) -> keras.Model:
        """Return the trained network; the rows have `features`, `label` and `validates`."""

    def _rows(self, df: DataFrame) -> DataFrame:
        if not isinstance(df, DataFrame):
            raise ValueError(f"{df!r} is not a DataFrame: {_ALWAYS_SHUFFLED}")
        number = "float" if self._format.dtype == "float32" else "double"
        features = _entries(df, self._features_col, number)
        label = _entries(df, self._label_col, "float")
        return df.select(features.alias("features"), label.alias("label"))

    def _epochs(self, replica: Replica, train: _Pass, measure: _Pass) -> keras.Model:
        """Train a replica, and return the trained network.

        `train` makes a pass over all training rows for a given epoch, and `measure` over the
        validation rows; both return a replica's totals.
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
        # Some optimizers keep a moving average of the weights, which replaces them here.
        replica.model.optimizer.finalize_variable_values(replica.model.trainable_variables)
        weights = replica.model.get_weights()
        if not all(np.isfinite(weight).all() for weight in weights):
            raise TrainingError(f"the weights are not finite after the last epoch: {_REMEDY}")
        trained = model_from_bytes(model_to_bytes(self._model))  # without the optimizer
        trained.set_weights(weights)
        return trained


class SingleTrainer(Trainer):
    """Trains on the driver, on all its cores; the rows must fit in the driver's memory.

    Examples
    --------
    >>> import keras
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
            read_rows(table.filter(chosen).to_batches(), self._format)
            for chosen in (~validates, validates)
        )
        if not len(training.labels):
            raise InvalidRowsError(_NO_ROWS)
        replica = Replica(*recipe_of(self._model, self._optimizer, self._loss))
        return self._epochs(
            replica,
            lambda epoch: replica.train(training, self._batch_size, [self._seed, epoch]),
            lambda: replica.measure(validation),
        )


class AveragingTrainer(Trainer):
    """Trains in rounds: each worker trains on its part of the rows; the weights are averaged.

    Parameters
    ----------
    keras_model, worker_optimizer, loss
        As in `Trainer`.
    num_workers : int
        The number of partitions of the rows, and of tasks in a round. If Spark has fewer slots,
        tasks wait for each other.
    communication_window : int, optional
        The maximum length of a round: the number of updates that a worker makes between averages.
        An epoch is split into rounds of equal length. By default, a round is an epoch.
    **options
        As in `Trainer`. The `batch_size` rows of an update are divided among the workers, so an
        epoch has as many updates as with one worker. (In Distributed Keras each worker takes
        `batch_size` rows.)

    Notes
    -----
    The optimizer's state is averaged like the weights. Beginning with a new one in each round is as
    good if a round is an epoch, and worse for shorter rounds: ``docs/training.md`` has the figures.
    The same seed and rows give the same weights, to the last bit, however Spark partitions the rows
    or retries tasks, as long as the processors are of one kind.

    References
    ----------
    S. U. Stich, "Local SGD converges fast and communicates little", ICLR 2019,
    https://arxiv.org/abs/1805.09767

    Examples
    --------
    >>> import keras
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
        # On disk, so that rounds neither recompute the rows nor take memory from other jobs.
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
        recipe = recipe_of(self._model, self._optimizer, self._loss)
        common = Round(secrets.token_hex(8), recipe, self._format, batch_size)
        try:
            replica = as_on_worker(Replica, *common.recipe)
        except (TypeError, ValueError) as error:  # Keras' errors for what it doesn't know
            raise ValueError(
                f"workers can't make the network, the optimizer or the loss, because "
                f"{missing_code(error)}: build them from parts of Keras."
            ) from None

        def train(epoch: int) -> np.ndarray:
            totals = np.zeros(3)
            order = np.random.default_rng([self._seed, epoch]).permutation(rounds)
            for number in order.tolist():
                rows = parts.where("NOT validates").where(_is_in_round(number, rounds))
                key = (self._seed, epoch, number)
                passed, results = _run(common._replace(state=replica.state, key=key), rows)
                if results:  # a short round may have no rows
                    replica.state = _average(results)
                totals += passed
            return totals

        def measure() -> np.ndarray:
            return _run(common._replace(state=replica.state), parts.where("validates"))[0]

        return self._epochs(replica, train, measure)


def _run(round_: Round, rows: DataFrame) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the totals, and the results of workers that have rows, sorted by worker."""
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

    The sums are computed in the order of workers and in double precision, so that the same states
    have the same average, to the last bit. For counters, such as the number of updates, the maximum
    is taken.
    """
    rows = [result["totals"][0] for result in results]
    return [
        np.max(values, axis=0)
        if values[0].dtype.kind in "biu"
        else np.average(np.array(values, "float64"), axis=0, weights=rows)
        for values in zip(*(pickle.loads(result["state"]) for result in results), strict=True)
    ]


def _in_order(rows: DataFrame, parts: int) -> DataFrame:
    """Return rows in `parts` partitions, partitioned and sorted by a hash of their content.

    The result doesn't depend on how Spark partitioned them, and a recomputed partition is the same.
    Equal rows are numbered, so that they are spread over partitions and rounds like all others.
    """
    equal = Window.partitionBy("validates", "label", "features").orderBy("label")
    content, number = F.xxhash64("label", "features"), F.row_number().over(equal)
    key = F.when(number == 1, content).otherwise(F.xxhash64(content, number))
    keyed = rows.withColumn("key", key)
    return keyed.repartition(parts, "key").sortWithinPartitions("key", "label", "features")


def _is_in_round(number: int, rounds: int) -> Column:
    """Return whether a row's hash is in the range of a round.

    Because the rows are sorted by hash, Spark reads only blocks with rows in the range.
    """
    first, end = (2**64 * n // rounds - 2**63 for n in (number, number + 1))
    return F.col("key").between(first, end - 1)


def _collect(df: DataFrame) -> pyarrow.Table:
    try:
        return arrow_table(df)
    except JAVA_ERRORS as error:
        raise TrainingError(f"Spark could not train: {summary(error)}") from None


def _interruptible(spark: SparkSession, work: Callable[[], Any]) -> Any:
    """Return the result of `work`; if interrupted, cancel its Spark jobs.

    It runs in another thread, because an interrupt in the middle of a call to Java would make the
    connection unusable.
    """
    group = f"training-{secrets.token_hex(8)}"

    def run() -> Any:
        spark.sparkContext.setJobGroup(group, "training")
        return work()

    # Spark 4.0 introduced the form with a session, which also passes on its tags.
    is_old = spark.version.startswith("3.")
    target = inheritable_thread_target(run) if is_old else inheritable_thread_target(spark)(run)
    with ThreadPoolExecutor(1, group) as threads:
        future = threads.submit(target)
        try:
            return future.result()
        except BaseException:
            while not future.done():  # the next job may not have started yet
                spark.sparkContext.cancelJobGroup(group)
                wait([future], timeout=0.2)
            raise


def _entries(df: DataFrame, name: str, number: str) -> Column:
    """Return a column's numbers in a type; vectors become arrays."""
    if not isinstance(name, str):
        raise ValueError(
            f"{name!r} is not the name of a column: put several into one with "
            "pyspark.ml.feature.VectorAssembler."
        )
    if name not in df.columns:
        raise ValueError(f"there is no column {name!r}; the columns are {df.columns}.")
    found, column = df.schema[name].dataType, named(name)
    if isinstance(found, VectorUDT):
        return vector_entries(column).cast(f"array<{number}>")
    if isinstance(found, ArrayType) and isinstance(found.elementType, NumericType):
        return column.cast(f"array<{number}>")
    if isinstance(found, NumericType):
        return column.cast(number)
    raise ValueError(f"column {name!r} must hold vectors or numbers, not {found.simpleString()}.")


def _check_positive(**options: int | None) -> None:
    for name, number in options.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}: it must be at least 1.")
