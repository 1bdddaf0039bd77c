"""The stream: which records belong to a batch, what is committed, and what happens on failures."""

import contextlib
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import NewPartitions
from processes import wait_until
from pyspark.streaming import StreamingContext

from helpers.monitor import Monitor
from helpers.notebook import definitions
from helpers.scoring import score_stream
from helpers.sinks import ParquetSink, read_scored
from helpers.spark import log_file
from helpers.streaming import (
    KafkaUtils,
    OffsetPlanner,
    OffsetRange,
    RangeReader,
    StreamError,
    TopicAndPartition,
    new_streaming_context,
    run_stream,
)
from helpers.streaming.batches import batch_id_of
from helpers.streaming.listener import ContextListener

SECONDS = 600  # for what hangs; a stream of these tests takes seconds


@pytest.fixture
def ssc(spark):
    """A streaming context with a short interval, stopped at the end."""
    context = new_streaming_context(spark, 0.5)
    yield context
    context.stop(stopSparkContext=False, stopGraceFully=False)


def committed(kafka, group):
    """Ask Kafka, by another library than the stream's, for a group's offsets."""
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        offsets = admin.list_group_offsets([group])[group]
    return {partition.partition: offset.offset for partition, offset in offsets.items()}


def drain(ssc, stream, seconds=SECONDS):
    """Run until no record is left."""
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=seconds)


def numbers(count, start=0):
    """Values that are easy to recognise."""
    return [str(number).encode() for number in range(start, start + count)]


def test_a_stream_has_keys_and_values(ssc, topic, produce, settings):
    """Elements are (key, value) pairs, as those of pyspark.streaming.kafka."""
    produce(topic, numbers(50), [None] * 25 + [b"k"] * 25)
    pairs = []
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.map(lambda pair: (pair[0], int(pair[1]))).foreachRDD(lambda r: pairs.extend(r.collect()))
    drain(ssc, stream)
    assert sorted(value for _, value in pairs) == list(range(50))
    assert {key for key, _ in pairs} == {None, "k"}


def test_message_handler_and_decoders(ssc, topic, produce, settings):
    """Old code sees where a record comes from, and reads binary values."""
    produce(topic, [b"\xff\x00", b"\xff\x01"])
    found = []
    stream = KafkaUtils.createDirectStream(
        ssc, [topic], settings, valueDecoder=lambda value: value[1],
        messageHandler=lambda record: (record.topic, record.partition, record.offset,
                                       record.key, record.message),
    )
    stream.foreachRDD(lambda rdd: found.extend(rdd.collect()))
    drain(ssc, stream)
    (partition,) = {record[1] for record in found}
    assert sorted(found) == [(topic, partition, 0, "key", 0), (topic, partition, 1, "key", 1)]


def test_foreach_batch_gives_the_columns_of_sparks_source(ssc, topic, produce, settings):
    """A function written for Structured Streaming runs on the stream."""
    produce(topic, numbers(20))
    seen = []

    def process(df, batch_id):
        assert isinstance(batch_id, int)
        seen.append((df.columns, sorted(int(bytes(row.value)) for row in df.collect())))

    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachBatch(process)
    drain(ssc, stream)
    columns = ["key", "value", "topic", "partition", "offset", "timestamp", "timestampType"]
    assert seen == [(columns, list(range(20)))]


def test_offsets_are_committed_and_the_group_goes_on_from_there(
    spark, kafka, topic, produce, settings
):
    """A stream that is started again skips and repeats nothing."""
    batches = []
    for start in (0, 30):
        produce(topic, numbers(30, start), [str(n).encode() for n in range(30)])
        ssc = new_streaming_context(spark, 0.5)
        stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
        stream.foreachBatch(
            lambda df, _: batches.append(sorted(int(bytes(row.value)) for row in df.collect()))
        )
        drain(ssc, stream)
        assert sum(committed(kafka, settings["group.id"]).values()) == start + 30
    assert batches == [list(range(30)), list(range(30, 60))]


def test_a_batch_that_fails_once_is_tried_again(ssc, kafka, topic, produce, settings):
    """A passing fault neither stops the stream nor loses the batch."""
    produce(topic, numbers(10))
    calls = []

    def process(df, batch_id):
        calls.append((batch_id, df.count()))
        if len(calls) == 1:
            raise RuntimeError("a passing fault")

    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachBatch(process)
    drain(ssc, stream)
    assert len(calls) == 2
    assert calls[0] == calls[1] == (calls[0][0], 10)
    assert sum(committed(kafka, settings["group.id"]).values()) == 10


