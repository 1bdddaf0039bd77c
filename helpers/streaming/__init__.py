"""Kafka as a DStream from Python, with the names of `pyspark.streaming.kafka` (Spark 1.3 to 2.4).

Three classes share the work. `OffsetPlanner` decides which offsets belong to a batch; it talks to
Kafka through the JVM's own `KafkaConsumer`, and knows nothing of Spark's streams. `RangeReader`
reads given offsets with Spark's Kafka source, and knows nothing of consumer groups.
`KafkaDirectStream` joins the two: each interval it plans a batch, hands the batch on, and commits
the batch's offsets when the whole batch has succeeded.

    stream = KafkaUtils.createDirectStream(ssc, ["Machine_Learning"], {
        "bootstrap.servers": "127.0.0.1:9092",
        "group.id": "walkthrough",
        "auto.offset.reset": "earliest",
    })
    stream.foreachBatch(process_instances)
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
"""

from helpers.streaming.dstream import (
    KafkaDirectStream,
    KafkaMessageAndMetadata,
    KafkaUtils,
    utf8_decoder,
)
from helpers.streaming.offsets import OffsetPlanner, OffsetRange, StreamError, TopicAndPartition
from helpers.streaming.reader import RangeReader
from helpers.streaming.running import new_streaming_context, run_stream, stop_streaming

__all__ = [
    "KafkaDirectStream",
    "KafkaMessageAndMetadata",
    "KafkaUtils",
    "OffsetPlanner",
    "OffsetRange",
    "RangeReader",
    "StreamError",
    "TopicAndPartition",
    "new_streaming_context",
    "run_stream",
    "stop_streaming",
    "utf8_decoder",
]
