"""The stream beside all that Kafka does: retention, groups, transactions, compaction, codecs."""

import contextlib
import json
import logging
import time
import uuid
from datetime import datetime

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewPartitions
from processes import wait_until

from helpers.notebook import definitions
from helpers.records import BadRecordError, keep_bad_records
from helpers.sinks import ParquetSink
from helpers.streaming import (
    KafkaQuery,
    KafkaUtils,
    OffsetPlanner,
    OffsetRange,
    RangeReader,
    StreamError,
    TopicAndPartition,
    new_streaming_context,
    recovery,
    run_stream,
    stop_streaming,
)
from helpers.streaming.rates import RateLimit


@pytest.fixture
def ssc(spark):
    """A streaming context with a short interval, stopped at the end."""
    context = new_streaming_context(spark, 0.5)
    yield context
    context.stop(stopSparkContext=False, stopGraceFully=False)


def drain(ssc, topic, settings):
    """Return the keys and values that a stream delivers until the topic's end."""
    found = []
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachRDD(lambda rdd: found.extend(rdd.collect()))
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    return found


def committed(kafka, group):
    """Ask Kafka for a group's offsets."""
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        return {part.partition: found.offset for part, found in
                admin.list_group_offsets([group])[group].items()}  # fmt: skip


@contextlib.contextmanager
def transactional_producer(kafka):
    """Provide a producer that is ready for transactions."""
    with KafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, transactional_id=f"id-{uuid.uuid4()}",
        transaction_timeout_ms=600_000,
    ) as producer:  # fmt: skip
        producer.init_transactions()
        yield producer


def readable_end(kafka, topic):
    """Ask Kafka for the end of what a partition's readers of finished transactions can read."""
    partition = TopicPartition(topic, 0)
    with KafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, isolation_level="read_committed"
    ) as consumer:
        return consumer.end_offsets([partition])[partition]


@pytest.fixture
def distant(kafka, event_values):
    """A topic with an event and a bad record, whose times are in microseconds, not milliseconds."""
    name = f"distant-{uuid.uuid4()}"
    kafka.create_topic(name, 1, {"message.timestamp.after.max.ms": str(2**63 - 1)})
    with KafkaProducer(bootstrap_servers=kafka.bootstrap_servers) as producer:
        for value in (event_values[0], b"rubbish"):
            producer.send(name, value, timestamp_ms=time.time_ns() // 1_000).get(30)
    return name


def test_a_record_of_the_year_55000_is_read(spark, ssc, distant, settings, tmp_path):
    """Python has no such date, but an element of a stream doesn't either."""
    assert len(drain(ssc, distant, settings)) == 2
    servers = {"bootstrap.servers": settings["bootstrap.servers"]}
    ranges = [OffsetRange(distant, 0, 0, 2)]
    assert KafkaUtils.createRDD(spark.sparkContext, servers, ranges).count() == 2
    records = RangeReader(spark, settings).read(ranges)
    sink = ParquetSink(spark, str(tmp_path / "scored"), signal_index=0)
    score = definitions("1_walkthrough", "pipeline")["process_instances"]
    with sink, pytest.raises(BadRecordError, match=f"{distant}, partition 0, offset 1 is not an"):
        sink.begin({}, {distant: "id"})
        sink.write(keep_bad_records(score(records)), ranges)


@pytest.fixture
def half_deleted(kafka, produce, one, settings):
    """A topic whose first 20 of 50 records are deleted after the group has begun at the first."""
    produce(one, [str(number).encode() for number in range(50)])
    with KafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers, group_id=settings["group.id"],
        enable_auto_commit=False,
    ) as consumer:  # fmt: skip
        partition = TopicPartition(one, 0)
        consumer.assign([partition])
        consumer.seek(partition, 0)
        consumer.commit()
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_records({partition: 20})
    assert committed(kafka, settings["group.id"]) == {0: 0}
    return one


@pytest.mark.parametrize(
    "reset, first, loss",
    [
        ("earliest", 20, "20 events of one-.*, partition 0 \\(offsets 0 to 19\\) are lost"),
        ("latest", 50, "50 events of one-.*, partition 0 \\(offsets 0 to 49\\) are lost"),
    ],
)
def test_what_retention_has_deleted_is_told_to_the_last_event(
    ssc, half_deleted, settings, caplog, reset, first, loss
):
    """A warning has the exact offsets that are missing from the results."""
    with caplog.at_level(logging.WARNING):
        found = drain(ssc, half_deleted, {**settings, "auto.offset.reset": reset})
    assert [int(value) for _, value in found] == list(range(first, 50))
    assert len([text for text in caplog.messages if "are lost" in text]) == 1
    with pytest.raises(AssertionError, match=loss):
        raise AssertionError(caplog.text)


