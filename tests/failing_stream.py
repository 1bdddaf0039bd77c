"""A stream into a sink, as a program that dies at a fail point; a constant stands for the network.

python failing_stream.py ENGINE BOOTSTRAP_SERVERS TOPIC FOLDER POINT
"""

import os
import signal
import sys

from pyspark import SparkContext
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F

from helpers.session import get_spark
from helpers.sinks import ParquetSink
from helpers.streaming import KafkaQuery, KafkaUtils, new_streaming_context, run_stream

POINTS = ("before writing", "before committing", "after committing", "nowhere")


def main(engine: str, servers: str, topic: str, folder: str, point: str) -> None:
    """Store what is in the topic, and die at the point in the second batch that gets there."""
    config = {"spark.streaming.kafka.maxRatePerPartition": 100, "spark.ui.enabled": "false"}
    spark = get_spark(cores=1, memory="1g", config=config)
    settings = {"bootstrap.servers": servers, "auto.offset.reset": "earliest"}
    with DyingSink(spark, f"{folder}/scored") as sink:
        sink.point = point

        def process(df, batch_id):
            if not sink.has(batch_id):
                sink.write(score(df), batch_id)

        if engine == "dstream":
            ssc = new_streaming_context(spark, 0.5)
            stream = KafkaUtils.createDirectStream(
                ssc, [topic], settings, positions=sink.positions()
            )
            sink.begin(stream)
            stream.foreachBatch(process)
            run_stream(ssc, until=lambda: stream.lag() == 0, timeout=600)
        else:
            checkpoint, positions = f"{folder}/checkpoint", sink.positions()
            with KafkaQuery(spark, [topic], settings, checkpoint, positions, 100) as query:
                sink.begin(query)
                query.foreachBatch(process)
                query.run(timeout=600)
    print("done", flush=True)


class DyingSink(ParquetSink):
    """A sink whose driver is killed at a point of its second batch."""

    point = "nowhere"
    batches = 0

    def write(self, scored, batch_id):
        """Write a batch, or die before."""
        self.batches += 1
        self.die_at("before writing")
        super().write(scored, batch_id)

    def _commit(self, *arguments):
        self.die_at("before committing")
        super()._commit(*arguments)
        self.die_at("after committing")

    def die_at(self, point):
        """End Java and Python as a crash does, if this is the point."""
        if point == self.point and self.batches == 2:
            os.kill(SparkContext._gateway.proc.pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def score(df):
    """Give each record the same prediction; its value is the event's id."""
    return df.select(
        F.col("value").cast("string").cast("long").alias("EventId"),
        array_to_vector(F.array(F.lit(0.5), F.lit(0.5))).alias("prediction"),
        F.lit(0.0).alias("prediction_index"),
        "topic", "partition", "offset", "timestamp",
        F.lit(None).cast("struct<key: binary, value: binary, reason: string>").alias("bad"),
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
