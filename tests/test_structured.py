"""Tests of KafkaQuery: Structured Streaming with the promises of the DStream."""

import contextlib
import itertools
import json
import logging
import shutil
import threading
import time
import uuid

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import NewPartitions
from processes import wait_until
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F

from helpers.broker import LocalKafka
from helpers.higgs import FEATURES, generate_events
from helpers.monitor import Monitor
from helpers.records import parse_events
from helpers.scoring import score_stream
from helpers.sinks import ParquetSink, SinkError, read_scored
from helpers.spark import JAVA_ERRORS, is_interrupt
from helpers.streaming import (
    KafkaQuery,
    OffsetRange,
    StreamError,
    TopicAndPartition,
    read_stream,
    structured,
)
from helpers.streaming.client import KafkaClient
from helpers.streaming.errors import BrokerAwayError
from helpers.streaming.structured import CheckpointOffsets

AGAIN = "was deleted and created again"


@pytest.fixture
def settings(kafka):
    """A query's settings: from the beginning."""
    return {"bootstrap.servers": kafka.bootstrap_servers, "auto.offset.reset": "earliest"}


@pytest.fixture
def query_of(spark, tmp_path):
    """Make queries on one checkpoint, and close them at the end."""
    queries = []

    def make(topics, settings, **options):
        queries.append(KafkaQuery(spark, topics, settings, str(tmp_path / "checkpoint"), **options))
        return queries[-1]

    yield make
    for query in queries:
        query.close()


class Values:
    """Collects the values of each batch, as a batch's function."""

    def __init__(self):
        self.batches = {}

    def __call__(self, df, batch_id):
        """Keep a batch's values, in the place of those of an earlier try."""
        self.batches[batch_id] = [bytes(row.value) for row in df.orderBy("offset").collect()]

    def all(self):
        """Return the values of all batches."""
        return [value for batch in self.batches.values() for value in batch]


def test_a_query_resumes_where_its_checkpoint_ends(query_of, one, produce, settings):
    """Each record is in one batch, also when the program is started again."""
    values = Values()
    for count in (5, 3):
        produce(one, [b"%d" % number for number in range(count)])
        query = query_of([one], settings)
        query.foreachBatch(values)
        query.run(timeout=600)
        assert query.lag() == 0
    assert values.all() == [b"0", b"1", b"2", b"3", b"4", b"0", b"1", b"2"]
    assert query.ranges_of(1) == [OffsetRange(one, 0, 5, 8)]
    assert query.ranges_of(1)[0].topic_id == query.topic_ids()[one]
    with pytest.raises(StreamError, match="has no offsets/2"):
        query.ranges_of(2)


@pytest.mark.parametrize("version", ["1", "2"])
def test_both_formats_of_a_checkpoint_are_read(
    spark, query_of, one, produce, settings, request, version
):
    """A query reads its offsets in the format of any `offsetLog.formatVersion`."""
    name = "spark.sql.streaming.offsetLog.formatVersion"
    request.addfinalizer(lambda: spark.conf.unset(name))
    spark.conf.set(name, version)
    produce(one, [b"1", b"2", b"3"])
    values, query = Values(), query_of([one], settings)
    query.foreachBatch(values)
    query.run(timeout=600)
    assert values.all() == [b"1", b"2", b"3"]
    assert query.ranges_of(0) == [OffsetRange(one, 0, 0, 3)]


def test_of_queries_that_begin_a_checkpoint_together_one_is_refused(
    query_of, one, settings, monkeypatch
):
    """A query that finds its new checkpoint taken by another one is refused, with the remedy."""
    find = structured._starts

    def be_late(*arguments):
        monkeypatch.setattr(structured, "_starts", find)
        query_of([one], settings)
        return find(*arguments)

    monkeypatch.setattr(structured, "_starts", be_late)
    with pytest.raises(StreamError, match=r"another query has just begun .* separate checkpoint"):
        query_of([one], settings)


