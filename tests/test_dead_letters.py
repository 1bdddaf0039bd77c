"""Dead letters: each that Kafka takes arrives, and none that it doesn't take stops the others."""

import logging
import os
import time
import uuid

import pytest
from kafka import KafkaAdminClient, KafkaConsumer
from kafka.admin import ConfigResource
from processes import ROOT, run_python
from pyspark.sql import functions as F
from test_sinks import rows
from topics import read_to_end

from helpers.broker import LocalKafka, count_records
from helpers.sinks import (
    ParquetSink,
    dead_letters,
    prepare_dead_letters,
    read_bad_records,
    send_dead_letters,
)
from helpers.streaming import OffsetRange, StreamError, TopicAndPartition

MIB = 1024**2


def bad_rows(spark, topic, values):
    """Return bad records of a topic as a sink hands them on, at the offsets of their values."""
    columns = "topic string, partition int, offset long, event_time timestamp, "
    columns += "bad struct<key: binary, value: binary, reason: string>"
    stored = [(topic, 0, n, None, (b"key", value, "why")) for n, value in enumerate(values)]
    return spark.createDataFrame(stored, columns)


def letter_sink(spark, folder, settings):
    """Return a sink that sends bad records to Kafka."""
    return ParquetSink(
        spark, str(folder), signal_index=0, on_bad_record="dead-letter", settings=settings
    )


def consume(kafka, topic, count):
    """Return the records of a topic."""
    found = read_to_end(kafka, topic, max_partition_fetch_bytes=32 * MIB)
    assert len(found) == count
    return found


@pytest.fixture
def settings(kafka):
    """A client's settings."""
    return {"bootstrap.servers": kafka.bootstrap_servers, "group.id": "not for a producer"}


def test_letters_change_nothing_for_a_query_that_is_planned_meanwhile(
    spark, topic, settings, tmp_path, monkeypatch
):
    """Bad records are read row by row in a separate session."""
    seen, send = [], dead_letters._send

    def look(messages, *others):
        setting = spark.conf.get("spark.sql.parquet.enableVectorizedReader")
        seen.append((messages.sparkSession is spark, setting))
        send(messages, *others)

    monkeypatch.setattr(dead_letters, "_send", look)
    with letter_sink(spark, tmp_path, settings) as sink:
        sink.begin({}, {topic: "the-id"})
        sink.write(rows(spark, 0, 10, bad=[3], topic=topic), [OffsetRange(topic, 0, 0, 10)])
    assert seen == [(False, "true")]


def test_a_dead_letter_has_all_that_the_record_was(spark, kafka, topic, settings, tmp_path):
    """Its topic's identity among it: the same offset of another topic is another record."""
    with letter_sink(spark, tmp_path, settings) as sink:
        sink.begin({}, {topic: "the-id"})
        sink.write(rows(spark, 0, 10, bad=[3], topic=topic), [OffsetRange(topic, 0, 0, 10)])
    (letter,) = consume(kafka, f"{topic}.dead-letter", 1)
    assert (letter.key, letter.value) == (b"key", b"\xffrubbish")
    assert {name: value.decode() for name, value in letter.headers} == {
        "topic": topic, "topic-id": "the-id", "partition": "0", "offset": "3",
        "timestamp": "1700000000003", "reason": "it is no JSON",
    }  # fmt: skip


def test_a_letter_as_large_as_its_topic_takes_arrives(spark, kafka, settings):
    """A topic for large messages has large dead letters, and the headers have room beside them."""
    topic = f"large-{uuid.uuid4()}"
    kafka.create_topic(topic, partitions=3, config={"max.message.bytes": 5 * MIB})
    value = os.urandom(5 * MIB - 200)
    assert send_dead_letters(bad_rows(spark, topic, [value, b"x"]), settings, {topic: None}) == 0
    letters = consume(kafka, f"{topic}.dead-letter", 2)
    assert {letter.value for letter in letters} == {value, b"x"}