def test_a_batch_that_keeps_failing_stops_the_stream(spark, ssc, kafka, topic, produce, settings):
    """No later batch is committed past the one that failed."""
    produce(topic, numbers(10))
    calls = []

    def process(df, batch_id):
        calls.append(df.count())
        produce(topic, numbers(10, start=10))  # there is always more to plan
        raise RuntimeError("the disk is full")

    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachBatch(process)
    with pytest.raises(StreamError, match=r"the stream stopped: .*RuntimeError: the disk is full"):
        drain(ssc, stream)
    assert calls == [10, 10]
    assert committed(kafka, settings["group.id"]) == {0: 0, 1: 0}

    again = new_streaming_context(spark, 0.5)
    values = []
    stream = KafkaUtils.createDirectStream(again, [topic], settings)
    stream.foreachBatch(lambda df, _: values.extend(int(bytes(r.value)) for r in df.collect()))
    drain(again, stream)
    assert sorted(values) == sorted([*range(10), *range(10, 20), *range(10, 20)])


def test_nothing_is_lost_when_the_first_batch_of_a_stream_from_latest_fails(
    spark, topic, produce, settings
):
    """The restarted stream begins where the first one began, not at the new end."""
    settings["auto.offset.reset"] = "latest"
    first = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(first, [topic], settings)

    def fail(df, batch_id):
        raise RuntimeError("at the first batch")

    stream.foreachBatch(fail)
    produce(topic, numbers(10))
    with pytest.raises(StreamError, match="at the first batch"):
        run_stream(first, until=lambda: False, timeout=SECONDS)

    again = new_streaming_context(spark, 0.5)
    counts = []
    stream = KafkaUtils.createDirectStream(again, [topic], settings)
    stream.foreachBatch(lambda df, batch_id: counts.append(df.count()))
    drain(again, stream)
    assert sum(counts) == 10


def test_one_failed_output_of_two_keeps_the_batch_uncommitted(
    ssc, kafka, topic, produce, settings
):
    """A batch is committed only after all outputs have succeeded."""
    produce(topic, numbers(10))
    stored = []

    def fail(rdd):
        if not rdd.isEmpty():
            raise RuntimeError("the second output fails")

    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachBatch(lambda df, _: stored.append(df.count()))
    stream.map(lambda pair: pair[1]).foreachRDD(fail)
    with pytest.raises(StreamError, match="the second output fails"):
        drain(ssc, stream)
    assert stored == [10]
    assert committed(kafka, settings["group.id"]) == {0: 0, 1: 0}


def test_without_a_failure_handler_the_stream_stops_by_itself(ssc, topic, produce, settings):
    """A failure also ends a program that doesn't use `run_stream`."""
    produce(topic, numbers(10))

    def fail(df, batch_id):
        raise RuntimeError("always")

    KafkaUtils.createDirectStream(ssc, [topic], settings).foreachBatch(fail)
    ssc.start()
    with pytest.raises(Exception, match="always"):
        ssc.awaitTerminationOrTimeout(SECONDS)
    wait_until(lambda: ssc._jssc.ssc().getState().toString() == "STOPPED")


@pytest.mark.parametrize("of_kafka", [True, False])
def test_a_batch_that_cannot_be_made_stops_the_stream(ssc, kafka, one, produce, settings, of_kafka):
    """A function that raises before the batch's jobs exist loses no records, whoever calls it."""
    produce(one, numbers(10))
    failed, done = [], []

    def fail_once(batch_time, rdd):
        if stream._batches.ledger.unfinished(batch_id_of(batch_time)) and not failed:
            failed.append(batch_time)
            raise KeyError("a bug in one interval")
        return rdd

    stream = KafkaUtils.createDirectStream(ssc, [one], settings)
    stream.for_each_planned_batch(lambda batch: done.extend(batch.ranges))
    if of_kafka:
        stream.transform(fail_once).foreachRDD(lambda rdd: None)
    else:
        both = stream.transformWith(lambda time, rdd, _: fail_once(time, rdd), stream.map(str))
        both.foreachRDD(lambda rdd: None)
    ssc.start()
    with pytest.raises(Exception, match="a bug in one interval"):
        ssc.awaitTerminationOrTimeout(SECONDS)
    produce(one, numbers(10, start=10))
    wait_until(lambda: ssc._jssc.ssc().getState().toString() == "STOPPED")
    assert "a bug in one interval" in stream._batches.error
    assert committed(kafka, settings["group.id"]) == {0: 0}
    assert failed and done == []


