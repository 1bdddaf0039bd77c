"""What a worker of `helpers.training.SynchronousTrainer` is to Spark: a barrier task.

The task collects its rows, agrees with the other tasks on who listens where, and has a process of
its own train (`helpers.training_process`): TensorFlow's communication must be set up before
TensorFlow does anything else, and one of Spark's Python workers may have predicted with it already.
What the process says, the task hands on to the driver.

Nothing here imports TensorFlow, for which a task would wait ten seconds and have no use.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
import pyarrow.compute
from pyspark import BarrierTaskContext, SparkFiles
from pyspark.broadcast import Broadcast

CONNECT_SECONDS = 10
# What TensorFlow would send the workers' words to each other through, loopback's included.
_PROXIES = ("http_proxy", "https_proxy", "grpc_proxy")

END_SECONDS = 30  # how long a process may take to end when it has said its last
REPORT_SECONDS = 5  # how often a worker says that it lives

# What a task hands to Spark: a digest of its weights, and from one task the network.
RESULT = pyarrow.schema(
    [("rank", pyarrow.int32()), ("digest", pyarrow.string()), ("model", pyarrow.binary())]
)


class Rows(NamedTuple):
    """Rows to train on, or to validate with.

    Attributes
    ----------
    features : numpy.ndarray
        float32, of shape (rows, inputs).
    labels : numpy.ndarray
        float32, of shape (rows, outputs), or (rows,) for labels that are a class's number.
    """

    features: numpy.ndarray
    labels: numpy.ndarray


class InvalidRowsError(ValueError):
    """The rows don't fit the network, or have what isn't a number."""


def split_rows(table: pyarrow.Table, inputs: int, outputs: int) -> tuple[Rows, Rows]:
    """Return the rows to train on, and those to validate with.

    They are put in an order of their own, for Spark promises none: the same rows give the same
    training.

    Parameters
    ----------
    table : pyarrow.Table
        With ``features`` (lists of numbers), ``label`` (numbers or lists of them) and
        ``validates``.
    inputs : int
        How many features a row has to have.
    outputs : int
        How many entries a label has to have; or, if it is a number, how many classes there are. For
        one output a label may be any number.

    Raises
    ------
    InvalidRowsError
        If a row has something else.

    Examples
    --------
    >>> columns = {"features": [[2.0], [1.0]], "label": [1, 0], "validates": [False, False]}
    >>> table = pyarrow.table(columns)
    >>> split_rows(table, inputs=1, outputs=2)[0].features.tolist()
    [[1.0], [2.0]]
    """
    features = _lists(table["features"], "features", inputs, f"the network has {inputs} inputs")
    labels = _labels(table["label"], outputs)
    # Only equal rows can be in any order, and for them it doesn't matter.
    keys = numpy.column_stack([labels, features])
    order = numpy.lexsort(keys.T)
    validates = table["validates"].to_numpy()[order]
    rows = Rows(features[order], labels[order])
    return tuple(Rows(*(part[chosen] for part in rows)) for chosen in (~validates, validates))


def _labels(column: pyarrow.ChunkedArray, outputs: int) -> numpy.ndarray:
    """Return labels in the shape that Keras' losses take with a network of so many outputs."""
    if pyarrow.types.is_list(column.type):
        return _lists(column, "label", outputs, f"the network has {outputs} outputs")
    labels = _numbers(column, "label")
    if outputs == 1:
        return labels.reshape(-1, 1)  # a loss would take (rows,) and (rows, 1) for a table
    known = (labels == labels.round()) & (labels >= 0) & (labels < outputs)
    if not known.all():
        raise InvalidRowsError(
            f"label {labels[~known][0]:g} is none of the classes 0 to {outputs - 1}, for which the "
            "network has outputs."
        )
    return labels


def _lists(column: pyarrow.ChunkedArray, name: str, length: int, reason: str) -> numpy.ndarray:
    """Return a column of lists as a matrix of float32; raise if they don't have this length."""
    _refuse_nulls(column, name)
    lengths = pyarrow.compute.unique(pyarrow.compute.list_value_length(column)).to_pylist()
    if set(lengths) - {length}:
        found = " or ".join(map(str, sorted(lengths)))
        raise InvalidRowsError(f"the column {name!r} has {found} entries a row, but {reason}.")
    return _numbers(pyarrow.compute.list_flatten(column), name).reshape(-1, length)


def _numbers(column: pyarrow.ChunkedArray, name: str) -> numpy.ndarray:
    """Return a column of numbers as float32; raise if one isn't finite."""
    _refuse_nulls(column, name)
    values = column.to_numpy().astype("float32")
    if not numpy.isfinite(values).all():
        raise InvalidRowsError(f"{name} has values that are not finite: leave these rows out.")
    return values


def _refuse_nulls(column: pyarrow.ChunkedArray, name: str) -> None:
    if column.null_count:
        raise InvalidRowsError(f"{name} has {column.null_count} nulls: leave these rows out.")


