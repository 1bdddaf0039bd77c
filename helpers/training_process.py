"""The process in which a worker of `helpers.training.SynchronousTrainer` trains.

    python -m helpers.training_process FOLDER

The folder has what `helpers.training_task` has put there: a plan, the network, and this worker's
rows. All workers do the same number of updates. To each, a worker adds the gradients of its next
rows, as large a part of its rows as the others take of theirs; TensorFlow's
`MultiWorkerMirroredStrategy` sums the gradients over the workers. The sums are the same everywhere,
to the last digit, and so are the weights after the update.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy
import tensorflow

from helpers.model import model_from_bytes, model_to_bytes
from helpers.training_task import REPORT_SECONDS, Rows

VALIDATION_ROWS = 4_096  # that all workers together take at a time


class Replica:
    """The network as one worker has it, and its steps.

    Parameters
    ----------
    model : keras.Model
        The network.
    plan : dict
        ``optimizer`` and ``loss`` as Keras serializes them, and the ``workers``.
    strategy : tensorflow.distribute.Strategy
        What adds up the workers' numbers.
    """

    def __init__(
        self, model: keras.Model, plan: dict[str, Any], strategy: tensorflow.distribute.Strategy
    ) -> None:
        self.model = model
        self._strategy, self._workers = strategy, len(plan["workers"])
        self._optimizer = keras.optimizers.deserialize(plan["optimizer"])
        self._optimizer.build(model.trainable_variables)
        loss = keras.losses.deserialize(plan["loss"])
        self._loss = getattr(loss, "call", loss)  # of each row, where a `Loss` would take the mean
        labels = [None, *plan["label_shape"]]
        rows = [tensorflow.TensorSpec(shape) for shape in ([None, plan["inputs"]], labels)]
        count = tensorflow.TensorSpec([])
        self.update = tensorflow.function(self._update, [*rows, count], autograph=False)
        self.measure = tensorflow.function(self._measure, rows, autograph=False)

    def _update(self, features, labels, count):
        """Update the weights; return the sums of losses and of right answers over all workers."""
        sums = self._strategy.run(self._gradients, args=(features, labels, count))
        *gradients, loss, right = sums
        self._optimizer.apply(gradients, self.model.trainable_variables)
        return loss, right

    def _gradients(self, features, labels, count):
        """Return the gradients of the mean loss over the `count` rows of all workers."""
        with tensorflow.GradientTape() as tape:
            answers = self.model(features, training=True)
            loss = self._loss_of_all(labels, answers)
            # What the layers add, such as the size of weights, is of the update, not of a row.
            loss += count * sum(self.model.losses) / self._workers
            target = self._optimizer.scale_loss(loss / count)
        gradients = tape.gradient(
            target, self.model.trainable_variables, unconnected_gradients="zero"
        )
        return self._sum([*gradients, loss, _right(labels, answers)])

    def _measure(self, features, labels):
        """Return the sums of losses and of right answers over all workers."""
        return self._strategy.run(self._losses, args=(features, labels))

    def _losses(self, features, labels):
        answers = self.model(features, training=False)
        loss = self._loss_of_all(labels, answers)
        loss += tensorflow.cast(tensorflow.shape(features)[0], loss.dtype) * sum(self.model.losses)
        return self._sum([loss, _right(labels, answers)])

    def _loss_of_all(self, labels, answers):
        """Return the sum of the losses of one worker's rows."""
        losses = self._loss(labels, answers)
        if losses.shape.rank != 1:
            raise ValueError(
                f"the loss gives values of shape {losses.shape}, where workers that share an "
                "update need one a row: shape (rows,)."
            )
        return tensorflow.reduce_sum(losses)

    def finish(self) -> None:
        """Make of the weights what the optimizer leaves at the end, such as their average."""
        self._optimizer.finalize_variable_values(self.model.trainable_variables)

    @tensorflow.function(autograph=False)
    def average_state(self) -> None:
        """Give all workers the means of what their layers have counted on their own rows."""
        state = [w for w in self.model.non_trainable_weights if w.dtype.startswith("float")]
        if state:
            sums = self._strategy.run(lambda: self._state(state))
            for weight, total in zip(state, sums, strict=True):
                weight.assign(total / self._workers)

    def _state(self, weights):
        return self._sum([tensorflow.identity(weight.value) for weight in weights])

    @staticmethod
    def _sum(values: list) -> list:
        replica = tensorflow.distribute.get_replica_context()
        return replica.all_reduce(tensorflow.distribute.ReduceOp.SUM, values)


def _right(labels, answers):
    """Return how many answers are right: the class with the largest value, or a value above 1/2."""
    if answers.shape[-1] == 1:
        right = tensorflow.equal(answers[:, 0] > 0.5, tensorflow.reshape(labels, [-1]) > 0.5)
    else:
        classes = tensorflow.argmax(labels, -1) if labels.shape.rank == 2 else labels
        right = tensorflow.equal(
            tensorflow.argmax(answers, -1), tensorflow.cast(classes, tensorflow.int64)
        )
    return tensorflow.reduce_sum(tensorflow.cast(right, tensorflow.float32))


