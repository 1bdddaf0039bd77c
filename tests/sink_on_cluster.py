"""A program with a sink on a cluster whose worker sees another file system; prints JSON.

python sink_on_cluster.py SPARK_MASTER HIDDEN_FOLDER SHARED_FOLDER
"""

import json
import sys
from pathlib import Path

from test_sinks import Sink, stored, write

from helpers.sinks import SinkError
from helpers.spark import get_spark


def main(master: str, hidden: str, shared: str) -> None:
    """Try to store a batch in each folder."""
    config = {
        "spark.ui.enabled": "false", "spark.cores.max": "1",
        "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1",
    }  # fmt: skip
    spark = get_spark(master=master, executors=1, cores=1, memory="600m", config=config)
    try:
        found = {}
        with Sink(spark, f"{hidden}/scored") as sink:
            try:
                write(sink, spark, 0, 1_000)
            except SinkError as error:
                found["hidden"] = str(error)
        found["manifests"] = len(list(Path(hidden).glob("scored/commits/*.json")))
        with Sink(spark, f"{shared}/scored") as sink:
            write(sink, spark, 0, 1_000)
        found["shared"] = len(stored(spark, f"{shared}/scored"))
        print(json.dumps(found))
    finally:
        spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