def test_a_checkpoint_is_at_exactly_its_path(spark, one, produce, settings, tmp_path):
    """A query resumes from a checkpoint whose path is a pattern to Spark, given as a `Path`."""
    values, checkpoint = Values(), tmp_path / "all [1]{a,b}*?\\,%20#:ü"
    for count in (5, 3):
        produce(one, [b"%d" % number for number in range(count)])
        with KafkaQuery(spark, [one], settings, checkpoint) as query:
            query.foreachBatch(values)
            query.run(timeout=600)
    assert values.all() == [b"0", b"1", b"2", b"3", b"4", b"0", b"1", b"2"]
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_a_service_runs_until_it_is_told_to_stop(query_of, one, produce, settings):
    """A query with an interval takes what arrives, and finishes the batch that it is at."""
    values, sent = Values(), []
    produce(one, [b"early"])
    query = query_of([one], settings)
    query.foreachBatch(values)

    def is_done():
        if values.all() and not sent:
            sent.append(produce(one, [b"late"]))
        return b"late" in values.all()

    query.run(until=is_done, timeout=600, interval=0.2)
    assert query.lag() == 0
    with pytest.raises(TimeoutError, match="was not done after 1 s and was stopped"):
        query.run(timeout=1, interval=0.2)


def test_a_second_query_on_a_checkpoint_does_not_end_the_first_in_silence(
    query_of, one, produce, settings
):
    """Spark stops the first query when the second starts; the first one's `run` says so."""
    produce(one, [b"1"])
    first, second, seen, errors = query_of([one], settings), query_of([one], settings), [], []

    def run_first():
        try:
            first.run(timeout=600, interval=0.2)
        except StreamError as error:
            errors.append(str(error))

    for query in (first, second):
        query.foreachBatch(lambda df, batch_id: seen.append(batch_id))
    thread = threading.Thread(target=run_first)
    thread.start()
    wait_until(first.finished)  # a batch that Spark has not committed belongs to the second one
    second.run(until=lambda: not thread.is_alive(), timeout=600, interval=0.2)
    thread.join()
    assert len(seen) == 1 and "another query starts with the same checkpoint" in errors[0]


def test_a_query_that_is_stopped_before_its_end_says_so(
    spark, query_of, one, produce, settings
):
    """A query that ends at the end of its topic, and was stopped before, has not just ended."""
    sent, values = [b"%02d" % number for number in range(20)], Values()
    produce(one, sent)
    query = query_of([one], settings, max_offsets=1)
    query.foreachBatch(values)

    def stop_the_first():
        for active in spark.streams.active if values.all() else ():
            active.stop()

    with pytest.raises(StreamError, match="was stopped from outside"):
        query.run(until=stop_the_first, timeout=600)
    assert len(values.all()) < len(sent)
    query.run(timeout=600)
    assert values.all() == sent


def test_an_interrupt_is_not_taken_for_an_answer_of_kafka(spark, one, settings):
    """Spark interrupts a query that it stops, and must find that in the error."""
    thread = spark._jvm.java.lang.Thread
    with contextlib.closing(KafkaClient(spark, settings)) as client:
        assert client.ends([TopicAndPartition(one, 0)]) == {TopicAndPartition(one, 0): 0}
        thread.currentThread().interrupt()
        try:
            with pytest.raises(JAVA_ERRORS, match="Interrupt") as interrupted:
                client.ends([TopicAndPartition(one, 0)])
        finally:
            thread.interrupted()  # or the next call of the tests would fail
    assert is_interrupt(interrupted.value)


def test_a_query_begins_where_it_began_first(query_of, one, produce, settings):
    """What arrives before the first batch is read after a crash, with ``latest`` as well."""
    produce(one, [b"old"] * 4)
    query_of([one], {**settings, "auto.offset.reset": "latest"})  # dies before it runs
    produce(one, [b"new"] * 2)
    values = Values()
    query = query_of([one], {**settings, "auto.offset.reset": "latest"})
    query.foreachBatch(values)
    query.run(timeout=600)
    assert values.all() == [b"new"] * 2


@pytest.mark.parametrize("reset", ["earliest", "latest"])
def test_a_query_on_a_topic_without_records_waits_for_the_first(
    query_of, one, produce, settings, reset
):
    """Spark's first batch of an empty topic has no records, and is nobody's business."""
    values, sent = Values(), []
    query = query_of([one], {**settings, "auto.offset.reset": reset})
    query.foreachBatch(values)

    def is_done():
        if query._batches_begun and not sent:
            sent.append(produce(one, [b"first"]))
        return values.all() == [b"first"]

    query.run(until=is_done, timeout=600, interval=0.2)


