"""A training of which an executor is killed, and another one right after it, as a program.

python training_on_executors.py

Spark runs two executors of their own, as on a cluster. The last line is a JSON object: after how
many `seconds` the training has failed with which `error`, what is `left` of it on the executors'
disks, and how many `epochs_afterwards` the next training had, which had to wait for an executor.
"""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import keras
import psutil
import pyspark
from processes import wait_until

from helpers.session import get_spark
from helpers.training import SynchronousTrainer, TrainingError

# Spark keeps the executors' folders in its own; there is no setting for another place.
WORK = Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent) / "work"


def executor_of(process: psutil.Process) -> psutil.Process:
    """Return the Java process that has started another one."""
    return next(parent for parent in process.parents() if parent.name() == "java")


def training_processes() -> list[psutil.Process]:
    """Return the processes of the workers."""
    started = psutil.Process().children(recursive=True)
    return [found for found in started if "helpers.training_process" in found.cmdline()]


def main() -> dict[str, object]:
    """Train, kill an executor, and train again."""
    spark = get_spark(
        master="local-cluster[2,1,1024]", memory="1g", config={"spark.driver.host": "127.0.0.1"}
    )
    folder = WORK / spark.sparkContext.applicationId
    rows = [([float(n), 1.0], n % 2) for n in range(1_000)]
    df = spark.createDataFrame(rows, "features array<double>, label int")
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, "softmax")])

    def trainer(epochs: int) -> SynchronousTrainer:
        return SynchronousTrainer(
            network, loss="sparse_categorical_crossentropy", num_epoch=epochs
        )

    endless, again = trainer(100_000), trainer(1)
    outcome = []

    def train() -> None:
        try:
            endless.train(df)
        except TrainingError as error:
            outcome.append((time.monotonic(), str(error)))

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    try:
        wait_until(endless.get_history)
        processes = training_processes()
        killed = time.monotonic()
        executor_of(processes[0]).send_signal(signal.SIGKILL)
        thread.join(60)
        failed, error = outcome[0]
        wait_until(lambda: not any(process.is_running() for process in processes), seconds=30)
        left = [str(path) for path in folder.rglob("training-*")]
        again.train(df)
    finally:
        spark.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return {"seconds": round(failed - killed, 1), "error": error, "left": left,
            "epochs_afterwards": len(again.get_history())}  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main()))
