"""A program that streams into a sink and dies at a given point; a constant replaces the network.

python failing_stream.py ENGINE BOOTSTRAP_SERVERS TOPIC FOLDER POINT
"""

import os
import signal
import sys

from pyspark import SparkContext
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F

from helpers.scoring import score_stream
from helpers.sinks import ParquetSink
from helpers.spark import get_spark
from helpers.streaming import KafkaQuery, KafkaUtils, new_streaming_context, run_stream

POINTS = ("before writing", "before committing", "after committing", "nowhere")


def main(engine: str, servers: str, topic: str, folder: str, point: str) -> None:
    """Store the topic's records, and die at the given point of the second batch."""
    config = {"spark.streaming.kafka.maxRatePerPartition": 100, "spark.ui.enabled": "false"}
    spark = get_spark(cores=1, memory="1g", config=config)
    settings = {"bootstrap.servers": servers, "auto.offset.reset": "earliest"}
    with DyingSink(spark, f"{folder}/scored", signal_index=0) as sink:
        sink.point = point
        if engine == "dstream":
            ssc = new_streaming_context(spark, 0.5)
            stream = KafkaUtils.createDirectStream(
                ssc, [topic], settings, positions=sink.positions()
            )
            score_stream(stream, score, sink)
            run_stream(ssc, until=lambda: stream.lag() == 0, timeout=600)
        else:
            checkpoint, positions = f"{folder}/checkpoint", sink.positions()
            with KafkaQuery(spark, [topic], settings, checkpoint, positions, 100) as query:
                score_stream(query, score, sink)
                query.run(timeout=600)
    print("done", flush=True)


class DyingSink(ParquetSink):
    """A sink that kills its driver at a given point of its second batch."""

    point = "nowhere"
    batches = 0

    def write(self, *arguments):
        """Write a batch, or die before writing it."""
        self.batches += 1
        self.die_at("before writing")
        return super().write(*arguments)

    def _publish(self, *arguments):
        self.die_at("before committing")
        super()._publish(*arguments)
        self.die_at("after committing")

    def die_at(self, point):
        """Kill Java and Python, as a crash does, if this is the point."""
        if point == self.point and self.batches == 2:
            os.kill(SparkContext._gateway.proc.pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def score(df):
    """Give each record the same prediction; the record's value is the event id."""
    event = F.struct(
        F.col("value").cast("string").cast("long").alias("EventId"),
        F.lit(None).cast("string").alias("reason"),
        F.lit(None).cast("array<string>").alias("unused"),
    )
    prediction = array_to_vector(F.array(F.lit(0.5), F.lit(0.5)))
    return df.withColumns(
        {"event": event, "prediction": prediction, "predicted_index": F.lit(0.0)}
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