def test_with_none_a_loss_is_an_error(ssc, half_deleted, settings):
    """With auto.offset.reset=none, the stream doesn't continue after deleted offsets."""
    with pytest.raises(StreamError, match=r"20 events .* are lost: .*retention.*set auto\.offset"):
        KafkaUtils.createDirectStream(
            ssc, [half_deleted], {**settings, "auto.offset.reset": "none"}
        )


def test_with_none_a_group_without_offsets_is_an_error(ssc, one, settings):
    """With auto.offset.reset=none, the stream doesn't choose where to begin."""
    with pytest.raises(StreamError, match=r"group 'group-.*' has no committed offset for one-"):
        KafkaUtils.createDirectStream(ssc, [one], {**settings, "auto.offset.reset": "none"})


def test_what_is_deleted_after_it_was_planned_is_left_out(
    spark, kafka, produce, one, settings, caplog
):
    """A batch doesn't fail for ever because of records that never come back."""
    produce(one, [b"x"] * 50)
    planner = OffsetPlanner(spark, [one], settings)
    ranges = planner.next_batch()
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_records({TopicPartition(one, 0): 30})
    assert planner.without_deleted(ranges) == [OffsetRange(one, 0, 30, 50)]
    assert "30 events" in caplog.text
    planner.close()


def test_a_batch_whose_records_are_all_deleted_is_empty(
    ssc, kafka, produce, one, settings, caplog
):
    """A stream does not stop, at each start, for records that never come back."""
    produce(one, [b"old"] * 50)
    stream = KafkaUtils.createDirectStream(ssc, [one], settings)
    counts, deleted = [], []

    def process(df, batch_id):
        if not deleted:  # after the batch was planned: it fails, and is read once more
            with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
                deleted.append(admin.delete_records({TopicPartition(one, 0): 50}))
            raise OSError("for a moment")
        counts.append(df.count())

    stream.foreachBatch(process)
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    assert counts == [0]
    assert "50 events of one-" in caplog.text


def test_a_group_with_live_members_is_refused(ssc, kafka, produce, one, settings):
    """The stream says so before it scores a batch that Kafka would not commit."""
    produce(one, [b"x"])
    group = settings["group.id"]
    with (
        KafkaConsumer(
            one, bootstrap_servers=kafka.bootstrap_servers, group_id=group, client_id="dashboard"
        ) as consumer,
        KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin,
    ):

        def joined() -> bool:
            consumer.poll(timeout_ms=200)
            return admin.describe_groups([group])[group]["group_state"] == "Stable"

        wait_until(joined)
        with pytest.raises(StreamError, match=r"has live members \(dashboard.*use another group"):
            KafkaUtils.createDirectStream(ssc, [one], settings)


def test_offsets_are_committed_by_hand_where_that_is_asked_for(
    ssc, kafka, produce, one, settings
):
    """A program can commit offsets together with its results."""
    produce(one, [b"x"] * 30)
    by_hand = {**settings, "enable.auto.commit": False}
    stream = KafkaUtils.createDirectStream(ssc, [one], by_hand)
    seen = []

    def process(rdd):
        seen.extend(rdd.offsetRanges())
        for part in rdd.offsetRanges():
            stream.commitAsync([OffsetRange(part.topic, part.partition, part.fromOffset, 12)])

    stream.foreachRDD(process)
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    assert seen == [OffsetRange(one, 0, 0, 30)]
    assert committed(kafka, settings["group.id"]) == {0: 12}


def test_nothing_is_committed_unless_it_is_asked_for(ssc, kafka, produce, one, settings):
    """A program that commits by hand finds only its own commits."""
    produce(one, [b"x"] * 30)
    assert len(drain(ssc, one, {**settings, "enable.auto.commit": "false"})) == 30
    assert committed(kafka, settings["group.id"]) == {}