def test_a_letter_that_only_compression_makes_small_arrives(spark, kafka, topic, settings):
    """What a producer could send with compression can be a dead letter, too."""
    values = [b"rubbish" * (3 * MIB // 7), os.urandom(MIB // 2), None]
    assert send_dead_letters(bad_rows(spark, topic, values), settings, {topic: None}) == 0
    letters = consume(kafka, f"{topic}.dead-letter", 3)
    assert sorted(len(letter.value or b"") for letter in letters) == sorted(
        len(value or b"") for value in values
    )


@pytest.mark.parametrize("codec", ["zstd", "uncompressed"])
def test_a_letter_that_is_too_large_stops_no_other(
    spark, kafka, topic, settings, tmp_path, caplog, codec
):
    """It is counted, named, and kept in the files, and the stream goes on."""
    limits = {"max.message.bytes": 10_000, "compression.type": codec}
    kafka.create_topic(f"{topic}.dead-letter", partitions=1, config=limits)
    bad = rows(spark, 0, 3, bad=[0, 1, 2], topic=topic)
    filler = {"zstd": os.urandom(50_000), "uncompressed": b"x" * 50_000}[codec]
    value = F.when(F.col("offset") == 1, F.lit(filler)).otherwise(F.col("bad.value"))
    bad = bad.withColumn("bad", F.col("bad").withField("value", value))
    with letter_sink(spark, tmp_path, settings) as sink:
        sink.begin({}, {topic: "the-id"})
        with caplog.at_level(logging.ERROR):
            sink.write(bad, [OffsetRange(topic, 0, 0, 3)])
        assert sink.positions() == {TopicAndPartition(topic, 0): 3}
    letters = consume(kafka, f"{topic}.dead-letter", 2)
    assert {dict(letter.headers)["offset"] for letter in letters} == {b"0", b"2"}
    assert f"{topic}, partition 0, offset 1 is in the sink's files only: it is too" in caplog.text
    assert read_bad_records(spark, str(tmp_path)).count() == 3


@pytest.mark.parametrize("policy, kept", [("delete", "864000000"), ("compact", "-1")])
def test_the_topic_for_letters_is_made_like_the_one_they_are_of(
    spark, kafka, settings, policy, kept
):
    """With its partitions, for messages as large as the source's, kept at least as long."""
    topic = f"source-{uuid.uuid4()}"
    limits = {"max.message.bytes": 2 * MIB, "retention.ms": 864_000_000, "cleanup.policy": policy}
    limits["retention.bytes"] = 10 * MIB
    kafka.create_topic(topic, partitions=3, config=limits)
    found = prepare_dead_letters(spark, [topic], settings)
    assert 2 * MIB < found[topic].limit < 2.1 * MIB
    with KafkaConsumer(bootstrap_servers=kafka.bootstrap_servers) as consumer:
        assert consumer.partitions_for_topic(f"{topic}.dead-letter") == {0, 1, 2}
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        resource = ConfigResource("TOPIC", f"{topic}.dead-letter")
        configs = admin.describe_configs([resource], config_filter="all")["topic"]
    assert configs[f"{topic}.dead-letter"]["retention.ms"]["value"] == kept
    assert configs[f"{topic}.dead-letter"]["retention.bytes"]["value"] == "-1"
    assert prepare_dead_letters(spark, [topic], settings) == found


def test_settings_of_every_client_are_taken(spark, kafka, topic, settings):
    """One dictionary is for consumer, producer and administrator."""
    more = {
        **settings, "max.request.size": "2000000", "auto.offset.reset": "earliest",
        "compression.type": "gzip", "enable.auto.commit": "false", "transactional.id": "x",
    }  # fmt: skip
    values = [b"x" * 3 * MIB, b"y"]
    assert send_dead_letters(bad_rows(spark, topic, values), more, {topic: None}) == 0
    consume(kafka, f"{topic}.dead-letter", 2)


def test_a_missing_topic_is_said_at_the_start(spark, settings):
    """A typo makes no topic for dead letters."""
    with pytest.raises(StreamError, match="topic 'no-such' doesn't exist: check its name"):
        prepare_dead_letters(spark, ["no-such"], settings)


def test_a_compacted_topic_is_no_place_for_letters(spark, kafka, topic, settings, caplog):
    """Letters with the same key would replace each other; those without one are refused."""
    kafka.create_topic(f"{topic}.dead-letter", config={"cleanup.policy": "compact"})
    with pytest.raises(StreamError, match="is compacted, so dead letters would be lost: set"):
        prepare_dead_letters(spark, [topic], settings)
    bad = bad_rows(spark, topic, [b"x", b"y"])
    assert send_dead_letters(bad, settings, {topic: None}) == 2
    assert f"2 bad records of {topic} are in the sink's files only: the topic" in caplog.text


@pytest.mark.parametrize("kept, reports", [(2_000, 1), (3_000, 0), (-1, 0)])
def test_letters_that_kafka_would_delete_before_their_records_are_reported_once(
    spark, kafka, settings, caplog, kept, reports
):
    """Without the letter, a replay could not know that its record was sent back."""
    name = f"short-{uuid.uuid4()}"
    kafka.create_topic(name, config={"retention.ms": 3_000})
    kafka.create_topic(f"{name}.dead-letter", config={"retention.ms": kept})
    for _ in range(2):
        prepare_dead_letters(spark, [name], settings)
    assert caplog.text.count("set its retention.ms to 3000") == reports


@pytest.mark.parametrize(
    "more",
    [
        {"request.timeout.ms": "30000"}, {"linger.ms": "15000"}, {"linger.ms": "2147483647"},
        {"delivery.timeout.ms": "5000"},
    ],
)  # fmt: skip
def test_deadlines_of_the_user_are_made_to_fit(spark, topic, settings, more):
    """What every other client takes sends dead letters, too: Kafka wants a longer last deadline."""
    more = {**settings, **more}
    prepare_dead_letters(spark, [topic], more)
    assert send_dead_letters(bad_rows(spark, topic, [b"x"]), more, {topic: None}) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"acks": "1", "enable.idempotence": "true"}, "Must set acks to all"),
        ({"compression.type": "best"}, "Invalid value best for configuration compression.type"),
        ({"request.timeout.ms": "30 s"}, "request.timeout.ms is '30 s': it must be a whole number"),
    ],
)
def test_settings_that_a_producer_refuses_are_said_at_the_start(
    spark, topic, settings, caplog, more, said
):
    """And not by the first bad record; later they stop nothing."""
    settings = {**settings, **more}
    with pytest.raises(StreamError, match=said):
        prepare_dead_letters(spark, [topic], settings)
    assert send_dead_letters(bad_rows(spark, topic, [b"x"]), settings, {topic: None}) == 1
    assert f"1 bad records of {topic} are in the sink's files only: " in caplog.text


