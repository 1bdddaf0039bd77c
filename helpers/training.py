"""Training of a Keras network on a Spark DataFrame, by one process or by several in step.

Both trainers have the call forms of Distributed Keras: made with a network and what training needs,
and `train(df)` returns a trained copy of the network. `SingleTrainer` is Keras' own `fit`, on the
driver. `SynchronousTrainer` has Spark start one barrier task a worker and hand each its rows;
TensorFlow's `MultiWorkerMirroredStrategy` adds up the workers' gradients, and every worker makes
the same update. An update takes `batch_size` rows, however many workers share them, so the number
of workers changes how long the training takes, and not what it does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import queue
import secrets
import socketserver
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy
from pyspark import InheritableThread
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DataType, NumericType

from helpers.model import model_from_bytes, model_to_bytes
from helpers.records import vector_entries
from helpers.streaming.errors import summary
from helpers.training_task import (
    CONNECT_SECONDS,
    InvalidRowsError,
    Rows,
    split_rows,
    worker_function,
)

# How long a worker may say nothing. It speaks every few seconds; at first it imports TensorFlow.
SILENT_SECONDS = 120

# How long to wait for slots: a cluster may be about to replace an executor.
SLOTS_SECONDS = 30

# When a worker dies, the others fail, too, a moment earlier or later.
REASONS_SECONDS = 5

# How long Spark may take to end tasks: it gives each two seconds, and then ends its process.
CANCEL_SECONDS = 60

# The reductions of a Keras loss that an update which workers share comes to.
_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")

# One of these is in a worker's last report.
_LAST_WORDS = frozenset({"done", "failed", "invalid"})

_RESULT = "rank int, digest string, model binary"


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
        What makes updates of gradients, as Keras names it.
    loss : str or keras.losses.Loss
        What is made small, as Keras names it: its mean over the rows of an update.
    features_col : str
        A column of vectors, or of arrays of numbers, as many as the network has inputs.
    label_col : str
        What the network is to answer: a vector of one entry a class (for
        ``categorical_crossentropy``), or the number of a class (for
        ``sparse_categorical_crossentropy``). With one output: a number.
    batch_size : int
        Rows an update, of all workers together. (In Distributed Keras: of each worker.)
    num_epoch : int
        How often training goes through all rows.
    seed : int
        Seed of the order of rows, which is another one each epoch. The same seed, network and
        rows (for several workers: in the same partitions) give the same training but for rounding:
        the AUC differed by less than 0.005.

    Raises
    ------
    ValueError
        If an option is none that training can work with.
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
        _check_positive("batch_size", batch_size)
        _check_positive("num_epoch", num_epoch)
        _check_network(keras_model)
        self._model = keras_model
        # Copies: what an optimizer and a loss have learnt or counted stays with this training.
        self._optimizer = keras.optimizers.serialize(_checked_optimizer(worker_optimizer))
        self._loss = keras.losses.serialize(_checked_loss(loss))
        self._features_col, self._label_col = features_col, label_col
        self._batch_size, self._num_epoch, self._seed = batch_size, num_epoch, seed
        self._history: list[dict[str, float]] = []
        self._seconds = 0.0

    def train(self, df: DataFrame, validation: DataFrame | None = None) -> keras.Model:
        """Return a trained copy of the network; prints a line an epoch.

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
        began = time.monotonic()
        self._history = []
        rows = self._rows(df, validation)
        loss = keras.losses.deserialize(self._loss)
        _check_labels(self._label_col, rows.schema["label"].dataType, _name(loss))
        model = self._train(rows)
        self._seconds = time.monotonic() - began
        return model

    def get_training_time(self) -> float:
        """Return how long the last training took, in seconds, the start of workers included."""
        return self._seconds

    def get_history(self) -> list[dict[str, float]]:
        """Return what each epoch of the last training had: a dictionary an epoch.

        ``epoch`` (from 1), ``loss`` and ``accuracy``, both means over the rows while the epoch
        trained on them, ``validation_loss`` and ``validation_accuracy`` if there were rows for it,
        and ``seconds``.
        """
        return list(self._history)

    @abstractmethod
    def _train(self, rows: DataFrame) -> keras.Model:
        """Return the trained network; the rows have `features`, `label` and `validates`."""

    def _rows(self, df: DataFrame, validation: DataFrame | None) -> DataFrame:
        """Return the rows of both DataFrames as arrays of numbers."""
        rows = self._arrays(df).withColumn("validates", F.lit(False))
        if validation is None:
            return rows
        return rows.unionByName(self._arrays(validation).withColumn("validates", F.lit(True)))

    def _arrays(self, df: DataFrame) -> DataFrame:
        return df.select(
            _entries(df, self._features_col).alias("features"),
            _entries(df, self._label_col).alias("label"),
        )

    def _epoch_done(self, epoch: Mapping[str, float]) -> None:
        """Note what an epoch had, and print it."""
        self._history.append(dict(epoch))
        if not math.isfinite(epoch["loss"]):
            raise TrainingError(
                f"the loss is {epoch['loss']} after epoch {epoch['epoch']}: scale the features, or "
                "lower the optimizer's learning rate."
            )
        text = f"epoch {epoch['epoch']}/{self._num_epoch}"
        for name in ("loss", "accuracy", "validation_loss", "validation_accuracy"):
            if name in epoch:
                text += f"  {name.replace('_', ' ')} {epoch[name]:.4f}"
        print(f"{text}  {epoch['seconds']:.1f} s", flush=True)


