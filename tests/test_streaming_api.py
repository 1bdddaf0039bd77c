"""The API of pyspark.streaming.kafka, as Spark 2.4 tested it: the same calls, the same answers."""

import uuid

import pytest
from processes import running, wait_until

from helpers.broker import free_port, port_is_free
from helpers.jars import fetch_jars, java_command
from helpers.streaming import (
    Broker,
    KafkaUtils,
    OffsetRange,
    StreamError,
    TopicAndPartition,
    new_streaming_context,
    run_stream,
)

WORDS = ["a"] * 5 + ["b"] * 3 + ["c"] * 10


@pytest.fixture
def ssc(spark):
    """A streaming context with a short interval, stopped at the end."""
    context = new_streaming_context(spark, 0.5)
    yield context
    context.stop(stopSparkContext=False, stopGraceFully=False)


@pytest.fixture
def words(kafka, produce):
    """A topic with one partition, and 18 words in it."""
    name = f"words-{uuid.uuid4()}"
    kafka.create_topic(name, partitions=1)
    produce(name, [word.encode() for word in WORDS])
    return name


@pytest.fixture
def old_settings(kafka):
    """A stream's settings as they were written for Kafka 0.8."""
    return {"metadata.broker.list": kafka.bootstrap_servers, "auto.offset.reset": "smallest"}


def collect(stream):
    """Return a list that gets what the stream's batches hold."""
    found = []
    stream.foreachRDD(lambda rdd: found.extend(rdd.collect()))
    return found


def drain(ssc, stream):
    """Run a stream to the topic's end."""
    run_stream(ssc, until=lambda: stream.lag() == 0, timeout=600)


def test_create_stream(ssc, kafka, words):
    """Otherwise code for the stream with a receiver would not run."""
    group = f"group-{uuid.uuid4()}"
    stream = KafkaUtils.createStream(
        ssc, kafka.bootstrap_servers, group, {words: 1}, {"auto.offset.reset": "smallest"}
    )
    found = collect(stream.map(lambda pair: pair[1]))
    drain(ssc, stream)
    assert sorted(found) == WORDS


def test_create_stream_begins_at_the_end(ssc, kafka, words, produce):
    """Otherwise it would deliver other records than the old one, whose default this was."""
    stream = KafkaUtils.createStream(ssc, kafka.bootstrap_servers, "new-group", {words: 1})
    found = collect(stream)
    produce(words, [b"later"])
    run_stream(ssc, until=lambda: bool(found) and stream.lag() == 0, timeout=600)
    assert found == [("key", "later")]


def test_direct_stream(ssc, words, old_settings):
    """Otherwise the most used call would not run."""
    stream = KafkaUtils.createDirectStream(ssc, [words], old_settings)
    found = collect(stream)
    drain(ssc, stream)
    assert found == [("key", word) for word in WORDS]


def test_direct_stream_from_given_offsets(ssc, words, old_settings):
    """Otherwise programs that keep offsets themselves could not go on with them."""
    start = {TopicAndPartition(words, 0): 8}
    stream = KafkaUtils.createDirectStream(ssc, [words], old_settings, start)
    found = collect(stream.map(lambda pair: pair[1]))
    drain(ssc, stream)
    assert found == ["c"] * 10


def test_rdd(spark, words, old_settings):
    """Otherwise the records of an hour could not be read again, once."""
    ranges = [OffsetRange(words, 0, 0, 18)]
    rdd = KafkaUtils.createRDD(spark.sparkContext, old_settings, ranges)
    assert rdd.map(lambda pair: pair[1]).collect() == WORDS


def test_rdd_with_leaders(spark, kafka, words, old_settings):
    """Otherwise calls that name the leading brokers would fail."""
    host, port = kafka.bootstrap_servers.split(":")
    leaders = {TopicAndPartition(words, 0): Broker(host, int(port))}
    rdd = KafkaUtils.createRDD(
        spark.sparkContext, old_settings, [OffsetRange(words, 0, 5, 8)], leaders
    )
    assert rdd.map(lambda pair: pair[1]).collect() == ["b"] * 3


def test_rdd_knows_its_offset_ranges(spark, words, old_settings):
    """Otherwise a program could not note what it has read."""
    ranges = [OffsetRange(words, 0, 2, 18)]
    rdd = KafkaUtils.createRDD(spark.sparkContext, old_settings, ranges)
    assert rdd.offsetRanges() == ranges


@pytest.mark.parametrize(
    "part, reason",
    [
        ((0, 19), "ends at offset 18, so there is nothing yet up to 19"),
        ((20, 21), "is to be read from offset 20, but ends at 18"),
    ],
)
def test_an_rdd_of_offsets_that_are_not_there_is_refused(spark, words, old_settings, part, reason):
    """Otherwise Spark would wait for minutes for records that don't come."""
    ranges = [OffsetRange(words, 0, *part)]
    with pytest.raises(StreamError, match=reason):
        KafkaUtils.createRDD(spark.sparkContext, old_settings, ranges)


def test_rdd_with_message_handler(spark, words, old_settings):
    """Otherwise an RDD's elements could not tell where they come from."""
    rdd = KafkaUtils.createRDD(
        spark.sparkContext, old_settings, [OffsetRange(words, 0, 4, 6)],
        messageHandler=lambda record: (record.topic, record.partition, record.offset,
                                       record.key, record.message),
    )  # fmt: skip
    assert rdd.collect() == [(words, 0, 4, "key", "a"), (words, 0, 5, "key", "b")]