def worker_function(plan: dict[str, Any], model: Broadcast, driver: tuple[str, int], token: str):
    """Return the function that Spark runs in each barrier task.

    Parameters
    ----------
    plan : dict
        What all workers are told: ``optimizer`` and ``loss`` as Keras serializes them, ``inputs``
        and ``outputs`` of the network, ``label_is_list``, ``batch_size``, ``num_epoch``, ``seed``.
    model : pyspark.broadcast.Broadcast
        The network as bytes.
    driver : tuple of str and int
        Where the driver listens for reports.
    token : str
        What lets a report in.

    Returns
    -------
    callable
        From batches of rows to one row of `RESULT`.
    """

    def work(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
        context = BarrierTaskContext.get()
        rank = context.partitionId()
        with _Reporter(driver, token, rank) as report, _folder() as folder:
            try:
                with report.regularly():
                    _prepare(Path(folder), context, plan, model.value, batches, report.host)
            except InvalidRowsError as error:
                report({"invalid": str(error)})
                raise
            _run_process(Path(folder), report)
            yield _result(Path(folder), rank)
            report({"done": rank})

    return work


def _folder() -> tempfile.TemporaryDirectory:
    """Return a new folder for what the process needs.

    It is in Spark's own folder, which Spark removes when it ends: a task that is killed at a wrong
    moment can't do it.
    """
    place = Path(SparkFiles.getRootDirectory()).absolute()
    return tempfile.TemporaryDirectory(prefix="training-", dir=place)


def _prepare(
    folder: Path,
    context: BarrierTaskContext,
    plan: dict[str, Any],
    model: bytes,
    batches: Iterator[pyarrow.RecordBatch],
    host: str,
) -> None:
    """Write down what the process needs; the other workers reach it at `host`."""
    rank = context.partitionId()
    batches = list(batches)
    schema = batches[0].schema if batches else _schema(plan["label_is_list"])
    table = pyarrow.Table.from_batches(batches, schema)
    training, validation = split_rows(table, plan["inputs"], plan["outputs"])
    # The port is free when it is chosen, and a moment later, when the process takes it, too.
    with socket.create_server((host, 0)) as server:
        mine = {
            "address": f"{host}:{server.getsockname()[1]}",
            "rows": len(training.labels), "validation_rows": len(validation.labels),
        }  # fmt: skip
        workers = [json.loads(text) for text in context.allGather(json.dumps(mine))]
    if not sum(worker["rows"] for worker in workers):
        raise InvalidRowsError("there are no rows to train on.")
    for name, rows in (("training", training), ("validation", validation)):
        numpy.savez(folder / f"{name}.npz", features=rows.features, labels=rows.labels)
    (folder / "model.keras").write_bytes(model)
    known = {"rank": rank, "workers": workers, "label_shape": training.labels.shape[1:]}
    (folder / "plan.json").write_text(json.dumps({**plan, **known}))


def _schema(label_is_list: bool) -> pyarrow.Schema:
    """Return the schema of a worker's rows, for one that Spark has given none."""
    number = pyarrow.float32()
    label = pyarrow.list_(number) if label_is_list else number
    return pyarrow.schema(
        [("features", pyarrow.list_(number)), ("label", label), ("validates", pyarrow.bool_())]
    )


def _run_process(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """Have a process of its own train, and hand on what it says."""
    log, failed = folder / "log.txt", None
    environment = {name: os.environ[name] for name in os.environ if name.lower() not in _PROXIES}
    # Spark has shipped the helpers to where only this process looks for them.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "helpers.training_process", str(folder)]
    with log.open("w") as errors, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env=environment,
        start_new_session=True,  # PySpark ends its whole group at once; this one cleans up first
    ) as process:  # fmt: skip
        try:
            for line in process.stdout:
                said = json.loads(line)
                failed = said.pop("failed", failed)
                report(said)
            code = process.wait(END_SECONDS)
        finally:
            process.kill()  # without effect if it has ended
    if code < 0:
        raise WorkerDiedError(_how_it_ended(signal.Signals(-code)))
    if code:
        raise RuntimeError(f"its process failed: {failed or _last_line(log)}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    return lines[-1] if lines else "it didn't say why"


def _how_it_ended(by: signal.Signals) -> str:
    text = f"its process was ended by {by.name}"
    if by is signal.SIGKILL:
        text += (
            "; if nobody did that, it was for want of memory: use more workers, or give each more "
            "of it"
        )
    return f"{text}."


class WorkerDiedError(RuntimeError):
    """A worker's process has ended, and not by itself."""


class _Reporter:
    """The connection from a task to the driver, which notices when it breaks."""

    def __init__(self, driver: tuple[str, int], token: str, rank: int) -> None:
        self._rank, self._lock = rank, threading.Lock()
        self._socket = socket.create_connection(driver, timeout=CONNECT_SECONDS)
        self.host = self._socket.getsockname()[0]  # this machine, as others reach it
        self({"token": token, "rank": rank})

    def __call__(self, report: dict[str, Any]) -> None:
        with self._lock:
            self._socket.sendall(f"{json.dumps(report)}\n".encode())

    @contextlib.contextmanager
    def regularly(self) -> Iterator[None]:
        """Report that the task lives, for as long as a ``with`` block lasts."""
        ended = threading.Event()

        def say() -> None:
            with contextlib.suppress(OSError):  # the driver has gone, which others notice
                while not ended.wait(REPORT_SECONDS):
                    self({})

        thread = threading.Thread(target=say, name="training-lives", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def __enter__(self) -> _Reporter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._socket, contextlib.suppress(OSError):
            if error is not None:
                died = isinstance(error, WorkerDiedError)
                self({"failed": f"worker {self._rank}: {error}", "died": died})


def _result(folder: Path, rank: int) -> pyarrow.RecordBatch:
    """Return what the process has made of the network."""
    model = (folder / "trained.keras").read_bytes() if rank == 0 else None
    digest = (folder / "digest.txt").read_text()
    return pyarrow.record_batch([[rank], [digest], [model]], schema=RESULT)
