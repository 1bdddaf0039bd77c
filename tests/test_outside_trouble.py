"""Trouble from outside the stream: brokers that go away, and topics that may not be read."""

import json
import re
import threading
import time
import uuid
from datetime import datetime

import pytest
from kafka import KafkaAdminClient, KafkaProducer
from kafka.admin import ACL, ACLOperation, ACLPermissionType, ResourcePattern, ResourceType
from processes import run_python, wait_until
from pyspark.sql import functions as F
from pyspark.streaming import StreamingContext

from helpers.broker import LocalKafka
from helpers.streaming import (
    KafkaUtils,
    StreamError,
    client,
    errors,
    new_streaming_context,
    recovery,
    run_stream,
    source,
)

RECORDS = 20_000  # several Arrow batches


@pytest.fixture
def own_kafka():
    """A broker that the test may kill, with a topic of one partition."""
    with LocalKafka() as broker:
        broker.create_topic("events", partitions=1)
        with KafkaProducer(bootstrap_servers=broker.bootstrap_servers, linger_ms=50) as producer:
            for number in range(RECORDS):
                producer.send("events", str(number).encode().rjust(200))
        yield broker


def settings(kafka, **more):
    """A stream's settings: from the beginning, in a new consumer group."""
    return {
        "bootstrap.servers": kafka.bootstrap_servers,
        "group.id": f"group-{uuid.uuid4()}",
        "auto.offset.reset": "earliest",
        **more,
    }


def committed(kafka, group):
    """Ask Kafka for the group's offset in the only partition."""
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        (offset,) = admin.list_group_offsets([group])[group].values()
    return offset.offset


class Slow:
    """Collects a stream's numbers, but stops in the middle of a batch until it is told to go on."""

    def __init__(self, folder):
        self.begun, self.go_on = folder / "begun", folder / "go-on"
        self.numbers = []

    def process(self, df, batch_id):
        """Collect a batch."""
        begun, go_on = self.begun, self.go_on

        def wait(batches):
            for batch in batches:
                begun.touch()
                deadline = time.monotonic() + 60
                while not go_on.exists() and time.monotonic() < deadline:
                    time.sleep(0.05)
                yield batch

        values = df.select(F.trim(df.value.cast("string")).cast("int").alias("number"))
        rows = values.mapInPandas(wait, "number int").collect()
        self.numbers.extend(row.number for row in rows)


# So small that a batch takes many requests, and the broker is missed in the middle of it.
IN_SMALL_PIECES = {"max.partition.fetch.bytes": "20000", "max.poll.records": "40"}


def test_a_broker_that_comes_back_changes_no_total(spark, own_kafka, tmp_path, monkeypatch):
    """A restart of the broker loses no event, repeats none, and doesn't end the stream."""
    for module in (source, errors):  # a busy machine may take minutes
        monkeypatch.setattr(module, "AWAY_SECONDS", 600)
    options = settings(own_kafka, **IN_SMALL_PIECES)
    ssc = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(ssc, ["events"], options)
    slow = Slow(tmp_path)
    stream.foreachBatch(slow.process)

    def restart():
        wait_until(slow.begun.exists)
        own_kafka.kill()
        slow.go_on.touch()
        wait_until(lambda: stream._batches.is_waiting)
        own_kafka.start()

    trouble = threading.Thread(target=restart)
    trouble.start()
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=900)
    trouble.join(60)
    assert slow.numbers == list(range(RECORDS))
    assert committed(own_kafka, options["group.id"]) == RECORDS


def test_with_a_long_interval_two_short_outages_are_not_taken_for_a_long_one(
    spark, topic, produce, kafka, monkeypatch
):
    """The broker is asked again within an interval, not only in the next one."""
    monkeypatch.setattr(source, "AWAY_SECONDS", 1)
    monkeypatch.setattr(source, "ANSWER_SECONDS", 0)
    ssc = new_streaming_context(spark, 3_600)
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings(kafka))
    batches, pause, failing = stream._batches, threading.Event(), []
    next_batch = batches.source.planner.next_batch

    def next_batch_later(limit):
        if failing:
            raise failing.pop()
        return next_batch(limit)

    monkeypatch.setattr(batches.source.planner, "next_batch", next_batch_later)
    for interval in (3_600_000, 7_200_000):
        produce(topic, [b"1"] * 5)
        failing.append(errors.BrokerAwayError("no answer"))
        batches.source.plan(interval)
        assert sum(part.count() for part in batches.ledger.ranges(interval)) == 5
        pause.wait(1.5)


def test_a_graceful_stop_does_not_wait_for_a_broker_that_is_away(
    spark, topic, kafka, monkeypatch
):
    """With a long interval, in which the broker is asked again and again."""
    ssc = new_streaming_context(spark, 3_600)
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings(kafka))
    batches, asked = stream._batches, threading.Event()

    def next_batch(limit):
        asked.set()
        raise errors.BrokerAwayError("no answer")

    monkeypatch.setattr(batches.source.planner, "next_batch", next_batch)
    planning = threading.Thread(target=batches.plan, args=(datetime.fromtimestamp(3_600), None))
    planning.start()
    assert asked.wait(60)
    assert batches.finish(300)
    planning.join()
    assert batches.error is None