def test_a_partition_that_is_added_before_the_first_batch_is_read(
    kafka, query_of, one, settings
):
    """Spark wants to know where exactly the existing partitions begin."""
    query_of([one], {**settings, "auto.offset.reset": "latest"})  # dies before it runs
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.create_partitions({one: NewPartitions(2)})
    with KafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, metadata_max_age_ms=200
    ) as producer:
        wait_until(lambda: len(producer.partitions_for(one)) == 2)
        producer.send(one, b"early", partition=1).get(10)
    values = Values()
    query = query_of([one], {**settings, "auto.offset.reset": "latest"})
    query.foreachBatch(values)
    query.run(timeout=600)
    assert values.all() == [b"early"]


def test_positions_of_other_partitions_do_not_stop_a_query(query_of, one, produce, settings):
    """A topic that was created again with fewer partitions can be read into the same output."""
    produce(one, [b"x"] * 3)
    kept = {TopicAndPartition(one, 0): 0, TopicAndPartition(one, 3): 0,
            TopicAndPartition("another", 0): 5}  # fmt: skip
    values = Values()
    query = query_of([one], settings, positions=kept)
    query.foreachBatch(values)
    query.run(timeout=600)
    assert values.all() == [b"x"] * 3


def test_a_new_topic_of_a_known_output_begins_where_it_is_told(
    query_of, one, topic, produce, settings
):
    """With `latest`, a topic without positions begins at its end, and the others don't."""
    produce(one, [b"1"] * 3)
    query = query_of([one, topic], {**settings, "auto.offset.reset": "latest"},
                     positions={TopicAndPartition(topic, 0): 0})  # fmt: skip
    found = query.positions()
    assert found == {TopicAndPartition(one, 0): 3, TopicAndPartition(topic, 0): 0,
                     TopicAndPartition(topic, 1): 0}  # fmt: skip


def test_a_topic_that_is_added_before_the_first_batch_begins_at_its_position(
    query_of, one, topic, produce, settings
):
    """A checkpoint that knows some topics leaves the positions of others to the caller."""
    settings = {**settings, "auto.offset.reset": "latest"}
    produce(topic, [b"1"] * 3)
    query_of([one], settings)
    positions = {TopicAndPartition(topic, 0): 0, TopicAndPartition(topic, 1): 0}
    query = query_of([one, topic], settings, positions=positions)
    assert query.positions() == {TopicAndPartition(one, 0): 0, **positions}


def test_an_unfinished_batch_of_a_topic_that_is_left_out_is_named(
    query_of, one, topic, produce, settings, caplog
):
    """A query without one of its topics resumes only after the batch that has records of it."""
    settings = {**settings, "group.id": f"group-{uuid.uuid4()}"}
    for name in (one, topic):
        produce(name, [b"1"] * 3)

    def fail(df, batch_id):
        raise RuntimeError("planned, but not done")

    query, values = query_of([one, topic], settings), Values()
    query.foreachBatch(fail)
    with pytest.raises(StreamError, match="planned, but not done"):
        query.run(timeout=600)
    remedy = f"has records of {topic}: finish it with a query of the topics {one}, {topic}, or"
    with pytest.raises(StreamError, match=remedy):
        query_of([one], settings)
    query.foreachBatch(values)
    query.run(timeout=600)
    produce(one, [b"2"])
    query = query_of([one], settings)
    query.foreachBatch(values)
    query.run(timeout=600)
    assert values.all() == [*[b"1"] * 6, b"2"]
    assert {part.topic for part in query.positions()} == {one}
    assert {part.topic for part in query.ranges_of(0)} == {one, topic}
    assert "can't be committed" not in caplog.text


def test_a_batch_that_fails_once_is_tried_again(query_of, one, produce, settings):
    """What fails for a moment stops neither of Spark's streams."""
    produce(one, [b"x"] * 5)
    values, failures = Values(), []

    def fail_once(df, batch_id):
        if not failures:
            failures.append(batch_id)
            raise OSError("the disk is away")
        values(df, batch_id)

    query = query_of([one], settings)
    query.foreachBatch(fail_once)
    query.run(timeout=600)
    assert values.all() == [b"x"] * 5