def test_aborted_transactions_never_appear_and_gaps_do_not_hang(ssc, kafka, one, settings):
    """Events that their producer has taken back are not scored."""
    with transactional_producer(kafka) as producer:
        for text, end in ((b"kept", "commit"), (b"taken back", "abort"), (b"kept too", "commit"),
                          (b"taken back as well", "abort")):  # fmt: skip
            producer.begin_transaction()
            for _ in range(5):  # each is there before its transaction ends
                producer.send(one, text, key=b"key").get(10)
            getattr(producer, f"{end}_transaction")()
    found = drain(ssc, one, {**settings, "isolation.level": "read_committed"})
    assert [value for _, value in found] == ["kept"] * 5 + ["kept too"] * 5
    assert committed(kafka, settings["group.id"]) == {0: 24}  # a mark ends each transaction


@pytest.mark.parametrize("by_element", [True, False])
def test_a_stream_goes_on_where_retention_moves_while_it_reads(
    ssc, kafka, produce, one, settings, caplog, by_element
):
    """Records that go between a batch's plan and its tasks are reported, and stop nothing."""
    produce(one, [b"%d" % number for number in range(50)])
    stream, found, deleted = KafkaUtils.createDirectStream(ssc, [one], settings), [], []

    def delete():
        if not deleted:
            with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
                deleted.append(admin.delete_records({TopicPartition(one, 0): 30}))

    def process_rdd(rdd):
        delete()
        found.extend(int(value) for _, value in rdd.collect())

    def process(df, batch_id):
        delete()
        found.extend(int(row.value) for row in df.collect())

    if by_element:
        stream.foreachRDD(process_rdd)
    else:
        stream.foreachBatch(process)
    with caplog.at_level(logging.WARNING):
        run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    assert sorted(found) == list(range(30, 50))
    assert "offsets 0 to 29 of one-" in caplog.text


def test_a_position_in_an_open_transaction_is_not_another_topic(spark, kafka, one, settings):
    """Whoever read the records before may read only finished transactions now, and waits."""
    with transactional_producer(kafka) as producer:
        producer.begin_transaction()
        producer.send(one, b"open").get(10)
        at_1 = {TopicAndPartition(one, 0): 1}
        reading = {**settings, "isolation.level": "read_committed"}
        planner = OffsetPlanner(spark, [one], reading, positions=at_1)
        assert planner.next_batch() == [] and planner.unread() == 0
        producer.send(one, b"more").get(10)
        producer.commit_transaction()
    assert wait_until(planner.next_batch) == [OffsetRange(one, 0, 1, 3)]
    planner.close()


def test_a_query_does_not_resume_in_an_open_transaction(spark, kafka, one, settings, tmp_path):
    """A query that may no longer read what is read already waits, and its checkpoint stays good."""
    seen = []
    settings = {name: value for name, value in settings.items() if name != "group.id"}

    def run(**more):
        with KafkaQuery(spark, [one], {**settings, **more}, str(tmp_path)) as query:
            query.for_each_planned_batch(lambda batch: seen.extend(batch.ranges))
            query.run(timeout=300)

    with transactional_producer(kafka) as producer:
        producer.begin_transaction()
        producer.send(one, b"open").get(10)
        run()
        with pytest.raises(StreamError, match="a transaction that began at 0 is still open: wait"):
            run(**{"isolation.level": "read_committed"})
        producer.send(one, b"more").get(10)
        producer.commit_transaction()
    wait_until(lambda: readable_end(kafka, one) == 3)  # the mark follows Kafka's answer
    run(**{"isolation.level": "read_committed"})
    assert [(part.fromOffset, part.untilOffset) for part in seen] == [(0, 1), (1, 3)]


def test_an_open_transaction_is_waited_for(spark, kafka, one, settings):
    """A batch ends before records that can't be read yet."""
    with transactional_producer(kafka) as producer:
        producer.begin_transaction()
        producer.send(one, b"later").get(10)
        planner = OffsetPlanner(spark, [one], {**settings, "isolation.level": "read_committed"})
        assert planner.next_batch() == []
        producer.commit_transaction()
    assert wait_until(planner.next_batch) == [OffsetRange(one, 0, 0, 2)]
    planner.close()


