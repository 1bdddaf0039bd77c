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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pyarrow
from pyspark import BarrierTaskContext
from pyspark.broadcast import Broadcast

CONNECT_SECONDS = 10
END_SECONDS = 30  # how long a process may take to end when it has said its last

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
        float32, of shape (rows, classes), or (rows,) for labels that are numbers.
    """

    features: numpy.ndarray
    labels: numpy.ndarray


class InvalidRowsError(ValueError):
    """The rows don't fit the network, or have what isn't a number."""


def split_rows(table: pyarrow.Table, inputs: int) -> tuple[Rows, Rows]:
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

    Raises
    ------
    InvalidRowsError
        If a row has something else.

    Examples
    --------
    >>> columns = {"features": [[2.0], [1.0]], "label": [1, 0], "validates": [False, False]}
    >>> table = pyarrow.table(columns)
    >>> split_rows(table, inputs=1)[0].features.tolist()
    [[1.0], [2.0]]
    """
    features = _matrix(table["features"], "features")
    if table.num_rows and features.shape[1:] != (inputs,):
        raise InvalidRowsError(
            f"the rows have {features.shape[1]} features, but the network has {inputs} inputs."
        )
    labels = _matrix(table["label"], "label")
    features = features.reshape(table.num_rows, inputs)
    # Only equal rows can be in any order, and for them it doesn't matter.
    keys = numpy.column_stack([labels, features]) if table.num_rows else features
    order = numpy.lexsort(keys.T)
    validates = table["validates"].to_numpy()[order]
    rows = Rows(features[order], labels[order])
    return tuple(Rows(*(part[chosen] for part in rows)) for chosen in (~validates, validates))


def _matrix(column: pyarrow.ChunkedArray, name: str) -> numpy.ndarray:
    """Return a column of numbers, or of lists of equal lengths, as float32."""
    array = column.combine_chunks()
    if array.null_count:
        raise InvalidRowsError(f"{array.null_count} rows have no {name}: leave them out.")
    shape = (len(array),)
    if pyarrow.types.is_list(array.type):
        lengths = set(array.value_lengths().to_pylist())
        if len(lengths) > 1:
            raise InvalidRowsError(f"the rows' {name} have different lengths: {sorted(lengths)}.")
        shape = (len(array), *(lengths or {0}))
        array = array.flatten()
    values = array.to_numpy(zero_copy_only=False).astype("float32").reshape(shape)
    if not numpy.isfinite(values).all():
        raise InvalidRowsError(f"{name} has values that are not finite: leave these rows out.")
    return values


def worker_function(plan: dict[str, Any], model: Broadcast, driver: tuple[str, int], token: str):
    """Return the function that Spark runs in each barrier task.

    Parameters
    ----------
    plan : dict
        What all workers are told: ``optimizer`` and ``loss`` as Keras serializes them, ``inputs``,
        ``batch_size``, ``num_epoch``, ``seed``.
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
        with _Reporter(driver, token, rank) as report, tempfile.TemporaryDirectory() as folder:
            try:
                _prepare(Path(folder), context, plan, model.value, batches)
            except InvalidRowsError as error:
                report({"invalid": str(error)})
                raise
            _run_process(Path(folder), report)
            yield _result(Path(folder), rank)
            report({"done": rank})

    return work


def _prepare(
    folder: Path,
    context: BarrierTaskContext,
    plan: dict[str, Any],
    model: bytes,
    batches: Iterator[pyarrow.RecordBatch],
) -> None:
    """Write down what the process needs."""
    rank = context.partitionId()
    batches = list(batches)
    schema = batches[0].schema if batches else pyarrow.schema(
        [("features", pyarrow.list_(pyarrow.float32())), ("label", pyarrow.float32()),
         ("validates", pyarrow.bool_())]
    )  # fmt: skip
    table = pyarrow.Table.from_batches(batches, schema)
    training, validation = split_rows(table, plan["inputs"])
    host = context.getTaskInfos()[rank].address.rpartition(":")[0]
    # The port is free when it is chosen, and a moment later, when the process takes it, too.
    with socket.create_server((host, 0)) as server:
        mine = {
            "address": f"{host}:{server.getsockname()[1]}",
            "rows": len(training.labels), "validation_rows": len(validation.labels),
            "label_shape": training.labels.shape[1:] if table.num_rows else None,
        }  # fmt: skip
        workers = [json.loads(text) for text in context.allGather(json.dumps(mine))]
    if not sum(worker["rows"] for worker in workers):
        raise InvalidRowsError("there are no rows to train on.")
    shape = next(worker["label_shape"] for worker in workers if worker["rows"])
    for name, rows in (("training", training), ("validation", validation)):
        labels = rows.labels if table.num_rows else rows.labels.reshape(0, *shape)
        numpy.savez(folder / f"{name}.npz", features=rows.features, labels=labels)
    (folder / "model.keras").write_bytes(model)
    known = {"rank": rank, "workers": workers, "label_shape": shape}
    (folder / "plan.json").write_text(json.dumps({**plan, **known}))


def _run_process(folder: Path, report: Callable[[dict[str, Any]], None]) -> None:
    """Have a process of its own train, and hand on what it says."""
    log = folder / "log.txt"
    # Spark has shipped the helpers to where only this process looks for them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "helpers.training_process", str(folder)]
    with log.open("w") as errors, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env=environment,
    ) as process:  # fmt: skip
        try:
            for line in process.stdout:
                report(json.loads(line))
            code = process.wait(END_SECONDS)
        finally:
            process.kill()  # without effect if it has ended
    if code < 0:
        raise WorkerDiedError(
            f"its process was ended by {signal.Signals(-code).name}; if nobody did that, it was "
            "for want of memory: use more workers, or give each more of it."
        )
    if code:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise RuntimeError(f"its process failed: {' '.join(last)}")


class WorkerDiedError(RuntimeError):
    """A worker's process has ended, and not by itself."""


class _Reporter:
    """The connection from a task to the driver, which notices when it breaks."""

    def __init__(self, driver: tuple[str, int], token: str, rank: int) -> None:
        self._rank = rank
        self._socket = socket.create_connection(driver, timeout=CONNECT_SECONDS)
        self({"token": token, "rank": rank})

    def __call__(self, report: dict[str, Any]) -> None:
        self._socket.sendall(f"{json.dumps(report)}\n".encode())

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