@pytest.mark.parametrize("of_kafka", [True, False])
def test_a_checkpoint_keeps_a_batch_that_could_not_be_made(
    spark, one, produce, settings, tmp_path, monkeypatch, of_kafka
):
    """After a failure, a stream resumes with the failed interval, however late the stop comes.

    Spark takes an interval whose jobs it could not make for done, and makes further ones.
    """
    to_fail, done = tmp_path / "fail", tmp_path / "done"
    stop = ContextListener.stop

    def stop_late(listener, reason, first):
        failed = time.monotonic()

        def after_some_intervals():
            wait_until(lambda: time.monotonic() > failed + 2)
            first()

        stop(listener, reason, after_some_intervals)

    monkeypatch.setattr(ContextListener, "stop", stop_late)

    def fail_once(batch_time, rdd):
        if rdd.getNumPartitions() and to_fail.exists():
            to_fail.unlink()
            raise KeyError("a bug in one interval")
        return rdd

    def note(rdd):
        with done.open("a") as file:
            file.writelines(f"{int(value)}\n" for _, value in rdd.collect())

    def are_done(count):
        return done.exists() and set(numbers(count)) <= set(done.read_bytes().split())

    def set_up():
        ssc = new_streaming_context(spark, 0.5)
        ssc.checkpoint(str(tmp_path / "checkpoint"))
        stream = KafkaUtils.createDirectStream(ssc, [one], settings)
        stream.foreachRDD(note)
        if of_kafka:
            stream.transform(fail_once).foreachRDD(lambda rdd: None)
        else:
            both = stream.transformWith(lambda time, rdd, _: fail_once(time, rdd), stream.map(str))
            both.foreachRDD(lambda rdd: None)
        return ssc

    produce(one, numbers(10))
    ssc = set_up()
    ssc.start()
    wait_until(lambda: are_done(10))
    to_fail.touch()
    produce(one, numbers(10, start=10))
    with pytest.raises(Exception, match="a bug in one interval"):
        ssc.awaitTerminationOrTimeout(SECONDS)
    produce(one, numbers(10, start=20))  # for the next interval
    wait_until(lambda: ssc._jssc.ssc().getState().toString() == "STOPPED")
    resumed = StreamingContext.getOrCreate(str(tmp_path / "checkpoint"), set_up)
    resumed.start()
    wait_until(lambda: are_done(30))
    resumed.stop(stopSparkContext=False, stopGraceFully=False)


def test_a_batch_can_ask_for_the_lag_that_it_leaves(ssc, topic, produce, settings):
    """In a batch's function, the lag is what remains after this batch."""
    left = []
    keys = [b"%d" % number for number in range(10)]  # spread over both partitions
    produce(topic, numbers(10), keys)

    def process(df, batch_id):
        df.count()
        if not left:
            produce(topic, numbers(10, start=10), keys)
            wait_until(lambda: stream.lag() == 20)  # the next interval knows of them
        left.append((stream.lag_after(batch_id), stream.lag()))

    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachBatch(process)
    drain(ssc, stream)
    assert left[0] == (10, 20)
    after_the_last, uncommitted = left[-1]
    assert after_the_last == 0 < uncommitted


def test_from_offsets(ssc, topic, produce, settings):
    """A stream begins at the offsets in `fromOffsets`."""
    metadata = produce(topic, numbers(10))[0]
    start = {TopicAndPartition(topic, metadata.partition): 7}
    values = []
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings, fromOffsets=start)
    stream.foreachRDD(lambda rdd: values.extend(rdd.map(lambda pair: int(pair[1])).collect()))
    drain(ssc, stream)
    assert values == [7, 8, 9]


def test_the_old_names_of_settings_work(spark, kafka, topic, produce):
    """The kafkaParams of Kafka 0.8 work unchanged."""
    produce(topic, numbers(5))
    ssc = new_streaming_context(spark, 0.5)
    old = {"metadata.broker.list": kafka.bootstrap_servers, "auto.offset.reset": "smallest"}
    counts = []
    stream = KafkaUtils.createDirectStream(ssc, [topic], old)
    stream.foreachRDD(lambda rdd: counts.append(rdd.count()))
    drain(ssc, stream)
    assert sum(counts) == 5