def test_a_batch_that_fails_twice_stops_the_query_with_the_reason(
    query_of, one, produce, settings
):
    """The batch is not done, and comes again when the query does."""
    produce(one, [b"x"] * 5)
    query = query_of([one], settings)

    def fail(df, batch_id):
        raise ValueError("this cannot be scored")

    query.foreachBatch(fail)
    with pytest.raises(StreamError, match=r"the query stopped: .*this cannot be scored"):
        query.run(timeout=600)
    assert query.lag() == 5
    values = Values()
    query.foreachBatch(values)
    query.run(timeout=600)
    assert values.all() == [b"x"] * 5


def test_a_planned_batch_is_part_of_the_lag_after_a_restart(query_of, one, produce, settings):
    """A restarted query has the batch before it that it had planned and not finished."""
    produce(one, [b"x"] * 5)
    query = query_of([one], settings)

    def fail(df, batch_id):
        raise ValueError("this cannot be scored")

    query.foreachBatch(fail)
    with pytest.raises(StreamError, match="this cannot be scored"):
        query.run(timeout=600)
    values, restarted = Values(), query_of([one], settings)
    assert restarted.lag() == 5
    restarted.foreachBatch(values)
    restarted.run(until=lambda: restarted.lag() == 0, timeout=600, interval=0.2)
    assert values.all() == [b"x"] * 5


@pytest.fixture
def half_deleted(kafka, query_of, one, produce, settings):
    """A topic with a query of which 20 records were deleted after the query had read 10."""
    query = query_of([one], settings)
    produce(one, [b"%d" % number for number in range(10)])
    query.foreachBatch(Values())
    query.run(timeout=600)
    produce(one, [b"%d" % number for number in range(10, 50)])
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_records({TopicPartition(one, 0): 30})
    return one


def test_a_query_resumes_after_retention_and_reports_what_is_lost(
    query_of, half_deleted, settings, caplog
):
    """A query that was down for too long goes on, and says to the last event what is missing."""
    values = Values()
    query = query_of([half_deleted], settings)
    query.foreachBatch(values)
    with caplog.at_level(logging.WARNING):
        query.run(timeout=600)
    assert values.all() == [b"%d" % number for number in range(30, 50)]
    losses = [text for text in caplog.messages if "are lost" in text]
    assert len(losses) == 1 and losses[0].startswith("20 events of one-")
    assert "(offsets 10 to 29)" in losses[0]


@pytest.mark.parametrize("reset", ["earliest", "latest"])
def test_a_new_query_begins_at_what_retention_has_left(
    spark, half_deleted, settings, tmp_path, caplog, reset
):
    """A sink whose positions were deleted does not stop a query with a new checkpoint."""
    values, settings = Values(), {**settings, "auto.offset.reset": reset}
    positions = {TopicAndPartition(half_deleted, 0): 10}
    with KafkaQuery(spark, [half_deleted], settings, str(tmp_path / "new"), positions) as query:
        query.foreachBatch(values)
        query.run(timeout=600)
    assert values.all() == [b"%d" % number for number in range(30, 50)]
    assert "20 events of one-" in caplog.text


def test_with_none_a_loss_is_an_error(query_of, half_deleted, settings):
    """Those who can't go on without some events don't."""
    query = query_of([half_deleted], {**settings, "auto.offset.reset": "none"})
    query.foreachBatch(Values())
    with pytest.raises(StreamError, match="the query stopped"):
        query.run(timeout=600)


def test_a_topic_that_was_created_again_is_refused(kafka, query_of, half_deleted, settings):
    """A checkpoint's offsets are of one topic, not of a name."""
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_topics([half_deleted])
    wait_until(lambda: half_deleted not in kafka.topics())
    kafka.create_topic(half_deleted, partitions=1)
    with pytest.raises(StreamError, match=AGAIN):
        query_of([half_deleted], settings)