@pytest.mark.long
def test_a_broker_that_stays_away_is_an_error_in_time(spark, own_kafka, tmp_path, monkeypatch):
    """The stream stops after its deadline, and names the reason."""
    monkeypatch.setattr(errors, "AWAY_SECONDS", 1)  # of a commit
    monkeypatch.setattr(source, "AWAY_SECONDS", 1)  # of a plan
    options = settings(own_kafka, **IN_SMALL_PIECES)
    ssc = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(ssc, ["events"], options)
    slow = Slow(tmp_path)
    stream.foreachBatch(slow.process)

    def vanish():
        wait_until(slow.begun.exists)
        own_kafka.kill()
        slow.go_on.touch()

    trouble = threading.Thread(target=vanish)
    trouble.start()
    with pytest.raises(StreamError, match=r"has been away for 1 s.*check the address"):
        run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
    trouble.join(60)
    assert slow.numbers == []
    wait_until(lambda: not spark.sparkContext.statusTracker().getActiveJobsIds())
    own_kafka.start()
    assert committed(own_kafka, options["group.id"]) == 0

    again = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(again, ["events"], options)
    stream.foreachBatch(slow.process)
    run_stream(again, until=lambda: stream.lag() == 0, timeout=180)
    assert slow.numbers == list(range(RECORDS))


@pytest.fixture
def checkpointed(spark, own_kafka, tmp_path, monkeypatch):
    """Set up a stream with a checkpoint, or recover it from there, as `getOrCreate` does."""
    # Short answers, so that an outage of the broker is noticed within a second.
    monkeypatch.setattr(client, "ANSWER_SECONDS", 1)
    numbers = []

    def set_up():
        ssc = new_streaming_context(spark, 0.5)
        servers = {"bootstrap.servers": own_kafka.bootstrap_servers, "auto.offset.reset": "latest"}
        stream = KafkaUtils.createDirectStream(ssc, ["events"], servers)
        stream.foreachRDD(lambda rdd: numbers.extend(int(value) for _, value in rdd.collect()))
        ssc.checkpoint(str(tmp_path / "checkpoint"))
        return ssc

    def get_or_create():
        return StreamingContext.getOrCreate(str(tmp_path / "checkpoint"), set_up)

    return get_or_create, numbers


def planned_offsets(folder):
    """Return the offsets in the plans of a checkpoint."""
    files = folder.glob("checkpoint/kafka-plans/*/[0-9]*.json")  # a file in the making has a dot
    plans = [json.loads(file.read_text()) for file in files]
    ranges = [part for plan in plans for part in plan["ranges"]]
    return sorted(offset for _, _, start, end, _ in ranges for offset in range(start, end))


@pytest.mark.long
def test_a_stream_whose_broker_goes_away_at_once_begins_where_it_was_told(
    own_kafka, checkpointed, tmp_path
):
    """The first interval writes down where the stream begins, whether or not Kafka answers."""
    get_or_create, _ = checkpointed
    first = get_or_create()
    own_kafka.kill()
    with pytest.raises(TimeoutError, match="Its broker gives no answer"):
        run_stream(first, until=lambda: False, timeout=8)
    assert len(list(tmp_path.glob("checkpoint/kafka-plans/*/*.json"))) == 1
    own_kafka.start()
    with KafkaProducer(bootstrap_servers=own_kafka.bootstrap_servers) as producer:
        producer.send("events", str(RECORDS).encode()).get(30)
    run_stream(get_or_create(), until=lambda: planned_offsets(tmp_path) == [RECORDS], timeout=600)


@pytest.mark.long
def test_a_recovery_that_fails_is_tried_again_in_the_same_process(
    own_kafka, checkpointed, tmp_path, monkeypatch
):
    """A notebook's cell that found no broker works when it is run again."""
    get_or_create, _ = checkpointed
    first = get_or_create()
    run_stream(first, until=lambda: list(tmp_path.glob("checkpoint/checkpoint-*")), timeout=600)
    own_kafka.kill()
    with monkeypatch.context() as impatient:
        impatient.setattr(errors, "AWAY_SECONDS", 1)
        with pytest.raises(StreamError, match="the next batch can't be planned"):
            run_stream(get_or_create(), until=lambda: False, timeout=600)
    own_kafka.start()
    with KafkaProducer(bootstrap_servers=own_kafka.bootstrap_servers) as producer:
        producer.send("events", str(RECORDS).encode()).get(30)
    run_stream(get_or_create(), until=lambda: planned_offsets(tmp_path) == [RECORDS], timeout=600)


