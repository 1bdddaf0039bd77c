"""Kafka topics in Spark, batch by batch: plans, lag and commits, as a DStream and as a query.

The DStream has the names of `pyspark.streaming.kafka` (Spark 1.3 to 2.4).

    stream = KafkaUtils.createDirectStream(ssc, ["Machine_Learning"], {
        "bootstrap.servers": "127.0.0.1:9092",
        "group.id": "walkthrough",
        "auto.offset.reset": "earliest",
    })
    stream.foreachBatch(lambda df, batch_id: df.write.mode("append").parquet("events"))
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)

From the bottom up: `offsets` (ranges, which batches consist of), `errors`, `settings`, `client`
(talks to Kafka through the JVM's consumer and admin client), `planner` (decides where a stream
begins or resumes, also after Kafka has deleted records, and which offsets belong to a batch),
`reader` (reads offset ranges with Spark's Kafka source, independently of any consumer group),
`rates` (limits the size of batches), `ledger` (tracks what is planned, done and committed, and so
the lag), `listener` (what Spark reports), `recovery` (keeps plans in a checkpoint, for a restart
after a crash), `source` (plans, reads and commits for one stream), `batches` (hands each interval's
batch on, and commits its offsets when the whole batch has succeeded), `dstream`, `kafka_utils` (the
old API), `context` (starts and stops a context), `group` (shows a query's progress in its consumer
group), `structured` (`KafkaQuery`: the same promises on Structured Streaming, with a lag from
Spark's checkpoint). `migrate` is a program that prints what to change in old code.
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