def test_a_topic_that_is_created_again_stops_a_running_query(
    kafka, query_of, one, produce, settings
):
    """The first records of the new topic are not taken for done."""
    values, made = Values(), []
    produce(one, [b"old"] * 5)
    query = query_of([one], settings)
    query.foreachBatch(values)

    def make_again():
        if len(values.all()) == 5 and not made:
            with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
                admin.delete_topics([one])
            wait_until(lambda: one not in kafka.topics())
            kafka.create_topic(one, partitions=1)
            made.append(produce(one, [b"new"] * 8))
        return False

    with pytest.raises(StreamError, match=f"{AGAIN}|doesn't exist|UnknownTopic"):
        query.run(until=make_again, timeout=600, interval=0.2)
    assert values.all() == [b"old"] * 5


def test_a_topic_that_is_created_again_before_the_sink_begins_is_refused(
    spark, kafka, query_of, one, produce, settings, tmp_path
):
    """The offsets of the old topic are not kept as those of the new one."""
    produce(one, [b"old"] * 5)
    query = query_of([one], {**settings, "auto.offset.reset": "latest"})
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_topics([one])
    wait_until(lambda: one not in kafka.topics())
    kafka.create_topic(one, partitions=1)
    with ParquetSink(spark, str(tmp_path / "scored"), signal_index=0) as sink:
        with pytest.raises(StreamError, match=AGAIN):
            score_stream(query, parse_events, sink)
        assert sink.positions() == {}


def test_a_query_with_two_sources_has_no_ranges(spark, kafka, produce, settings, tmp_path):
    """A batch that is known by one source's offsets only would look stored when half of it is."""
    names = [f"two-{uuid.uuid4()}" for _ in range(2)]
    for name in names:
        kafka.create_topic(name, partitions=1)
        produce(name, [b"x"] * 5)
    one, other = (read_stream(spark, [name], settings) for name in names)
    checkpoint = str(tmp_path / "two")
    query = one.union(other).agg(F.count("*")).writeStream.outputMode("complete").format("noop")
    query = query.option("checkpointLocation", checkpoint).trigger(availableNow=True).start()
    assert query.awaitTermination(600)
    with pytest.raises(StreamError, match=r"has 2 sources.*read all topics with one KafkaQuery"):
        CheckpointOffsets(spark, checkpoint).ranges_of(0)


@pytest.mark.parametrize("interval", [None, 0.2])
def test_a_query_skips_what_retention_deleted_in_a_long_break(
    query_of, kafka, topic, produce, settings, interval
):
    """Spark would plan many small batches of deleted offsets; the query skips them in one."""
    values, parts = Values(), [TopicPartition(topic, number) for number in (0, 1)]
    query = query_of([topic], settings, max_offsets=10)
    query.foreachBatch(values)
    keys = (b"1", b"2")  # of both partitions
    produce(topic, [b"first"] * 2, keys)
    query.run(timeout=600)
    produce(topic, [b"deleted"] * 2_000, keys * 1_000)
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_records(dict.fromkeys(parts, 1_001))
    produce(topic, [b"%d" % number for number in range(40)], keys * 20)
    resumed = query_of([topic], settings, max_offsets=10)
    resumed.foreachBatch(values)
    resumed.run(until=lambda: resumed.lag() == 0, timeout=600, interval=interval)
    assert sorted(values.all()) == sorted([b"first"] * 2 + [b"%d" % n for n in range(40)])
    sizes = [len(batch) for batch in values.batches.values()]
    assert len(sizes) <= 8 and max(sizes) <= 10 + len(parts)


@pytest.mark.parametrize("name", ["offsets/0", "sources/0/0"])
@pytest.mark.parametrize("left", ["", 'v1\n{"batchWatermarkMs"'])
def test_a_torn_checkpoint_is_called_damaged(
    query_of, one, produce, settings, tmp_path, name, left
):
    """Spark doesn't flush its files, so a power cut may leave them empty."""
    produce(one, [b"1", b"2", b"3"])
    query = query_of([one], settings)
    query.foreachBatch(Values())
    query.run(timeout=600)
    file = tmp_path / "checkpoint" / name
    file.with_name(f".{file.name}.crc").unlink(missing_ok=True)
    file.write_text(left)
    with pytest.raises(StreamError, match=f"is damaged: {name} is not complete.*new checkpoint"):
        query_of([one], settings).ranges_of(0)