@pytest.mark.long
def test_old_plans_that_cannot_be_removed_do_not_stop_the_stream(
    own_kafka, checkpointed, tmp_path, monkeypatch, caplog
):
    """Plans that nobody needs any more take some room, and nothing worse."""
    monkeypatch.setattr(recovery, "KEPT_SECONDS", 0)
    get_or_create, numbers = checkpointed
    stuck, sent = [], []

    def send_another():
        sent.append(RECORDS + len(sent))
        with KafkaProducer(bootstrap_servers=own_kafka.bootstrap_servers) as producer:
            producer.send("events", str(sent[-1]).encode()).get(30)

    def is_done():
        plans = sorted(tmp_path.glob("checkpoint/kafka-plans/*/*.json"))
        if len(plans) > 1 and not stuck:  # a folder that isn't empty can't be removed as a file
            stuck.append(plans[0].rename(tmp_path / "first-plan"))
            plans[0].mkdir()
            (plans[0] / "something").touch()
        if plans and len(numbers) == len(sent):
            if "can't be removed" in caplog.text:
                return True
            send_another()
        return False

    ssc = get_or_create()
    run_stream(ssc, until=is_done, timeout=600)
    assert numbers == sent


@pytest.fixture
def forbid(kafka):
    """Take a permission for a topic, or a group, from everybody, until the test ends."""
    rules = []

    def forbid(operation, name, kind=ResourceType.TOPIC):
        rule = ACL(
            principal="User:*", host="*", operation=operation,
            permission_type=ACLPermissionType.DENY, resource_pattern=ResourcePattern(kind, name),
        )  # fmt: skip
        rules.append(rule)
        with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
            admin.create_acls([rule])

    yield forbid
    # A producer of kafka-python that has written to a topic which it may no longer see asks for it
    # again and again, without a pause: a whole core, for as long as the tests run.
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_acls(rules)


@pytest.mark.long
def test_a_deadline_that_passes_while_the_broker_is_away_names_the_broker(
    spark, own_kafka, monkeypatch
):
    """The error of `run_stream` has the true reason."""
    monkeypatch.setattr(client, "ANSWER_SECONDS", 1)
    ssc = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(ssc, ["events"], settings(own_kafka))
    stream.foreachBatch(lambda df, batch_id: None)
    own_kafka.kill()
    with pytest.raises(TimeoutError, match=r"was stopped.*Its broker gives no answer"):
        run_stream(ssc, until=lambda: False, timeout=25)


STREAM_IN_LITTLE_MEMORY = """
import sys
from helpers.spark import get_spark
from helpers.streaming import KafkaUtils, new_streaming_context, run_stream

spark = get_spark(cores=1, memory="500m", config={"spark.ui.enabled": "false"})
ssc = new_streaming_context(spark, 0.5)
settings = {"bootstrap.servers": sys.argv[1], "auto.offset.reset": "earliest"}
stream = KafkaUtils.createDirectStream(ssc, [sys.argv[2]], settings)
stream.foreachBatch(lambda df, batch_id: df.write.format("noop").mode("overwrite").save())
run_stream(ssc, until=lambda: stream.lag() == 0, timeout=300)
"""


@pytest.mark.long
def test_a_java_that_runs_out_of_memory_is_named(kafka, topic):
    """Whoever reads 'connection refused' would look for the fault in the network."""
    with KafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, compression_type="gzip",
        max_request_size=2**26,
    ) as producer:  # fmt: skip
        for _ in range(40):
            producer.send(topic, bytes(30_000_000), key=b"same").get(30)
    run = run_python(
        "-c", STREAM_IN_LITTLE_MEMORY, kafka.bootstrap_servers, topic, seconds=600
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert re.search(r"StreamError: Java ran out of memory.*get_spark\(memory=", last), run.stderr


def test_a_topic_that_may_not_be_seen_is_an_error_at_once(spark, kafka, topic, produce, forbid):
    """The missing right is named when the stream is created."""
    produce(topic, [b"1"])
    forbid(ACLOperation.DESCRIBE, topic)
    ssc = new_streaming_context(spark, 0.5)
    with pytest.raises(StreamError, match=r"refuses: .*the ACLs READ and DESCRIBE on"):
        KafkaUtils.createDirectStream(ssc, [topic], settings(kafka))


def test_a_group_that_may_not_be_used_is_an_error_at_once(spark, kafka, topic, produce, forbid):
    """The missing right is named before a batch is scored that can't be committed."""
    produce(topic, [b"1"])
    options = settings(kafka)
    forbid(ACLOperation.READ, options["group.id"], ResourceType.GROUP)
    ssc = new_streaming_context(spark, 0.5)
    with pytest.raises(StreamError, match="the ACL READ on the consumer group is needed"):
        KafkaUtils.createDirectStream(ssc, [topic], options)


def test_a_topic_that_may_not_be_read_stops_the_stream(spark, kafka, topic, produce, forbid):
    """The stream doesn't wait for records that never come, and commits nothing."""
    produce(topic, [b"1"])
    ssc = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings(kafka))
    forbid(ACLOperation.READ, topic)
    counts = []
    stream.foreachBatch(lambda df, batch_id: counts.append(df.collect()))
    with pytest.raises(StreamError, match="the ACLs READ and DESCRIBE on the topic are needed"):
        run_stream(ssc, until=lambda: stream.lag() == 0, timeout=600)
    assert counts == []
