"""A program that trains on two executors, one of which is killed midway.

python training_on_executors.py

The last line is a JSON object: the number of `epochs`, whether the training ended with the
`same_weights` as an undisturbed one, and how many RDDs are still `persisted`.
"""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import psutil
import pyspark
from processes import wait_until

from helpers.higgs import FEATURES, generate_events
from helpers.model import build_model
from helpers.spark import get_spark
from helpers.training import AveragingTrainer

# Spark puts the executors' folders into its home; no setting changes that.
WORK = Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent) / "work"


def executors() -> list[psutil.Process]:
    """Return the executors' JVMs, found as the parents of Spark's Python daemons."""
    started = psutil.Process().children(recursive=True)
    daemons = [found for found in started if "pyspark.daemon" in found.cmdline()]
    return [found.parent() for found in daemons if found.parent().name() == "java"]


def main() -> dict[str, object]:
    """Train twice, the second time with an executor killed, and compare the weights."""
    spark = get_spark(
        master="local-cluster[2,1,1024]", memory="1g", config={"spark.driver.host": "127.0.0.1"}
    )
    folder = WORK / spark.sparkContext.applicationId
    try:
        events = generate_events(2_000, seed=1)[list(FEATURES)]
        events = (events - events.mean()) / events.std()
        df = spark.createDataFrame(
            [(row.tolist(), int(row[0] > 0)) for row in events.to_numpy()],
            "features array<double>, label int",
        )
        recipe = {"loss": "sparse_categorical_crossentropy", "num_epoch": 4, "batch_size": 64}
        undisturbed = AveragingTrainer(build_model(), **recipe).train(df)
        trainer = AveragingTrainer(build_model(), **recipe)

        def kill() -> None:
            wait_until(trainer.get_history, seconds=300)
            executors()[0].send_signal(signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        trained = trainer.train(df)
        killer.join()
        weights = zip(undisturbed.get_weights(), trained.get_weights(), strict=True)
        return {
            "epochs": len(trainer.get_history()),
            "same_weights": all(np.array_equal(one, other) for one, other in weights),
            "persisted": spark.sparkContext._jsc.sc().getPersistentRDDs().size(),
        }
    finally:
        spark.stop()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    print(json.dumps(main()))