@pytest.fixture
def own_kafka():
    """A broker that the test may kill, with a topic of ten records."""
    with LocalKafka() as broker:
        broker.create_topic("events", partitions=1)
        with KafkaProducer(bootstrap_servers=broker.bootstrap_servers) as producer:
            for number in range(10):
                producer.send("events", b"%d" % number).get(10)
        yield broker


IMPATIENT = {"request.timeout.ms": "6000", "default.api.timeout.ms": "6000"}


def servers_of(broker):
    """Return the settings of a query that notices within six seconds that a broker is away."""
    servers = {"bootstrap.servers": broker.bootstrap_servers, "auto.offset.reset": "earliest"}
    return {**servers, **IMPATIENT}


def test_a_broker_that_comes_back_changes_no_total(query_of, own_kafka, caplog):
    """A broker's restart costs time, but neither events nor the query."""
    query = query_of(["events"], servers_of(own_kafka))
    values, killed = Values(), []
    query.foreachBatch(values)

    def restart():
        wait_until(lambda: "The query waits for" in caplog.text, 120)
        own_kafka.start()
        with KafkaProducer(bootstrap_servers=own_kafka.bootstrap_servers) as producer:
            producer.send("events", b"10").get(30)

    trouble = threading.Thread(target=restart)

    def is_done():
        if len(values.all()) == 10 and not killed:
            killed.append(own_kafka.kill())
            trouble.start()
        return query.lag() == 0 and len(values.all()) == 11  # the first of which asks Kafka

    query.run(until=is_done, timeout=300, interval=0.5)
    trouble.join(60)
    assert values.all() == [b"%d" % number for number in range(11)]


@pytest.mark.long
def test_two_short_outages_are_not_taken_for_a_long_one(
    query_of, own_kafka, monkeypatch, caplog
):
    """A query on a quiet topic outlives each outage, however much time is between them."""
    monkeypatch.setattr(structured, "AWAY_SECONDS", 40)
    query = query_of(["events"], servers_of(own_kafka))
    query.foreachBatch(Values())

    def go_away_twice():
        for number in (1, 2):
            began = time.monotonic()
            wait_until(query.finished, 120)
            wait_until(lambda began=began: time.monotonic() > began + 45)
            own_kafka.kill()
            wait_until(lambda n=number: caplog.text.count("The query waits for") >= n, 120)
            own_kafka.start()

    trouble = threading.Thread(target=go_away_twice)
    trouble.start()
    query.run(until=lambda: not trouble.is_alive() and query.lag() == 0, timeout=300, interval=0.5)
    assert "KafkaTable" not in caplog.text  # the query's plan, which says nothing of the outage


@pytest.mark.long
def test_a_batch_that_is_done_is_not_repeated_because_the_broker_goes_away(
    query_of, own_kafka
):
    """What Kafka can't say any more after a batch is of no importance to it."""
    query = query_of(["events"], servers_of(own_kafka))
    calls = []

    def lose_the_broker(df, batch_id):
        calls.append(df.count())
        own_kafka.kill()

    query.foreachBatch(lose_the_broker)
    query.run(until=lambda: calls and query.finished(), timeout=600, interval=0.5)
    own_kafka.start()
    query.run(timeout=600)
    assert calls == [10]


def test_a_deadline_ends_the_batch_that_runs_and_it_is_not_tried_again(
    query_of, spark, one, produce, settings
):
    """A batch that takes too long is ended, and comes again when the query does."""
    produce(one, [b"x"])
    begun, calls = threading.Event(), []
    query = query_of([one], settings)

    def wait_in_spark(df, batch_id):
        calls.append(batch_id)
        begun.set()
        df.rdd.foreach(lambda row: time.sleep(300))

    query.foreachBatch(wait_in_spark)
    with pytest.raises(TimeoutError, match="was not done after 1 s"):
        query.run(until=lambda: not begun.wait(600), timeout=1)
    wait_until(lambda: not spark.sparkContext.statusTracker().getActiveJobsIds())
    assert calls == [0]
    assert query.lag() == 1


@pytest.mark.long
def test_a_broker_that_stays_away_is_an_error_in_time(query_of, own_kafka, monkeypatch):
    """A query without a broker does not hang, and says what it waited for."""
    monkeypatch.setattr(structured, "AWAY_SECONDS", 1)
    query = query_of(["events"], servers_of(own_kafka))
    values, killed = Values(), []
    query.foreachBatch(values)

    def kill():
        if values.all() and not killed:
            killed.append(own_kafka.kill())
        return False

    with pytest.raises(StreamError, match="the broker has been away for 1 s"):
        query.run(until=kill, timeout=300, interval=0.5)