def test_stream_with_message_handler(ssc, words, old_settings):
    """Otherwise a stream's elements could not tell where they come from."""
    stream = KafkaUtils.createDirectStream(
        ssc, [words], old_settings, messageHandler=lambda record: record.offset
    )
    found = collect(stream)
    drain(ssc, stream)
    assert found == list(range(18))


def test_offset_ranges_in_foreach_rdd(ssc, words, old_settings):
    """Otherwise a program could not keep its offsets beside its results."""
    alone, with_time = [], []
    stream = KafkaUtils.createDirectStream(ssc, [words], old_settings)
    stream.foreachRDD(lambda rdd: alone.extend(rdd.offsetRanges()))
    stream.foreachRDD(lambda batch_time, rdd: with_time.append((batch_time, rdd.offsetRanges())))
    drain(ssc, stream)
    assert alone == [OffsetRange(words, 0, 0, 18)]
    assert [ranges for _, ranges in with_time if ranges] == [alone]
    assert all(batch_time.year >= 2026 for batch_time, _ in with_time)


def test_offset_ranges_in_transform_followed_by_map_and_count(ssc, words, old_settings):
    """Otherwise the idiom of Spark's own guide would fail: keep the ranges, then go on."""
    ranges, counts = [], []
    stream = KafkaUtils.createDirectStream(ssc, [words], old_settings)

    def keep_ranges(rdd):
        ranges.extend(rdd.offsetRanges())
        return rdd

    counted = stream.transform(keep_ranges).map(lambda pair: pair[1]).count()
    counted.foreachRDD(lambda rdd: counts.extend(rdd.collect()))
    drain(ssc, stream)
    assert ranges == [OffsetRange(words, 0, 0, 18)]
    assert sum(counts) == 18


@pytest.mark.parametrize(
    "one, same, other, text",
    [
        (
            OffsetRange("t", 0, 1, 5), OffsetRange("t", 0, 1, 5), OffsetRange("t", 0, 1, 6),
            "OffsetRange(topic='t', partition=0, fromOffset=1, untilOffset=5)",
        ),
        (
            TopicAndPartition("t", 0), TopicAndPartition("t", 0), TopicAndPartition("t", 1),
            "TopicAndPartition(topic='t', partition=0)",
        ),
        (
            Broker("127.0.0.1", 1), Broker("127.0.0.1", 1), Broker("127.0.0.2", 1),
            "Broker(host='127.0.0.1', port=1)",
        ),
    ],
)  # fmt: skip
def test_equality_hashing_and_repr(one, same, other, text):
    """Otherwise they could not be keys of a dictionary, or be compared or read."""
    assert one == same and hash(one) == hash(same) and repr(one) == text
    assert one != other and len({one, same, other}) == 2


def test_several_streams_and_topics_with_a_window_downstream(
    spark, ssc, kafka, words, produce, old_settings
):
    """Otherwise two topics would need two programs."""
    other = f"other-{uuid.uuid4()}"
    kafka.create_topic(other, partitions=1)
    produce(other, [b"d"] * 4)
    both = KafkaUtils.createDirectStream(ssc, [words, other], old_settings)
    alone = KafkaUtils.createDirectStream(ssc, [other], old_settings)
    of_both, of_one, sizes = collect(both), collect(alone), []
    both.window(2, 0.5).count().foreachRDD(lambda rdd: sizes.extend(rdd.collect()))
    run_stream(
        ssc, until=lambda: len(sizes) >= 3 and both.lag() == alone.lag() == 0, timeout=600
    )
    assert sorted(value for _, value in of_both) == [*WORDS, *["d"] * 4]
    assert [value for _, value in of_one] == ["d"] * 4
    assert sizes[:3] == [22] * 3  # the records stay in the window for 2 s


def test_zookeepers_port_with_nothing_behind_it_is_named(ssc):
    """Otherwise old programs would wait for a ZooKeeper that nobody runs any more."""
    with pytest.raises(ValueError, match="'localhost:2181' is ZooKeeper's port, and nothing"):
        KafkaUtils.createStream(ssc, "localhost:2181", "group", {"words": 1})
    with pytest.raises(ValueError, match="is an address of ZooKeeper"):
        KafkaUtils.createStream(ssc, "127.0.0.1:2182/kafka", "group", {"words": 1})


def test_a_real_zookeeper_is_recognised(ssc, tmp_path):
    """Otherwise the user would read that Kafka gave no answer, and look for a broker's fault."""
    jars = fetch_jars(
        "org.apache.zookeeper:zookeeper:3.9.5", "org.slf4j:slf4j-nop:1.7.36",
        "io.dropwizard.metrics:metrics-core:4.1.12.1", "org.xerial.snappy:snappy-java:1.1.10.8",
    )
    port = free_port()
    command = [java_command(), "-Dzookeeper.admin.enableServer=false"]
    command += ["-cp", ":".join(map(str, jars))]
    command += ["org.apache.zookeeper.server.ZooKeeperServerMain", str(port), str(tmp_path)]
    with running(command):
        wait_until(lambda: not port_is_free(port))
        with pytest.raises(ValueError, match=f"'127.0.0.1:{port}' is an address of ZooKeeper"):
            KafkaUtils.createStream(ssc, f"127.0.0.1:{port}", "group", {"words": 1})


def test_topics_of_create_stream_must_be_a_dict(ssc, kafka):
    """Otherwise a list, as the direct stream takes it, would fail in a strange place."""
    with pytest.raises(TypeError, match="topics must be a dict"):
        KafkaUtils.createStream(ssc, kafka.bootstrap_servers, "group", ["words"])