class SingleTrainer(Trainer):
    """Trains with Keras' `fit` on the driver, on all its cores; the rows must fit in its memory.

    Examples
    --------
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax")])
    >>> trainer = SingleTrainer(keras_model=model, label_col="class",
    ...                         loss="sparse_categorical_crossentropy", num_epoch=2)
    >>> df = spark.createDataFrame([([1.0, 0.0], 0), ([0.0, 1.0], 1)], "features array<float>, class int")
    >>> trained = trainer.train(df)
    epoch 1/2  loss ...  accuracy ...
    epoch 2/2  loss ...  accuracy ...
    >>> len(trainer.get_history())
    2
    """  # noqa: E501

    def _train(self, rows: DataFrame) -> keras.Model:
        training, validation = split_rows(rows.toArrow(), *_widths(self._model))
        if not len(training.labels):
            raise InvalidRowsError("there are no rows to train on.")
        model = model_from_bytes(model_to_bytes(self._model))
        model.compile(
            optimizer=keras.optimizers.deserialize(self._optimizer),
            loss=keras.losses.deserialize(self._loss),
            metrics=["accuracy"],
        )
        model.fit(
            _Batches(training, self._batch_size, self._seed),
            validation_data=tuple(validation) if len(validation.labels) else None,
            epochs=self._num_epoch,
            callbacks=[_EpochCallback(self._epoch_done)],
            shuffle=False,  # _Batches does
            verbose=0,
        )
        # A copy is without what only training needs, such as the optimizer's numbers.
        trained = model_from_bytes(model_to_bytes(self._model))
        trained.set_weights(model.get_weights())
        return trained