@pytest.mark.long
@pytest.mark.parametrize("ending", ["until", "timeout"])
def test_a_query_that_waits_for_its_broker_can_be_ended(
    query_of, own_kafka, caplog, monkeypatch, ending
):
    """A job is stopped at once by SIGTERM, and a deadline holds, also while the broker is away."""
    query = query_of(["events"], servers_of(own_kafka))
    values, killed, waited = Values(), [], []
    query.foreachBatch(values)
    monkeypatch.setattr(structured, "AWAY_SECONDS", 600)

    def is_over():
        if values.all() and not killed:
            killed.append(own_kafka.kill())
        if "The query waits for" in caplog.text and not waited:
            waited.append(time.monotonic())
        return ending == "until" and bool(waited)

    if ending == "until":
        query.run(until=is_over, timeout=300, interval=0.5)
    else:
        with pytest.raises(TimeoutError, match="was not done after 90 s"):
            query.run(until=is_over, timeout=90, interval=0.5)
    assert waited


def counted(spark, query_of, topic, settings, path, before=lambda: None, monitor=None):
    """Run a query into a sink with a monitor; return the totals and the number of stored events."""
    monitor = monitor or Monitor()

    def score(records):
        before()
        events = parse_events(records)
        vector = array_to_vector(F.array(F.lit(0.75), F.lit(0.25)))
        good = F.col("event.reason").isNull()
        return events.withColumn("prediction", F.when(good, vector)).withColumn(
            "predicted_index", F.when(good, F.lit(0.0))
        )

    with (
        ParquetSink(spark, path, signal_index=0, on_bad_record="skip") as sink,
        query_of([topic], settings) as query,
        contextlib.suppress(StreamError),
        monitor.follow(spark),
    ):
        score_stream(query, score, sink, monitor)
        query.run(timeout=300)
    return monitor.totals(), read_scored(spark, path).count()


def events_of(count):
    """Return generated events as records."""
    columns = ["EventId", *FEATURES]
    rows = generate_events(count, seed=1)[columns].to_dict("records")
    return [json.dumps(row).encode() for row in rows]


def test_the_lag_has_what_arrived_while_the_batch_ran(
    spark, query_of, one, produce, settings, tmp_path
):
    """A stream that can't keep up is seen by its lag, which Spark's own report shows as 0."""
    produce(one, events_of(50))
    monitor, path = Monitor(), str(tmp_path / "scored")
    counted(spark, query_of, one, settings, path, lambda: produce(one, [b"1"] * 7), monitor)
    assert [(batch.events, batch.lag) for batch in monitor.batches] == [(50, 7)]


@pytest.mark.long
def test_a_batch_that_is_repeated_after_a_restart_is_in_the_totals(
    spark, query_of, one, produce, settings, tmp_path
):
    """It is counted in the run that stores it."""
    produce(one, events_of(50))
    tries = itertools.count()

    def fail():
        if next(tries) < 2:
            raise OSError("for a moment")

    path = str(tmp_path / "scored")
    totals, stored = counted(spark, query_of, one, settings, path, fail)
    assert (totals["events"], stored) == (0, 0)
    totals, stored = counted(spark, query_of, one, settings, path, fail)
    assert (totals["events"], stored) == (50, 50)


def test_a_broker_that_is_away_after_a_commit_changes_no_total(
    spark, query_of, one, produce, settings, tmp_path, monkeypatch
):
    """The batch is stored by then, so it is counted, only without a lag."""
    produce(one, events_of(50))
    away = iter([True])

    def lag_after(self, batch_id):
        if next(away, False):
            raise BrokerAwayError("the broker gives no answer.")
        return 0

    monkeypatch.setattr(KafkaQuery, "lag_after", lag_after)
    totals, stored = counted(spark, query_of, one, settings, str(tmp_path / "scored"))
    assert (totals["events"], stored) == (50, 50)


