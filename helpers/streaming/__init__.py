"""Kafka topics in Spark, batch by batch: plans, lag and commits, as a DStream and as a query.

The DStream has the names of `pyspark.streaming.kafka` (Spark 1.3 to 2.4).

    stream = KafkaUtils.createDirectStream(ssc, ["Machine_Learning"], {
        "bootstrap.servers": "127.0.0.1:9092",
        "group.id": "walkthrough",
        "auto.offset.reset": "earliest",
    })
    stream.foreachBatch(lambda df, batch_id: df.write.mode("append").parquet("events"))
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)

From the bottom up:

| module | what it does |
|---|---|
| `offsets` | offset ranges, which make up batches |
| `errors`, `settings` | the errors of a stream, and the settings it takes |
| `client` | talks to Kafka through the JVM's consumer and admin client |
| `planner` | where a stream begins or resumes, and which offsets belong to a batch |
| `reader` | reads offset ranges with Spark's Kafka source |
| `rates` | limits the size of batches |
| `ledger` | what is planned, done and committed to Kafka, and so the lag |
| `listener` | what Spark reports about a context's batches |
| `recovery` | keeps a DStream's plans in a checkpoint, for a restart |
| `source` | plans, reads and commits for one DStream |
| `batches` | runs a DStream's batches; only one that has succeeded is committed |
| `dstream`, `kafka_utils` | the old API, with `foreachBatch` added |
| `context` | starts and stops a streaming context |
| `group` | shows a query's progress in its consumer group |
| `structured` | `KafkaQuery`: the same on Structured Streaming, with its lag |
| `migrate` | a program that prints what to change in old code |
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
from helpers.streaming.offsets import (
    Broker,
    OffsetRange,
    PlannedBatch,
    TopicAndPartition,
    by_partition,
    by_topic,
    is_another,
)
from helpers.streaming.planner import OffsetPlanner
from helpers.streaming.reader import RangeReader, spark_options
from helpers.streaming.settings import (
    java_map,
    modern_settings,
    settings_of,
    use_added_jars,
)
from helpers.streaming.structured import KafkaQuery, read_stream