@pytest.mark.long
def test_missing_rights_are_named_at_the_start(spark, caplog):
    """Within seconds, and with the ACLs that are needed; later they stop nothing."""
    with LocalKafka(security="SASL_SSL") as secure:
        secure.create_topic("events", partitions=2)
        reader = secure.add_user("reader")
        secure.allow("reader", ["READ", "DESCRIBE"], topic="events")
        started = time.monotonic()
        with pytest.raises(StreamError, match=r"WRITE and DESCRIBE on the topic events\.dead-let"):
            prepare_dead_letters(spark, ["events"], reader)
        assert send_dead_letters(bad_rows(spark, "events", [b"x"]), reader, {"events": None}) == 1
        assert time.monotonic() - started < 60
        secure.allow("reader", ["CREATE", "DESCRIBE"], topic="events.dead-letter")
        with pytest.raises(StreamError, match=r"the ACL WRITE on the topic events\.dead-letter"):
            prepare_dead_letters(spark, ["events"], reader)
        secure.allow("reader", ["WRITE"], topic="events.dead-letter")
        assert send_dead_letters(bad_rows(spark, "events", [b"x"]), reader, {"events": None}) == 0


@pytest.mark.long
def test_a_broker_that_is_away_leaves_the_letters_for_another_try(spark):
    """A batch whose letters weren't sent is done again, and not only once it is too late."""
    with LocalKafka() as away:
        away.create_topic("events", partitions=1)
        settings = {"bootstrap.servers": away.bootstrap_servers}
        prepare_dead_letters(spark, ["events"], settings)
        away.kill()
        with pytest.raises(StreamError, match="gave no answer"):
            send_dead_letters(bad_rows(spark, "events", [b"x"]), settings, {"events": None})


def test_a_name_that_nobody_resolves_leaves_the_letters_for_another_try(spark):
    """DNS that is away for a minute costs no letters."""
    settings = {"bootstrap.servers": "broker.invalid:9092"}
    with pytest.raises(StreamError, match="No resolvable bootstrap urls"):
        send_dead_letters(bad_rows(spark, "events", [b"x"]), settings, {"events": None})


@pytest.mark.long
def test_a_login_that_fails_leaves_the_letters_for_another_try(spark):
    """A broker that reads its users again refuses all of them for a while."""
    with LocalKafka(security="SASL_SSL") as secure:
        jaas = secure.settings["sasl.jaas.config"].replace('password="', 'password="not-')
        settings = {**secure.settings, "sasl.jaas.config": jaas}
        with pytest.raises(StreamError, match="SaslAuthenticationException"):
            send_dead_letters(bad_rows(spark, "events", [b"x"]), settings, {"events": None})


@pytest.mark.long
def test_letters_that_are_large_unpacked_fit_into_javas_memory(kafka, topic, tmp_path):
    """2,600 records of 900 KB that were 9 MB in the broker are 2.3 GB here, one after the other."""
    program = f"""
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F
from helpers.spark import get_spark
from helpers.streaming import OffsetRange
from test_dead_letters import letter_sink
spark = get_spark(cores=2, memory="2g")
content = F.struct(F.lit(b"key").alias("key"),
                   F.repeat(F.col("id").cast("string"), 900_000 // 4).cast("binary").alias("value"),
                   F.lit("why").alias("reason"))
rows = spark.range(1_000, 3_600).select(
    F.lit(None).cast("bigint").alias("EventId"),
    F.lit(None).cast("double").alias("predicted_index"),
    F.lit(None).cast("array<double>").alias("p"), F.lit("{topic}").alias("topic"),
    F.lit(0).alias("partition"), F.col("id").alias("offset"),
    F.current_timestamp().alias("timestamp"), content.alias("bad"),
    F.lit(None).cast("array<string>").alias("unused"))
rows = rows.withColumn("prediction", F.when(F.col("p").isNotNull(), array_to_vector("p"))).drop("p")
settings = {{"bootstrap.servers": "{kafka.bootstrap_servers}"}}
with letter_sink(spark, "{tmp_path}/scored", settings) as sink:
    sink.begin({{}}, {{"{topic}": "the-id"}})
    sink.write(rows, [OffsetRange("{topic}", 0, 1_000, 3_600)])
"""
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    run = run_python("-c", program, seconds=600, env=here)
    assert run.returncode == 0, run.stderr[-3000:]
    counts = count_records(kafka.bootstrap_servers, f"{topic}.dead-letter")
    assert sum(counts.values()) == 2_600