def test_settings_without_servers_are_refused(ssc, topic):
    """The message names the missing setting."""
    with pytest.raises(ValueError, match=r"no 'bootstrap\.servers': add the brokers' addresses"):
        KafkaUtils.createDirectStream(ssc, [topic], {"group.id": "g"})


def test_a_topic_that_does_not_exist_is_named(ssc, kafka, settings):
    """A typo neither creates a topic nor waits for one."""
    with pytest.raises(StreamError, match=r"topic 'no-such-topic' doesn't exist at 127\.0\.0\.1:"):
        KafkaUtils.createDirectStream(ssc, ["no-such-topic"], settings)
    assert "no-such-topic" not in kafka.topics()


def test_a_reset_that_does_not_exist_is_refused(ssc, topic, settings):
    """A typo doesn't begin at the end in silence."""
    with pytest.raises(ValueError, match=r"'first': it must be 'earliest', 'latest' or 'none'\."):
        KafkaUtils.createDirectStream(ssc, [topic], {**settings, "auto.offset.reset": "first"})


def test_an_offset_that_the_topic_does_not_have_is_named(ssc, topic, produce, settings):
    """A stream on a topic that was created again ends with the reason."""
    partition = produce(topic, numbers(5))[0].partition
    start = {TopicAndPartition(topic, partition): 70}
    with pytest.raises(StreamError, match=r"created again.*from offset 70, but ends at 5"):
        KafkaUtils.createDirectStream(ssc, [topic], settings, fromOffsets=start)


@pytest.mark.long
def test_a_broker_that_does_not_answer_is_an_error_in_time(ssc, settings):
    """A wrong address is an error within seconds."""
    started = time.monotonic()
    with pytest.raises(StreamError, match=r"127\.0\.0\.1:9 gave no answer within 15 s: check"):
        KafkaUtils.createDirectStream(
            ssc, ["topic"], {**settings, "bootstrap.servers": "127.0.0.1:9"}
        )
    assert time.monotonic() - started < 4 * 15


def test_a_stream_that_is_not_done_in_time_is_stopped(ssc, topic, settings):
    """`run_stream` ends at its deadline with a TimeoutError."""
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachBatch(lambda df, batch_id: None)
    with pytest.raises(TimeoutError, match="not done after 2 s and was stopped"):
        run_stream(ssc, until=lambda: False, timeout=2)
    assert ssc._jssc.ssc().getState().toString() == "STOPPED"


def test_a_deadline_ends_the_batch_that_runs_and_it_is_not_tried_again(
    spark, ssc, kafka, topic, produce, settings
):
    """After the deadline, Spark computes nothing more for the stream."""
    produce(topic, numbers(10))
    calls = []
    begun = threading.Event()

    def process(df, batch_id):
        calls.append(batch_id)
        begun.set()
        spark.range(10**14).selectExpr("max(hash(id))").collect()

    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachBatch(process)
    with pytest.raises(TimeoutError):
        run_stream(ssc, until=lambda: not begun.wait(SECONDS), timeout=1)
    wait_until(lambda: not spark.sparkContext.statusTracker().getActiveJobsIds())
    assert len(calls) == 1
    assert sum(committed(kafka, settings["group.id"]).values()) == 0


def test_a_graceful_stop_finishes_and_commits_what_is_planned(
    ssc, kafka, topic, produce, settings
):
    """A stream that is stopped in the middle repeats nothing when it resumes."""
    produce(topic, numbers(10))
    begun = threading.Event()

    def process(df, batch_id):
        begun.set()
        df.count()

    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachBatch(process)
    run_stream(ssc, until=begun.is_set, timeout=SECONDS)
    assert sum(committed(kafka, settings["group.id"]).values()) == 10


def test_a_stream_with_a_long_interval_stops_at_once(spark, topic, produce, settings):
    """The end of a stream doesn't wait for its next interval, here a day."""
    ssc = new_streaming_context(spark, 86_400)
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachBatch(lambda *_: None)
    began = time.monotonic()
    run_stream(ssc, until=lambda: True, timeout=SECONDS)
    assert time.monotonic() - began < 3_600