def test_a_batch_that_misses_its_broker_is_not_tried_at_once(
    query_of, one, produce, settings, caplog
):
    """Another try would wait as long; the query waits for the broker, and repeats the batch."""
    produce(one, [b"1"])
    calls = []

    def fail_once(df, batch_id):
        calls.append(batch_id)
        if len(calls) == 1:
            raise BrokerAwayError("the broker gives no answer.")

    query = query_of([one], settings)
    query.foreachBatch(fail_once)
    query.run(timeout=300)
    assert calls == [0, 0] and query.finished()
    assert "is retried" not in caplog.text


def test_a_checkpoint_that_is_ahead_of_the_output_is_refused(
    spark, query_of, one, produce, settings, tmp_path
):
    """Without the output, the finished batches would never be stored again."""
    produce(one, events_of(20))
    path = str(tmp_path / "scored")
    assert counted(spark, query_of, one, settings, path)[1] == 20
    shutil.rmtree(path)
    produce(one, events_of(5))
    with pytest.raises(SinkError, match="the checkpoint is ahead of"):
        counted(spark, query_of, one, settings, path)


@pytest.mark.long
def test_a_broker_that_goes_away_during_a_batch_ends_the_query_in_time(
    query_of, own_kafka, monkeypatch
):
    """It ends after the same time as between batches, and not after all tries of Spark's tasks."""
    monkeypatch.setattr(structured, "AWAY_SECONDS", 1)
    monkeypatch.setattr(structured, "ABANDON_SECONDS", 1)
    monkeypatch.setattr(structured, "_ASK_SECONDS", 0.5)
    released = threading.Event()
    query = query_of(["events"], servers_of(own_kafka))
    query.foreachBatch(lambda *_: (own_kafka.kill(), released.wait(600)))
    try:
        with pytest.raises(StreamError, match="the broker has been away for 1 s"):
            query.run(timeout=300)
    finally:
        released.set()


def test_a_query_can_be_closed_twice(query_of, one, settings):
    """The end of a `with` block closes what was closed before."""
    query = query_of([one], {**settings, "group.id": "closed-twice"})
    query.close()
    query.close()


@pytest.mark.long
def test_a_function_that_never_returns_does_not_hold_the_stop(
    topic, produce, settings, query_of, monkeypatch, caplog
):
    """A query whose function hangs ends in time with an error, and its batch isn't committed.

    Another run in the same process is refused, and doesn't wait for that function either.
    """
    monkeypatch.setattr(structured, "ABANDON_SECONDS", 1)
    begun, released = threading.Event(), threading.Event()
    produce(topic, [b"x"] * 3)
    query = query_of([topic], settings)
    query.foreachBatch(lambda *_: (begun.set(), released.wait(600)))
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(TimeoutError, match="was not done"):
            query.run(timeout=15)
        assert begun.is_set() and not query.finished()
        assert "its function doesn't return" in caplog.text
        with pytest.raises(StreamError, match=r"has not ended: .* Restart Python"):
            query.run(timeout=15)
    finally:
        released.set()


def test_sparks_log_does_not_grow_while_batches_take_longer_than_the_interval(
    spark, topic, settings
):
    """A query that can't keep up has no line per batch in Spark's log, which isn't rotated."""
    log4j = spark._jvm.org.apache.logging.log4j
    name = "org.apache.spark.sql.execution.streaming.runtime.ProcessingTimeExecutor"
    assert spark._jvm.java.lang.Class.forName(name)
    log4j.core.config.Configurator.setLevel(name, log4j.Level.WARN)
    read_stream(spark, [topic], settings)
    assert log4j.LogManager.getLogger(name).getLevel().toString() == "ERROR"


def test_an_older_sparks_log_does_not_grow_with_each_record(spark, topic, settings, monkeypatch):
    """Spark 3.5 would write a warning for each record that a query passes to Python."""
    monkeypatch.setitem(vars(spark), "version", "3.5.7")
    log4j = spark._jvm.org.apache.logging.log4j
    name = "org.apache.spark.sql.kafka010.consumer.KafkaDataConsumer"
    log4j.core.config.Configurator.setLevel(name, log4j.Level.WARN)
    read_stream(spark, [topic], settings)
    assert log4j.LogManager.getLogger(name).getLevel().toString() == "ERROR"