class SynchronousTrainer(Trainer):
    """Trains with several workers, each a Spark barrier task, which make every update together.

    Parameters
    ----------
    keras_model, worker_optimizer, loss, features_col, label_col, batch_size, num_epoch, seed
        As in `Trainer`.
    num_workers : int
        How many; each takes one of Spark's slots until the training ends, and a part of the rows,
        which it must be able to hold in memory.

    Raises
    ------
    ValueError
        From `train`, if Spark has fewer slots than `num_workers`, or starts executors when it likes
        (``spark.dynamicAllocation.enabled``).
    TrainingError
        From `train`, if a worker fails, dies, or, once it has begun, says nothing for 120 s; or if
        the workers' weights aren't identical at the end.

    Notes
    -----
    The workers report to the driver at ``spark.driver.host``, at a port that is free. Where only
    some are open, ``spark.helpers.training.port`` names one. Among each other they use free ports.

    References
    ----------
    J. Chen et al., "Revisiting distributed synchronous SGD", 2016, https://arxiv.org/abs/1604.00981
    """

    def __init__(
        self,
        keras_model: keras.Model,
        worker_optimizer: str | keras.optimizers.Optimizer = "adam",
        loss: str | keras.losses.Loss = "categorical_crossentropy",
        *,
        num_workers: int = 2,
        features_col: str = "features",
        label_col: str = "label",
        batch_size: int = 32,
        num_epoch: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(
            keras_model, worker_optimizer, loss, features_col=features_col, label_col=label_col,
            batch_size=batch_size, num_epoch=num_epoch, seed=seed,
        )  # fmt: skip
        _check_positive("num_workers", num_workers)
        self._num_workers = num_workers

    def _train(self, rows: DataFrame) -> keras.Model:
        self._check_slots(rows.sparkSession)
        with _Reports(rows.sparkSession) as reports:
            results = self._run(rows, reports)
        if not results:  # of a table that is known to be empty Spark makes no partitions
            raise InvalidRowsError("there are no rows to train on.")
        if len(results) != self._num_workers:
            raise TrainingError(
                f"Spark has run {len(results)} workers, not {self._num_workers}: don't use what "
                "they have trained."
            )
        if len({result.digest for result in results}) != 1:
            raise TrainingError("the workers' weights differ after training: don't use them.")
        (model,) = (result.model for result in results if result.model is not None)
        return model_from_bytes(bytes(model))

    def _check_slots(self, spark: SparkSession) -> None:
        """Refuse what Spark could never start; it would try for ten minutes before it says so."""
        if spark.conf.get("spark.dynamicAllocation.enabled", "false") == "true":
            raise ValueError(
                "workers in step need executors that are there: make the Spark session with "
                "spark.dynamicAllocation.enabled=false and as many executors as you need."
            )
        local = spark.sparkContext.master.startswith("local[")
        deadline = time.monotonic() + (0 if local else SLOTS_SECONDS)
        while (slots := _slots(spark)) < self._num_workers:
            if time.monotonic() >= deadline:
                raise ValueError(
                    f"num_workers is {self._num_workers}, but Spark runs {slots} tasks at a time: "
                    "give it more cores or executors, or take fewer workers."
                )
            time.sleep(0.2)

    def _run(self, rows: DataFrame, reports: _Reports) -> list[Row]:
        """Have Spark run the workers, and print what they report; return their results."""
        spark = rows.sparkSession
        model = spark.sparkContext.broadcast(model_to_bytes(self._model))
        plan = self._plan(rows)
        work = worker_function(plan, model, reports.address, reports.token)
        # One partition a worker, of about as many rows as the others'.
        parts = rows.repartition(self._num_workers)
        job = _Job(parts.mapInArrow(work, _RESULT, barrier=True))
        try:
            while job.is_running() or not reports.are_read():
                self._take(reports, job)
            return job.result()
        finally:
            job.cancel()
            model.destroy()

    def _plan(self, rows: DataFrame) -> dict[str, Any]:
        """Return what all workers are told."""
        inputs, outputs = _widths(self._model)
        return {
            "batch_size": self._batch_size,
            "num_epoch": self._num_epoch,
            "seed": self._seed,
            "optimizer": self._optimizer,
            "loss": self._loss,
            "inputs": inputs,
            "outputs": outputs,
            "label_is_list": isinstance(rows.schema["label"].dataType, ArrayType),
            "threads": int(rows.sparkSession.conf.get("spark.task.cpus", "1")),
        }

    def _take(self, reports: _Reports, job: _Job) -> None:
        """Take the next report; raise if it is bad news, or is missing for too long."""
        began = time.monotonic()
        while (report := reports.next()) is None:
            if not job.is_running() or reports.have_come(self._num_workers):
                return
            if reports.first_came is None and job.has_active_tasks():  # which compute their rows
                return
            if time.monotonic() > (reports.first_came or began) + SILENT_SECONDS:
                raise TrainingError(
                    f"the workers have said nothing for {SILENT_SECONDS} s: see whether other jobs "
                    "have Spark's slots, and whether the workers reach each other and the driver."
                )
        if "invalid" in report:
            raise InvalidRowsError(report["invalid"])
        if "failed" in report:
            raise TrainingError(reports.reason(report))
        if "epoch" in report:
            self._epoch_done(report)


def fingerprint(df: DataFrame) -> str:
    """Return what tells one set of rows from another, whatever their order.

    Parameters
    ----------
    df : pyspark.sql.DataFrame
        Rows of numbers, texts or other values that Spark can hash.

    Returns
    -------
    str
        The number of rows, and a digest of their values and of the columns' names.

    Examples
    --------
    >>> df = spark.createDataFrame([(1, "s"), (2, "b")], "EventId int, Label string")
    >>> fingerprint(df) == fingerprint(df.orderBy("Label"))
    True
    >>> fingerprint(df).startswith("2 rows, ")
    True
    """
    names = sorted(df.columns)
    columns = [F.col(f"`{name}`") for name in names]
    # The hash passes over nulls, wherever they are.
    hashes = F.xxhash64(*columns, *[column.isNull() for column in columns]).cast("decimal(20, 0)")
    rows, total = df.select(F.count(F.lit(1)), F.sum(hashes)).first()
    digest = hashlib.sha256(f"{names} {rows} {total}".encode()).hexdigest()
    return f"{rows} rows, {digest[:16]}"


def _slots(spark: SparkSession) -> int:
    """Return how many tasks Spark can run at a time, with the executors that it has now."""
    context = spark.sparkContext._jsc.sc()
    return context.maxNumConcurrentTasks(context.resourceProfileManager().defaultResourceProfile())


class _Job:
    """A Spark job that runs beside the program.

    Parameters
    ----------
    job : pyspark.sql.DataFrame
        What is collected.
    """

    def __init__(self, job: DataFrame) -> None:
        self._job, self._context = job, job.sparkSession.sparkContext
        self._group = f"training-{secrets.token_hex(8)}"
        self._outcome: list[Row] | Exception | None = None
        self._thread = InheritableThread(target=self._collect, name=self._group, daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def has_active_tasks(self) -> bool:
        """Tell whether Spark is at work."""
        tracker = self._context.statusTracker()
        infos = [tracker.getJobInfo(job) for job in tracker.getJobIdsForGroup(self._group)]
        stages = [tracker.getStageInfo(stage) for info in infos if info for stage in info.stageIds]
        return any(stage.numActiveTasks for stage in stages if stage)

    def result(self) -> list[Row]:
        """Return what the job, which has ended, has made; raise `TrainingError` if it failed."""
        if isinstance(self._outcome, Exception):
            raise TrainingError(f"Spark could not train: {summary(str(self._outcome))}") from None
        return self._outcome

    def cancel(self) -> None:
        """End the job, if it runs, and wait for that, for a minute at most."""
        deadline = time.monotonic() + CANCEL_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            # A job that is about to be submitted isn't there yet to be cancelled.
            self._context.cancelJobGroup(self._group)
            self._thread.join(0.5)

    def _collect(self) -> None:
        self._context.setJobGroup(self._group, "training")
        try:
            self._outcome = self._job.collect()
        except Exception as error:  # it is the caller's thread that has to know
            self._outcome = error


class _Reports:
    """Where the workers' reports arrive, for as long as a ``with`` block lasts.

    Parameters
    ----------
    spark : pyspark.sql.SparkSession
        Whose driver listens: where Spark itself does, on a port of its own.

    Raises
    ------
    TrainingError
        If it can't listen there.
    """

    def __init__(self, spark: SparkSession) -> None:
        self.token = secrets.token_hex(16)
        self._ranks: set[int] = set()  # of the workers that have begun
        self.first_came: float | None = None  # when the first one has, by the monotonic clock
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue()
        host = spark.conf.get("spark.driver.host")
        bind = spark.conf.get("spark.driver.bindAddress", host)
        port = int(spark.conf.get("spark.helpers.training.port", "0"))
        try:
            self._server = socketserver.ThreadingTCPServer((bind, port), self._handler())
        except OSError as error:
            raise TrainingError(
                f"the driver can't listen at {bind}:{port} for the workers' reports "
                f"({error.strerror}): set spark.driver.bindAddress to an address of this machine, "
                "and spark.helpers.training.port to a port that is free."
            ) from error
        self._server.daemon_threads = True
        self.address = (host, self._server.server_address[1])

    def __enter__(self) -> _Reports:
        threading.Thread(target=self._server.serve_forever, name="training-reports").start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def next(self, seconds: float = 0.2) -> dict[str, Any] | None:
        """Return the next report, or None if there is none for a while."""
        with contextlib.suppress(queue.Empty):
            return self._queue.get(timeout=seconds)
        return None

    def have_come(self, workers: int) -> bool:
        """Tell whether so many workers have begun; each has a time limit of its own then."""
        return len(self._ranks) == workers

    def _met(self, rank: int) -> None:
        self.first_came = self.first_came or time.monotonic()
        self._ranks.add(rank)

    def are_read(self) -> bool:
        return self._queue.empty()

    def reason(self, report: dict[str, Any]) -> str:
        """Return why training failed, given the first that said so.

        When a worker dies, the others fail because of that; which of them says so first is chance.
        """
        deadline = time.monotonic() + REASONS_SECONDS
        while not report.get("died") and time.monotonic() < deadline:
            other = self.next() or {}
            report = other if other.get("died") else report
        return report["failed"]

    def _handler(self) -> type[socketserver.StreamRequestHandler]:
        put, met, token = self._queue.put, self._met, self.token

        class Handler(socketserver.StreamRequestHandler):
            """Reads the reports of one worker, a line each, and tells if they break off."""

            timeout = CONNECT_SECONDS

            def handle(self) -> None:
                hello = self._next_report("somebody")
                if not secrets.compare_digest(str(hello.get("token")), token):
                    return
                met(hello["rank"])
                self.connection.settimeout(SILENT_SECONDS)
                report: dict[str, Any] = {}
                while not report.keys() & _LAST_WORDS:
                    put(report)
                    report = self._next_report(f"worker {hello['rank']}")
                put(report)

            def _next_report(self, who: str) -> dict[str, Any]:
                """Return what a worker says next, or that it won't say anything any more."""
                reason = "its Spark task has died."
                try:
                    return dict(json.loads(self.rfile.readline()))
                except TimeoutError:
                    reason = (
                        f"it has said nothing for {SILENT_SECONDS} s: see whether the workers "
                        "reach each other."
                    )
                except (OSError, ValueError, TypeError):  # broken off, perhaps in a line's middle
                    pass
                return {"failed": f"{who}: {reason}", "died": True}

        return Handler


class _Batches(keras.utils.PyDataset):
    """Rows in batches, in another order each epoch, for `fit`."""

    def __init__(self, rows: Rows, batch_size: int, seed: int) -> None:
        super().__init__()
        self._rows, self._batch_size = rows, batch_size
        self._random = numpy.random.default_rng(seed)
        self.on_epoch_end()

    def __len__(self) -> int:
        return math.ceil(len(self._rows.labels) / self._batch_size)

    def __getitem__(self, number: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        chosen = self._order[number * self._batch_size : (number + 1) * self._batch_size]
        return tuple(part[chosen] for part in self._rows)

    def on_epoch_end(self) -> None:
        """Draw a new order; Keras calls this."""
        self._order = self._random.permutation(len(self._rows.labels))


class _EpochCallback(keras.callbacks.Callback):
    """Reports each epoch of `fit`, with the names that the trainers use."""

    def __init__(self, report: Callable[[Mapping[str, float]], None]) -> None:
        super().__init__()
        self._report = report

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        """Note the time; Keras calls this."""
        self._began = time.monotonic()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        """Report; Keras calls this."""
        means = {name.replace("val_", "validation_"): value for name, value in logs.items()}
        self._report({"epoch": epoch + 1, **means, "seconds": time.monotonic() - self._began})


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
    """Return the numbers of a network's inputs and outputs."""
    return model.input_shape[-1], model.output_shape[-1]


def _check_network(model: keras.Model) -> None:
    """Raise `ValueError` unless a network takes rows of numbers and returns such."""
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


def _checked_optimizer(optimizer: str | keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return an optimizer as Keras has it; raise `ValueError` if there is none."""
    if optimizer is None:
        raise ValueError("worker_optimizer is None: name one, such as 'adam'.")
    return keras.optimizers.get(optimizer)


def _name(loss: Any) -> str:
    """Return the name that Keras has for a loss, be it an object or a function."""
    return getattr(loss, "name", None) or getattr(loss, "__name__", "")


def _check_labels(name: str, found: DataType, loss: str) -> None:
    """Raise `ValueError` if a loss of classes is for labels of the other kind."""
    kinds = {
        "categorical_crossentropy": (ArrayType, "an entry a class"),
        "sparse_categorical_crossentropy": (NumericType, "the number of the class"),
    }
    if loss in kinds and not isinstance(found, kinds[loss][0]):
        (other,) = kinds.keys() - {loss}
        raise ValueError(
            f"the loss {loss!r} takes {kinds[loss][1]}, which column {name!r} doesn't hold: use "
            f"loss={other!r}."
        )


def _checked_loss(loss: str | keras.losses.Loss) -> Any:
    """Return a loss as Keras has it; raise `ValueError` if it isn't a mean over rows."""
    found = keras.losses.get(loss)
    reduction = getattr(found, "reduction", _MEANS[0])
    if reduction not in _MEANS:
        raise ValueError(
            f"the loss has the reduction {reduction!r}: an update takes the mean over its rows, "
            f"which is {_MEANS[0]!r}."
        )
    return found


def _check_positive(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} is {number}: it must be at least 1.")