@pytest.mark.long
def test_a_report_that_spark_drops_holds_nothing_up(ssc, topic, produce, settings, monkeypatch):
    """A batch whose end Spark doesn't report, as its queue is full, is committed with the next."""
    report, ends = ContextListener.onBatchCompleted, []

    def drops_the_second(self, event):
        info = event.batchInfo()
        if info.outputOperationInfos() and batches.ledger.ranges(info.batchTime().milliseconds()):
            ends.append(info)
        if len(ends) != 2:
            report(self, event)

    monkeypatch.setattr(ContextListener, "onBatchCompleted", drops_the_second)
    stream, seen = KafkaUtils.createDirectStream(ssc, [topic], settings), []
    batches = stream._batches
    produce(topic, [b"x"])

    def write_another(batch, batch_id):
        seen.append(batch.count())
        if len(seen) < 4:
            produce(topic, [b"x"])

    stream.foreachBatch(write_another)
    run_stream(ssc, until=lambda: len(seen) == 4 and stream.lag() == 0, timeout=SECONDS)
    assert len(ends) >= 4 and batches.ledger.is_settled()


def test_sparks_log_does_not_grow_with_each_batch(spark, one, produce, settings):
    """Spark's warning about the reader's group, eight lines per batch, isn't written."""
    produce(one, [b"x"] * 3)
    reader = RangeReader(spark, {"bootstrap.servers": settings["bootstrap.servers"]})

    def warnings():
        return log_file().read_text(errors="replace").count("KafkaSourceProvider")

    before = warnings()
    for _ in range(3):
        reader.read([OffsetRange(one, 0, 0, 1)]).count()
    assert warnings() == before


def test_no_connection_stays_behind_a_stream(spark, kafka, topic, settings):
    """A notebook whose cells run again and again keeps no connections."""
    port = int(kafka.bootstrap_servers.split(":")[1])

    def connections():
        lines = Path("/proc/net/tcp").read_text().splitlines()
        lines += Path("/proc/net/tcp6").read_text().splitlines()
        established = [line.split() for line in lines if line.split()[3] == "01"]
        return sum(int(line[2].rpartition(":")[2], 16) == port for line in established)

    # The topic is empty, for the consumers that read records are in a pool of Spark's.
    before = connections()
    for _ in range(3):
        ssc = new_streaming_context(spark, 0.5)
        stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
        stream.foreachBatch(lambda df, batch_id: df.count())
        drain(ssc, stream)
    assert wait_until(lambda: connections() <= before)


def test_a_running_context_gives_way_to_a_new_one(spark, topic, produce, settings):
    """A notebook's cell that makes a context can be run again."""
    first = new_streaming_context(spark, 0.5)
    KafkaUtils.createDirectStream(first, [topic], settings).foreachBatch(lambda df, i: None)
    first.start()
    produce(topic, numbers(3))
    second = new_streaming_context(spark, 0.5)
    assert StreamingContext.getActive() is None
    stream = KafkaUtils.createDirectStream(second, [topic], {**settings, "group.id": "another"})
    counts = []
    stream.foreachBatch(lambda df, i: counts.append(df.count()))
    drain(second, stream)
    assert sum(counts) == 3


def test_the_planner_plans_each_offset_once(spark, topic, produce, settings):
    """Consecutive plans have neither gaps nor overlaps."""
    produce(topic, numbers(25))
    planner = OffsetPlanner(spark, [topic], settings)
    batches = [planner.next_batch(lambda left: dict.fromkeys(left, 10)) for _ in range(4)]
    planner.close()
    ranges = [(part.fromOffset, part.untilOffset) for batch in batches for part in batch]
    assert ranges == [(0, 10), (10, 20), (20, 25)]
    assert batches[3] == []


def test_a_new_partition_is_read_from_its_beginning(spark, kafka, topic, produce, settings):
    """Records that are written to it before the stream notices it are read."""
    settings |= {"auto.offset.reset": "latest", "metadata.max.age.ms": "500"}
    planner = OffsetPlanner(spark, [topic], settings)
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.create_partitions({topic: NewPartitions(3)})
    with KafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, metadata_max_age_ms=200
    ) as producer:
        wait_until(lambda: len(producer.partitions_for(topic)) == 3)
        producer.send(topic, b"early", partition=2).get(10)
    assert wait_until(planner.next_batch) == [OffsetRange(topic, 2, 0, 1)]
    planner.close()