def parts(rows: Rows, counts: list[int], batch_size: int) -> Iterator[tuple[Rows, int]]:
    """Yield a worker's rows of each step, and how many rows all workers have in it.

    Parameters
    ----------
    rows : Rows
        The worker's rows.
    counts : list of int
        How many rows each worker has.
    batch_size : int
        The most rows that a step has, of all workers together, up to one more for each worker.

    Examples
    --------
    >>> rows = Rows(numpy.zeros((3, 2)), numpy.array([0, 1, 2]))
    >>> [(part.labels.tolist(), count) for part, count in parts(rows, [3, 1], batch_size=2)]
    [([0], 1), ([1, 2], 3)]
    """
    steps = max(1, math.ceil(sum(counts) / batch_size))
    for step in range(steps):
        count = sum(n * (step + 1) // steps - n * step // steps for n in counts)
        n = len(rows.labels)
        chosen = slice(n * step // steps, n * (step + 1) // steps)
        if count:  # workers with fewer rows than steps leave some out, each the same ones
            yield Rows(*(part[chosen] for part in rows)), count


class Training:
    """The epochs of one worker's training."""

    def __init__(self, folder: Path, plan: dict[str, Any], replica: Replica) -> None:
        self._plan, self._replica = plan, replica
        self._rows, self._validation = (_load(folder / name) for name in ("training", "validation"))
        self._random = numpy.random.default_rng([plan["seed"], plan["rank"]])
        self._reported = time.monotonic()

    def run(self) -> None:
        """Train, and report each epoch."""
        for epoch in range(1, self._plan["num_epoch"] + 1):
            began = time.monotonic()
            report = {"epoch": epoch, **self._train()}
            self._replica.average_state()
            report |= self._validate()
            if self._plan["rank"] == 0:
                self._report({**report, "seconds": time.monotonic() - began})
        self._replica.finish()

    def _train(self) -> dict[str, float]:
        order = self._random.permutation(len(self._rows.labels))
        rows = Rows(*(part[order] for part in self._rows))
        sums = numpy.zeros(2)
        for part, count in self._parts(rows, "rows", self._plan["batch_size"]):
            sums += self._replica.update(*part, numpy.float32(count))
        return self._means(sums, "rows", "")

    def _validate(self) -> dict[str, float]:
        if not sum(worker["validation_rows"] for worker in self._plan["workers"]):
            return {}
        sums = numpy.zeros(2)
        for part, _ in self._parts(self._validation, "validation_rows", VALIDATION_ROWS):
            sums += self._replica.measure(*part)
        return self._means(sums, "validation_rows", "validation_")

    def _parts(self, rows: Rows, kind: str, batch_size: int) -> Iterator[tuple[Rows, int]]:
        counts = [worker[kind] for worker in self._plan["workers"]]
        for part in parts(rows, counts, batch_size):
            yield part
            if time.monotonic() > self._reported + REPORT_SECONDS:
                self._report({})

    def _means(self, sums: numpy.ndarray, kind: str, prefix: str) -> dict[str, float]:
        means = sums / sum(worker[kind] for worker in self._plan["workers"])
        return {f"{prefix}loss": float(means[0]), f"{prefix}accuracy": float(means[1])}

    def _report(self, report: dict[str, Any]) -> None:
        """Tell the task; something that is empty says that the process lives."""
        self._reported = time.monotonic()
        print(json.dumps(report), flush=True)


def _load(path: Path) -> Rows:
    with numpy.load(f"{path}.npz") as arrays:
        return Rows(**arrays)


def _digest(model: keras.Model) -> str:
    """Return what differs as soon as one digit of the weights does."""
    weights = model.get_weights()
    if not all(numpy.isfinite(weight).all() for weight in weights):
        raise FloatingPointError(
            "weights are not finite after training: lower the learning rate; and a worker that is "
            "without rows in an update can't count what a batch normalisation needs."
        )
    return hashlib.sha256(b"".join(weight.tobytes() for weight in weights)).hexdigest()


def main(folder: Path) -> None:
    """Train in step with the other workers' processes."""
    threading.Thread(target=_end_with_the_task, args=[folder], daemon=True).start()
    plan = json.loads((folder / "plan.json").read_text())
    addresses = [worker["address"] for worker in plan["workers"]]
    task = {"type": "worker", "index": plan["rank"]}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
    for kind in ("intra", "inter"):
        getattr(tensorflow.config.threading, f"set_{kind}_op_parallelism_threads")(plan["threads"])
    # Nothing of TensorFlow may run before this.
    strategy = tensorflow.distribute.MultiWorkerMirroredStrategy()
    model = model_from_bytes((folder / "model.keras").read_bytes())
    _draw_differently(model, plan["rank"])
    Training(folder, plan, Replica(model, plan, strategy)).run()
    (folder / "trained.keras").write_bytes(model_to_bytes(model))
    (folder / "digest.txt").write_text(_digest(model))


def _draw_differently(model: keras.Model, rank: int) -> None:
    """Have each worker's random layers draw other numbers, such as which units drop out."""
    weights = {id(weight) for weight in model.weights}
    for seed in (state for state in model.variables if id(state) not in weights):
        seed.assign(seed + rank)


def _end_with_the_task(folder: Path) -> None:
    """End this process when the task that has started it is gone, and leave nothing behind."""
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Exception as error:
        # The first line is what went wrong; what TensorFlow writes below it is where.
        reason = [*str(error).strip().splitlines(), ""][0]
        print(json.dumps({"failed": f"{type(error).__name__}: {reason}"}), flush=True)
        # When one worker has died, Spark kills the others' tasks, which can't do this then.
        shutil.rmtree(sys.argv[1], ignore_errors=True)
        raise