def test_a_compacted_topic_has_gaps(ssc, kafka, produce, settings):
    """The stream doesn't wait for records that compaction has removed."""
    name = f"compacted-{uuid.uuid4()}"
    kafka.create_topic(name, partitions=1, config={
        "cleanup.policy": "compact", "segment.ms": 100, "min.cleanable.dirty.ratio": 0.01,
        "max.compaction.lag.ms": 100,
    })  # fmt: skip

    def kept():
        """Write once more, for only a full segment is compacted; count what is left."""
        produce(name, [b"last"], [b"other"])
        with KafkaConsumer(
            name, bootstrap_servers=kafka.bootstrap_servers, auto_offset_reset="earliest",
            consumer_timeout_ms=2_000,
        ) as consumer:  # fmt: skip
            return sum(record.key == b"same" for record in consumer)

    produce(name, [b"value"] * 50, [b"same"] * 50)
    wait_until(lambda: kept() == 1, 600)
    found = drain(ssc, name, settings)
    assert found.count(("same", "value")) == 1


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
def test_each_codec_large_values_and_none(ssc, kafka, one, settings, codec):
    """Records of every codec and size arrive, also those without a value."""
    large = "x" * 900_000
    with KafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, compression_type=codec
    ) as producer:
        for key, value in ((None, large.encode()), (b"key", None), (None, b"small")):
            producer.send(one, value, key=key).get(10)
    assert drain(ssc, one, settings) == [(None, large), ("key", None), (None, "small")]


def test_windows_that_slide_by_several_intervals_are_committed(
    ssc, kafka, produce, one, settings
):
    """A stream whose only output is such a window resumes where it was."""
    produce(one, [b"x"] * 30)
    sizes = []
    stream = KafkaUtils.createDirectStream(ssc, [one], settings)
    windows = stream.window(1.5, 1.5)
    windows.count().foreachRDD(lambda rdd: sizes.extend(rdd.collect()))
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    assert sum(sizes) == 30
    assert committed(kafka, settings["group.id"]) == {0: 30}


def test_a_partition_that_is_added_while_the_stream_runs_is_read(
    ssc, kafka, produce, one, settings
):
    """A topic that grows is scored completely."""
    found, grown = [], []
    produce(one, [b"old"] * 5)
    stream = KafkaUtils.createDirectStream(ssc, [one], {**settings, "metadata.max.age.ms": 500})
    stream.foreachRDD(lambda rdd: found.extend(value for _, value in rdd.collect()))

    def grow():
        with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
            admin.create_partitions({one: NewPartitions(2)})
        with KafkaProducer(
            bootstrap_servers=kafka.bootstrap_servers, metadata_max_age_ms=200
        ) as producer:
            wait_until(lambda: len(producer.partitions_for(one)) == 2)
            producer.send(one, b"new", partition=1).get(10)

    def is_read():
        if "old" in found and not grown:
            grown.append(grow())
        return "new" in found and stream.lag() == 0

    run_stream(ssc, until=is_read, timeout=300)
    assert sorted(found) == ["new", *["old"] * 5]
    assert committed(kafka, settings["group.id"]) == {0: 5, 1: 1}


@contextlib.contextmanager
def configured(spark, settings):
    """Set settings of Spark for as long as a `with` block lasts."""
    conf = spark.sparkContext._jsc.sc().conf()
    for name, value in settings.items():
        conf.set(f"spark.streaming.{name}", str(value))
    try:
        yield
    finally:
        for name in settings:
            conf.remove(f"spark.streaming.{name}")


@pytest.mark.parametrize(
    "given, most",
    [
        ({}, (3_000, 1_000)),
        ({"kafka.maxRatePerPartition": 100}, (200, 200)),
        ({"backpressure.initialRate": 100}, (3_000, 1_000)),  # it is for backpressure alone
        ({"backpressure.enabled": "true", "backpressure.initialRate": 100}, (150, 50)),
        (
            {"backpressure.enabled": "true", "backpressure.initialRate": 100,
             "kafka.maxRatePerPartition": 50}, (100, 50),
        ),
        (
            {"backpressure.enabled": "true", "backpressure.initialRate": 100,
             "kafka.minRatePerPartition": 60}, (150, 60),
        ),
    ],
)  # fmt: skip
def test_the_rates_are_those_of_sparks_own_stream(spark, given, most):
    """Spark's settings of rates mean what they mean there."""
    partitions = [TopicAndPartition("t", 0), TopicAndPartition("t", 1)]
    with configured(spark, given):
        limit = RateLimit(spark.sparkContext, interval=2.0)
    left = dict(zip(partitions, (3_000, 1_000), strict=True))
    assert tuple(limit.most(left).values()) == most


