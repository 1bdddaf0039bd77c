"""A program with a checkpointed stream, which tests kill; it logs what each batch gets.

python checkpointed_stream.py BOOTSTRAP_SERVERS TOPIC FOLDER GROUP ('' for none) [with-state]
"""

import json
import os
import sys
import time
from pathlib import Path

from pyspark.streaming import StreamingContext

from helpers.spark import get_spark
from helpers.streaming import KafkaUtils, run_stream

SECONDS = 2  # per interval
RATE = 100  # records per second and partition, so that the topic takes several batches
WINDOW = 3  # intervals
LAST = "-1"  # the value after which the program ends


def main(servers: str, topic: str, folder: str, group: str, state: str = "") -> None:
    """Run the stream, or resume it from its checkpoint, until it gets the last value."""
    config = {
        "spark.streaming.kafka.maxRatePerPartition": RATE,
        "spark.default.parallelism": 1,  # of the state; a task costs more than these counts
        "spark.ui.enabled": "false",
    }
    spark = get_spark(cores=2, memory="1g", config=config)
    starts, delivered, counted, in_windows, end = (
        Path(folder) / name for name in ("starts", "delivered", "counted", "in_windows", "end")
    )
    write(starts, {"time": time.time()})

    def deliver(batch_time, rdd):
        values = rdd.collect()
        ranges = [
            [part.partition, part.fromOffset, part.untilOffset] for part in rdd.offsetRanges()
        ]
        write(delivered, {"time": batch_time.timestamp(), "values": values, "ranges": ranges})
        if LAST in values:
            end.touch()

    def count(batch_time, rdd):
        write(counted, {"time": batch_time.timestamp(), "counts": dict(rdd.collect())})

    def count_window(batch_time, rdd):
        write(in_windows, {"time": batch_time.timestamp(), "count": sum(rdd.collect())})

    def set_up():
        ssc = StreamingContext(spark.sparkContext, SECONDS)
        settings = {"bootstrap.servers": servers, "auto.offset.reset": "earliest"}
        stream = KafkaUtils.createDirectStream(
            ssc, [topic], settings | ({"group.id": group} if group else {}),
            messageHandler=lambda record: record.message,
        )  # fmt: skip
        stream.foreachRDD(deliver)
        stream.window(WINDOW * SECONDS, SECONDS).count().foreachRDD(count_window)
        if state:
            pairs = stream.transform(lambda rdd: rdd.map(lambda value: (str(int(value) % 3), 1)))
            pairs.updateStateByKey(lambda new, before: (before or 0) + sum(new)).foreachRDD(count)
        ssc.checkpoint(f"{folder}/checkpoint")
        return ssc

    ssc = StreamingContext.getOrCreate(f"{folder}/checkpoint", set_up)
    print("ready", flush=True)
    run_stream(ssc, until=end.exists, timeout=900)
    print("done", flush=True)


def write(path: Path, line: dict) -> None:
    """Append a line in a single write, so that a killed process leaves no partial line."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, f"{json.dumps(line)}\n".encode())
    os.close(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
