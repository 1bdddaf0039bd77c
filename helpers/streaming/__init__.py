"""Kafka topics in Spark, batch by batch: plans, lag and commits, as a DStream and as a query.

The DStream has the names of `pyspark.streaming.kafka` (Spark 1.3 to 2.4).

One class asks: `KafkaClient` talks to Kafka through the JVM's own consumer and administrator. One
plans: `OffsetPlanner` decides which offsets belong to a batch, and knows nothing of Spark's
streams. One reads: `RangeReader` reads given offsets with Spark's Kafka source, and knows nothing
of consumer groups. A `Ledger` keeps the books: what is planned, done and committed. `Recovery`
keeps the plans for the time after a crash. `Batches` joins them: each interval it plans a batch,
hands the batch on, and commits the batch's offsets when the whole batch has succeeded.
`KafkaDirectStream` is its face as a DStream.

    stream = KafkaUtils.createDirectStream(ssc, ["Machine_Learning"], {
        "bootstrap.servers": "127.0.0.1:9092",
        "group.id": "walkthrough",
        "auto.offset.reset": "earliest",
    })
    stream.foreachBatch(lambda df, batch_id: df.write.mode("append").parquet("events"))
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)

From the bottom up: `offsets` (what a batch is made of), `errors`, `settings`, `client`, `planner`,
`reader`, `rates` (how much a batch may have), `ledger`, `listener` (what Spark reports), `recovery`
(what a checkpoint needs), `source` (what a stream asks Kafka), `batches`, `dstream`, `kafka_utils`
(the old API), `context` (a context from its start to its end), `structured` (`KafkaQuery`: the same
promises on Structured Streaming). `migrate` is a program: it prints what to change in old code.
"""

from helpers.streaming.client import topic_ids
from helpers.streaming.context import (
    java_watched,
    new_streaming_context,
    run_stream,
    stop_streaming,
)
from helpers.streaming.dstream import KafkaDirectStream, KafkaRDD
from helpers.streaming.errors import StreamError, explained, without_secrets
from helpers.streaming.kafka_utils import KafkaMessageAndMetadata, KafkaUtils, utf8_decoder
from helpers.streaming.offsets import Broker, OffsetRange, PlannedBatch, TopicAndPartition
from helpers.streaming.planner import OffsetPlanner
from helpers.streaming.reader import RangeReader
from helpers.streaming.settings import (
    java_map,
    modern_settings,
    settings_of,
    use_added_jars,
)
from helpers.streaming.structured import KafkaQuery, read_stream