def drain_backlog(spark, kafka, settings, events, initial_rate):
    """Drain a backlog with backpressure; return the sizes of the batches and their durations."""
    name = f"backlog-{uuid.uuid4()}"
    kafka.create_topic(name, partitions=4)
    with KafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, linger_ms=100, batch_size=2**20
    ) as producer:
        for number in range(events):
            producer.send(name, b"%d" % number)
    ssc = new_streaming_context(spark, 1)
    rates = {"backpressure.enabled": "true", "backpressure.initialRate": initial_rate}
    with configured(spark, rates):
        stream = KafkaUtils.createDirectStream(ssc, [name], settings)
    sizes = []
    numbers = stream.map(lambda pair: int(pair[1]))
    numbers.foreachRDD(lambda rdd: sizes.append(rdd.filter(lambda number: number >= 0).count()))
    listener = ssc._jssc.ssc().progressListener()
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=1_200)
    batches = listener.retainedCompletedBatches()
    delays = [batches.apply(index).processingDelay() for index in range(batches.size())]
    return sizes, [delay.get() / 1000 for delay in delays]


@pytest.mark.long
def test_backpressure_begins_with_the_initial_rate(spark, kafka, settings):
    """The first batch after a break doesn't take the whole backlog."""
    sizes, _ = drain_backlog(spark, kafka, settings, events=5_000, initial_rate=500)
    assert next(size for size in sizes if size) <= 500
    assert sum(sizes) == 5_000


@pytest.mark.long
def test_a_backlog_does_not_overwhelm_a_stream_with_backpressure(spark, kafka, settings):
    """From the sixth batch on, a batch of the backlog takes about an interval."""
    sizes, seconds = drain_backlog(spark, kafka, settings, events=500_000, initial_rate=20_000)
    assert sum(sizes) == 500_000
    *most, longest = sorted(seconds[5:])
    print(f"\n500,000 events in {len(sizes)} batches, from the sixth on {longest:.2f} s at most")
    # What else runs on the machine may slow down one batch or two, before the rate follows.
    assert most[-len(most) // 10] <= 2, list(zip(seconds, sizes, strict=False))


def kept_offsets(file):
    """Return where the only range of a plan in a checkpoint begins and ends."""
    ((_, _, start, end, _),) = json.loads(file.read_text())["ranges"]
    return start, end


def test_plans_are_kept_while_a_stream_catches_up(
    spark, one, produce, settings, tmp_path, monkeypatch
):
    """A second crash, while it does, loses none of the planned records.

    The intervals of a stream that catches up are long past; Spark's calls are made here for such.
    """
    context = new_streaming_context(spark, 3_600)
    context.checkpoint(str(tmp_path))
    stream = KafkaUtils.createDirectStream(context, [one], settings)
    stream.foreachRDD(lambda rdd: None)
    context.start()
    batches, now = stream._batches, round(time.time()) * 1_000
    intervals = [now - 7_200_000, now - 7_199_000, now - 7_198_000]
    try:
        for interval in intervals:
            produce(one, [b"1"] * 5)
            batches.plan(datetime.fromtimestamp(interval / 1_000), None)
            batches.ledger.submit(interval, now + 60_000)
            batches.completed(interval, None)
        folder = tmp_path / "kafka-plans" / batches.definition.stream_id
        assert [kept_offsets(folder / f"{each}.json")[0] for each in intervals] == [0, 5, 10]
        # Long after its commit a plan goes; the last one stays, for it says where to go on.
        monkeypatch.setattr(recovery, "KEPT_SECONDS", -1)
        produce(one, [b"1"] * 5)
        batches.plan(datetime.fromtimestamp(now / 1_000), None)
        batches.ledger.submit(now, now + 60_000)
        batches.completed(now, None)
        assert not (folder / f"{intervals[0]}.json").exists()
        assert kept_offsets(max(folder.glob("*.json"))) == (15, 20)
    finally:
        stop_streaming(context, gracefully=False)


def test_a_long_interval_does_not_hold_up_a_graceful_stop(spark, topic, settings, tmp_path):
    """Spark itself would wait for the next two intervals of a stream with a checkpoint."""
    context = new_streaming_context(spark, 3_600)
    context.checkpoint(str(tmp_path))
    KafkaUtils.createDirectStream(context, [topic], settings).foreachRDD(print)
    context.start()
    began = time.monotonic()
    assert stop_streaming(context, gracefully=True)
    assert time.monotonic() - began < 300