def test_the_rate_limit_of_spark_bounds_a_batch(spark, topic, produce, settings):
    """The first batch doesn't take the whole backlog."""
    produce(topic, numbers(25))
    conf = spark.sparkContext._jsc.sc().conf()
    conf.set("spark.streaming.kafka.maxRatePerPartition", "20")
    try:
        ssc = new_streaming_context(spark, 0.5)
        counts = []
        stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
        stream.foreachBatch(lambda df, i: counts.append(df.count()))
        drain(ssc, stream)
    finally:
        conf.remove("spark.streaming.kafka.maxRatePerPartition")
    assert counts == [10, 10, 5]


def test_the_reader_reads_exactly_the_ranges(spark, topic, produce, settings):
    """A batch has the records of its offset ranges, and no others."""
    partition = produce(topic, numbers(30))[0].partition
    df = RangeReader(spark, settings).read([OffsetRange(topic, partition, 5, 12)])
    assert sorted(row.offset for row in df.collect()) == list(range(5, 12))


def rows_through_python(spark, since):
    """Return how many rows Spark sent through Python functions in queries newer than `since`."""
    spark.sparkContext._jsc.sc().listenerBus().waitUntilEmpty(600_000)  # for late reports
    store = spark._jsparkSession.sharedState().statusStore()
    executions = [e for e in _scala_list(store.executionsList()) if e.executionId() > since]
    total = 0
    for execution in executions:
        values = store.executionMetrics(execution.executionId())
        for node in _scala_list(store.planGraph(execution.executionId()).allNodes()):
            if "EvalPython" in node.name():
                for metric in _scala_list(node.metrics()):
                    if metric.name() == "number of output rows":
                        total += int(values.get(metric.accumulatorId()).get().replace(",", ""))
    return total


def _scala_list(sequence):
    return [sequence.apply(index) for index in range(sequence.size())]


def test_each_event_crosses_the_network_exactly_once(
    spark, ssc, topic, produce, settings, event_values, tmp_path
):
    """Counting, filtering and writing don't run the network again."""
    produce(topic, event_values, [str(n).encode() for n in range(len(event_values))])
    monitor = Monitor()
    score = definitions("1_walkthrough", "pipeline")["process_instances"]
    sink = ParquetSink(spark, str(tmp_path / "scored"), signal_index=0)
    store = spark._jsparkSession.sharedState().statusStore()
    before = max((e.executionId() for e in _scala_list(store.executionsList())), default=-1)
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    with sink:
        score_stream(stream, score, sink, monitor)
        drain(ssc, stream)
    assert monitor.totals()["events"] == len(event_values)
    assert rows_through_python(spark, before) == len(event_values)
    ids = sorted(row.EventId for row in read_scored(spark, sink.path).collect())
    assert ids == sorted(json.loads(value)["EventId"] for value in event_values)


def test_an_output_that_nobody_reads_fails_no_batch(
    spark, ssc, topic, produce, settings, event_values, tmp_path, monkeypatch, caplog
):
    """As with `streaming_job.py ... | head`: the batch is stored, and is not tried again."""
    produce(topic, event_values[:50], [b"key"] * 50)
    reader, writer = os.pipe()
    os.close(reader)
    closed = os.fdopen(writer, "w")
    monitor = Monitor()
    score = definitions("1_walkthrough", "pipeline")["process_instances"]
    sink = ParquetSink(spark, str(tmp_path / "scored"), signal_index=0)
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    with monkeypatch.context() as patches, sink:
        patches.setattr(sys, "stdout", closed)
        score_stream(stream, score, sink, monitor)
        drain(ssc, stream)
    with contextlib.suppress(BrokenPipeError):
        closed.close()
    assert "can't be shown: [Errno 32]" in caplog.text and "is retried" not in caplog.text
    assert monitor.totals()["events"] == read_scored(spark, sink.path).count() == 50


def test_a_longer_time_for_an_answer_reaches_the_reader(ssc, topic, produce, settings):
    """`request.timeout.ms` works alone, although Kafka wants the whole time longer."""
    produce(topic, numbers(5))
    patient = {**settings, "request.timeout.ms": "40000"}
    stream = KafkaUtils.createDirectStream(ssc, [topic], patient)
    counts = []
    stream.foreachBatch(lambda df, i: counts.append(df.count()))
    drain(ssc, stream)
    assert sum(counts) == 5
