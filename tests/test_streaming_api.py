"""The API of pyspark.streaming.kafka, as Spark 2.4 tested it: the same calls, the same answers."""

import functools
import json
import uuid

import pytest
from kafka import KafkaAdminClient
from processes import run_python
from pyspark.streaming import StreamingContext

from helpers.broker import free_port
from helpers.streaming import (
    Broker,
    KafkaUtils,
    OffsetRange,
    StreamError,
    TopicAndPartition,
    dstream,
    modern_settings,
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
    """Code for the stream with a receiver runs."""
    group = f"group-{uuid.uuid4()}"
    stream = KafkaUtils.createStream(
        ssc, kafka.bootstrap_servers, group, {words: 1}, {"auto.offset.reset": "smallest"}
    )
    found = collect(stream.map(lambda pair: pair[1]))
    drain(ssc, stream)
    assert sorted(found) == WORDS


def test_create_stream_begins_at_the_end(ssc, kafka, words, produce):
    """Its default is that of the old one."""
    stream = KafkaUtils.createStream(ssc, kafka.bootstrap_servers, "new-group", {words: 1})
    found = collect(stream)
    produce(words, [b"later"])
    run_stream(ssc, until=lambda: bool(found) and stream.lag() == 0, timeout=600)
    assert found == [("key", "later")]


def test_direct_stream(ssc, words, old_settings):
    """The most used call runs."""
    stream = KafkaUtils.createDirectStream(ssc, [words], old_settings)
    found = collect(stream)
    drain(ssc, stream)
    assert found == [("key", word) for word in WORDS]


def test_direct_stream_from_given_offsets(ssc, words, old_settings):
    """Programs that keep offsets themselves resume from them."""
    start = {TopicAndPartition(words, 0): 8}
    stream = KafkaUtils.createDirectStream(ssc, [words], old_settings, start)
    found = collect(stream.map(lambda pair: pair[1]))
    drain(ssc, stream)
    assert found == ["c"] * 10


def test_rdd(spark, words, old_settings):
    """The records of given offset ranges are read once, without a stream."""
    ranges = [OffsetRange(words, 0, 0, 18)]
    rdd = KafkaUtils.createRDD(spark.sparkContext, old_settings, ranges)
    assert rdd.map(lambda pair: pair[1]).collect() == WORDS


def test_an_rdd_may_have_several_ranges_of_a_partition(spark, words, old_settings):
    """Each range is read, also if ranges overlap."""
    ranges = [OffsetRange(words, 0, *part) for part in ((0, 4), (10, 18), (2, 6))]
    rdd = KafkaUtils.createRDD(spark.sparkContext, old_settings, ranges)
    expected = [word for part in ranges for word in WORDS[part.fromOffset : part.untilOffset]]
    assert sorted(rdd.map(lambda pair: pair[1]).collect()) == sorted(expected)


def test_rdd_with_leaders(spark, kafka, words, old_settings):
    """Calls that name the leading brokers run."""
    host, port = kafka.bootstrap_servers.split(":")
    leaders = {TopicAndPartition(words, 0): Broker(host, int(port))}
    rdd = KafkaUtils.createRDD(
        spark.sparkContext, old_settings, [OffsetRange(words, 0, 5, 8)], leaders
    )
    assert rdd.map(lambda pair: pair[1]).collect() == ["b"] * 3


def test_rdd_knows_its_offset_ranges(spark, words, old_settings):
    """A program can note what it has read."""
    ranges = [OffsetRange(words, 0, 2, 18)]
    rdd = KafkaUtils.createRDD(spark.sparkContext, old_settings, ranges)
    assert rdd.offsetRanges() == ranges


@pytest.mark.parametrize(
    "part, reason",
    [
        ((0, 19), "ends at offset 18, before 19: give a range"),
        ((20, 21), "ends at offset 18, before 21: give a range"),
    ],
)
def test_an_rdd_of_offsets_that_are_not_there_is_refused(spark, words, old_settings, part, reason):
    """Missing offsets are named at once, and not waited for."""
    ranges = [OffsetRange(words, 0, *part)]
    with pytest.raises(StreamError, match=reason):
        KafkaUtils.createRDD(spark.sparkContext, old_settings, ranges)


def test_rdd_with_message_handler(spark, words, old_settings):
    """An RDD's elements can say where they come from."""
    rdd = KafkaUtils.createRDD(
        spark.sparkContext, old_settings, [OffsetRange(words, 0, 4, 6)],
        messageHandler=lambda record: (record.topic, record.partition, record.offset,
                                       record.key, record.message),
    )  # fmt: skip
    assert rdd.collect() == [(words, 0, 4, "key", "a"), (words, 0, 5, "key", "b")]


def test_stream_with_message_handler(ssc, words, old_settings):
    """A stream's elements can say where they come from."""
    stream = KafkaUtils.createDirectStream(
        ssc, [words], old_settings, messageHandler=lambda record: record.offset
    )
    found = collect(stream)
    drain(ssc, stream)
    assert found == list(range(18))


def test_offset_ranges_in_foreach_rdd(ssc, words, old_settings):
    """A program can keep its offsets beside its results."""
    alone, with_time = [], []
    stream = KafkaUtils.createDirectStream(ssc, [words], old_settings)
    stream.foreachRDD(lambda rdd: alone.extend(rdd.offsetRanges()))
    stream.foreachRDD(lambda batch_time, rdd: with_time.append((batch_time, rdd.offsetRanges())))
    drain(ssc, stream)
    assert alone == [OffsetRange(words, 0, 0, 18)]
    assert [ranges for _, ranges in with_time if ranges] == [alone]
    assert all(batch_time.year >= 2026 for batch_time, _ in with_time)


def test_offset_ranges_in_transform_followed_by_map_and_count(ssc, words, old_settings):
    """The idiom of Spark's guide works: keep the ranges, then go on."""
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
    """Offset ranges and partitions can be compared, printed, and keys of a dictionary."""
    assert one == same and hash(one) == hash(same) and repr(one) == text
    assert one != other and len({one, same, other}) == 2


def test_several_streams_and_topics_with_a_window_downstream(
    spark, ssc, kafka, words, produce, old_settings
):
    """One program reads several topics, and joins them in a window."""
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


@pytest.mark.long
def test_a_window_that_slides_by_several_intervals_has_all_records(
    ssc, kafka, produce, old_settings
):
    """A window counts the records of intervals whose batches are committed by then."""
    name = f"windows-{uuid.uuid4()}"
    kafka.create_topic(name, partitions=1)
    produce(name, [b"first"])
    stream = KafkaUtils.createDirectStream(ssc, [name], old_settings)
    written, sizes, seen = [1], [], []

    def write_another(batch, batch_id):
        seen.append(batch.count())
        if len(written) < 8:
            produce(name, [b"next"])
            written.append(1)

    stream.foreachBatch(write_another)
    stream.window(2, 2).count().foreachRDD(lambda rdd: sizes.extend(rdd.collect()))
    run_stream(ssc, until=lambda: sum(sizes) >= 8, timeout=300)
    assert sum(seen) == sum(sizes) == 8
    assert not stream._batches.source._being_read


@pytest.mark.parametrize("address", ["localhost:2181", "one:9092, two:2181", "one:2182/kafka"])
def test_zookeepers_address_is_refused_at_once(ssc, address):
    """Old programs pass it, and would wait for an answer of Kafka's."""
    with pytest.raises(ValueError, match=f"'{address}' is ZooKeeper's address. Kafka 4 has no"):
        KafkaUtils.createStream(ssc, address, "group", {"words": 1})


@pytest.mark.long
def test_where_nothing_answers_zookeeper_is_named_as_a_cause(ssc):
    """ZooKeeper at another port than its usual one doesn't answer as Kafka does either."""
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(StreamError, match=f"Kafka at {address} gave no answer.*may be ZooKeeper's"):
        KafkaUtils.createStream(ssc, address, "group", {"words": 1})


def test_topics_of_create_stream_must_be_a_dict(ssc, kafka):
    """A list, as the direct stream takes it, is refused at once."""
    with pytest.raises(TypeError, match="topics must be a dict"):
        KafkaUtils.createStream(ssc, kafka.bootstrap_servers, "group", ["words"])


def test_streams_of_one_group_get_each_record_once(ssc, kafka, words, produce):
    """Several receivers of a group shared its topics' records, and a union had each once."""
    other = f"other-{uuid.uuid4()}"
    kafka.create_topic(other, partitions=1)
    produce(other, [b"d"] * 4)
    group, reset = f"group-{uuid.uuid4()}", {"auto.offset.reset": "smallest"}
    streams = [
        KafkaUtils.createStream(ssc, kafka.bootstrap_servers, group, topics, reset)
        for topics in ({words: 1}, {words: 2}, {words: 1, other: 1}, {other: 1})
    ]
    found = collect(ssc.union(*streams).map(lambda pair: pair[1]))
    run_stream(ssc, until=lambda: not any(stream.lag() for stream in streams), timeout=600)
    assert sorted(found) == [*WORDS, *["d"] * 4]
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        offsets = admin.list_group_offsets([group])[group]
    assert {part.topic: found.offset for part, found in offsets.items()} == {words: 18, other: 4}


@pytest.mark.long
def test_streams_of_one_group_share_after_a_recovery(spark, kafka, words, produce, tmp_path):
    """A context from a checkpoint has the same streams, and each goes on with its own topics."""
    found = []

    def set_up():
        context = new_streaming_context(spark, 0.5)
        reset = {"auto.offset.reset": "smallest"}
        streams = [
            KafkaUtils.createStream(context, kafka.bootstrap_servers, words, {words: 1}, reset)
            for _ in range(2)
        ]
        values = context.union(*streams).map(lambda pair: pair[1])
        values.foreachRDD(lambda rdd: found.extend(rdd.collect()))
        context.checkpoint(str(tmp_path))
        return context

    def planned():
        plans = [json.loads(file.read_text()) for file in tmp_path.glob("kafka-plans/*/*.json")]
        return sorted((start, end) for plan in plans for _, _, start, end, _ in plan["ranges"])

    first = set_up()
    run_stream(first, until=lambda: len(found) == len(WORDS) and planned(), timeout=600)
    produce(words, [b"later"] * 2)
    again = StreamingContext.getOrCreate(str(tmp_path), lambda: pytest.fail("no checkpoint"))
    run_stream(again, until=lambda: len(planned()) == 2, timeout=600)
    assert sorted(found) == WORDS and planned() == [(0, 18), (18, 20)]


def test_streams_of_several_groups_get_all_records_each(ssc, kafka, words):
    """Another group is another reader."""
    reset = {"auto.offset.reset": "smallest"}
    streams = [
        KafkaUtils.createStream(ssc, kafka.bootstrap_servers, f"{words}-{n}", {words: 1}, reset)
        for n in range(2)
    ]
    found = collect(ssc.union(*streams))
    run_stream(ssc, until=lambda: not any(stream.lag() for stream in streams), timeout=600)
    assert len(found) == 2 * len(WORDS)


def test_a_cell_that_makes_a_stream_may_be_run_again(ssc, kafka, words, old_settings):
    """The last one reads the records; a stream without outputs takes none away."""
    settings = {**old_settings, "group.id": f"group-{uuid.uuid4()}"}
    del settings["metadata.broker.list"]
    makers = {
        "receiver": lambda: KafkaUtils.createStream(
            ssc, kafka.bootstrap_servers, settings["group.id"], {words: 1}, settings
        ),
        "direct": lambda: KafkaUtils.createDirectStream(
            ssc, [words], {**old_settings, "group.id": f"direct-{words}"}
        ),
    }
    found, streams = {}, []
    for name, make in makers.items():
        make()
        streams.append(make())
        found[name] = collect(streams[-1])
    run_stream(ssc, until=lambda: not any(stream.lag() for stream in streams), timeout=600)
    assert {name: len(records) for name, records in found.items()} == {
        "receiver": len(WORDS), "direct": len(WORDS),
    }  # fmt: skip


def test_direct_streams_of_a_group_must_not_read_the_same(ssc, words, old_settings):
    """Each would commit offsets of records that the other has not done yet."""
    settings = {**old_settings, "group.id": f"group-{uuid.uuid4()}"}
    streams = [KafkaUtils.createDirectStream(ssc, [words], settings) for _ in range(2)]
    for stream in streams:
        collect(stream)
    reason = f"reads the same partitions for group '{settings['group.id']}'.*give one stream both"
    with pytest.raises(StreamError, match=reason):
        run_stream(ssc, until=lambda: False, timeout=600)


def test_direct_streams_of_a_group_may_have_a_partition_each(
    ssc, kafka, topic, produce, old_settings
):
    """Their offsets don't touch each other."""
    produce(topic, [b"a"] * 20, [b"%d" % number for number in range(20)])  # in both partitions
    settings = {**old_settings, "group.id": f"group-{uuid.uuid4()}"}
    streams = [
        KafkaUtils.createDirectStream(ssc, [topic], settings, {TopicAndPartition(topic, part): 0})
        for part in range(2)
    ]
    found = [collect(stream) for stream in streams]
    run_stream(ssc, until=lambda: not any(stream.lag() for stream in streams), timeout=600)
    assert sum(map(len, found)) == 20 and all(found)


@pytest.mark.parametrize(
    "of_topic", [str, str.encode, lambda name: [name.encode()], lambda name: (name,)]
)
def test_topics_and_brokers_in_other_types(ssc, kafka, words, of_topic):
    """One topic as a text, names as bytes and brokers as a list mean what they say."""
    settings = {"bootstrap.servers": [kafka.bootstrap_servers], "auto.offset.reset": "smallest"}
    stream = KafkaUtils.createDirectStream(ssc, of_topic(words), settings)
    assert stream.positions() == {TopicAndPartition(words, 0): 0}
    received = KafkaUtils.createStream(
        ssc, [kafka.bootstrap_servers], b"group", {words.encode(): 1}
    )
    assert received.positions() == {TopicAndPartition(words, 0): 18}


def test_offsets_of_another_topic_are_refused(ssc, words, old_settings):
    """The old API refused them too."""
    start = {TopicAndPartition("another", 0): 8}
    with pytest.raises(ValueError, match=r"fromOffsets has the topics \['another'\], but topics"):
        KafkaUtils.createDirectStream(ssc, [words], old_settings, start)


def test_negative_offsets_are_refused(ssc, words, old_settings):
    """An offset that no record can have is not taken for the topic's beginning or end."""
    start = {TopicAndPartition(words, 0): -1}
    with pytest.raises(ValueError, match=r"^fromOffsets has the offset -1 for .*, partition 0: "):
        KafkaUtils.createDirectStream(ssc, [words], old_settings, start)


def test_a_partition_that_does_not_exist_is_named_at_once(spark, ssc, words, old_settings):
    """Kafka would give no answer, and the broker would seem to be away."""
    missing = f"^topic {words} has the partitions 0 to 0, not 7\\.$"
    with pytest.raises(StreamError, match=missing):
        start = {TopicAndPartition(words, 7): 0}
        KafkaUtils.createDirectStream(ssc, [words], old_settings, start)
    with pytest.raises(StreamError, match=missing):
        KafkaUtils.createRDD(spark.sparkContext, old_settings, [OffsetRange(words, 7, 0, 5)])


OLD_CONSUMER = {  # all settings of Kafka 0.8.2's consumer but group.id
    "zookeeper.connect": "one:2181", "consumer.id": "c", "socket.timeout.ms": 30_000,
    "socket.receive.buffer.bytes": 65_536, "fetch.message.max.bytes": 1_048_576,
    "num.consumer.fetchers": 1, "auto.commit.enable": False, "auto.commit.interval.ms": 60_000,
    "queued.max.message.chunks": 2, "rebalance.max.retries": 4, "fetch.min.bytes": 1,
    "fetch.wait.max.ms": 100, "rebalance.backoff.ms": 2_000, "refresh.leader.backoff.ms": 200,
    "auto.offset.reset": "smallest", "consumer.timeout.ms": -1, "exclude.internal.topics": True,
    "partition.assignment.strategy": "range", "client.id": "old",
    "zookeeper.session.timeout.ms": 6_000, "zookeeper.connection.timeout.ms": 6_000,
    "zookeeper.sync.time.ms": 2_000, "offsets.storage": "zookeeper",
    "offsets.channel.backoff.ms": 1_000, "offsets.channel.socket.timeout.ms": 10_000,
    "offsets.commit.max.retries": 5, "dual.commit.enabled": True,
}  # fmt: skip


def test_all_settings_of_the_old_consumer_are_taken(ssc, kafka, words, caplog):
    """What has another name now is translated; what is of no use is left out, with a warning."""
    settings = {"metadata.broker.list": kafka.bootstrap_servers, **OLD_CONSUMER}
    stream = KafkaUtils.createDirectStream(ssc, [words], settings)
    found = collect(stream)
    drain(ssc, stream)
    assert len(found) == len(WORDS)
    assert modern_settings(settings) == {
        "bootstrap.servers": kafka.bootstrap_servers, "request.timeout.ms": "30000",
        "receive.buffer.bytes": "65536", "max.partition.fetch.bytes": "1048576",
        "enable.auto.commit": "false", "auto.commit.interval.ms": "60000", "fetch.min.bytes": "1",
        "fetch.max.wait.ms": "100", "retry.backoff.ms": "200", "auto.offset.reset": "earliest",
        "exclude.internal.topics": "true", "client.id": "old",
    }  # fmt: skip
    assert "zookeeper.connect has no effect: the stream needs no ZooKeeper" in caplog.text


def test_todays_name_of_a_setting_wins():
    """Where both are given, the new one was written for this Kafka."""
    both = {"bootstrap.servers": "new:9092", "metadata.broker.list": "old:9092"}
    assert modern_settings(both)["bootstrap.servers"] == "new:9092"
    assert modern_settings(dict(reversed(both.items())))["bootstrap.servers"] == "new:9092"


@pytest.mark.parametrize("value", [False, "False", "FALSE", " false ", b"false"])
@pytest.mark.parametrize("name", ["enable.auto.commit", "auto.commit.enable"])
def test_automatic_commits_are_turned_off_in_any_notation(name, value):
    """A capital letter or a space doesn't make the stream commit."""
    settings = modern_settings({"bootstrap.servers": "one:9092", name: value})
    assert settings["enable.auto.commit"] == "false"


@pytest.mark.parametrize("value", ["no", 0, ""])
def test_automatic_commits_are_either_true_or_false(value):
    """A value that Kafka doesn't know is refused, and not taken for true."""
    settings = {"bootstrap.servers": "one:9092", "enable.auto.commit": value}
    with pytest.raises(ValueError, match=r"^'enable\.auto\.commit' is .*'true' or 'false'\.$"):
        modern_settings(settings)


class Outputs:
    """Functions of a program, as methods."""

    def of_rdd(self, rdd):
        """Take an RDD."""

    def of_both(self, batch_time, rdd):
        """Take a time and an RDD."""

    __call__ = of_rdd


def passing_on(function):
    """Return a function that passes on what it gets, as decorators do."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def adding_time(function):
    """Return a function of an RDD that calls one of a time and an RDD."""

    @functools.wraps(function)
    def wrapper(rdd):
        return function(None, rdd)

    return wrapper


@pytest.mark.parametrize(
    "function, gets_time",
    [
        (lambda rdd: None, False),
        (lambda batch_time, rdd: None, True),
        (lambda rdd, *, table="t": None, False),
        (lambda batch_time, rdd, *, table="t": None, True),
        (lambda batch_time, rdd, table="t": None, True),
        (lambda rdd, table="t": None, True),  # as in Spark, which counts it
        (lambda *both: None, True),
        (lambda rdd, **more: None, False),
        (Outputs().of_rdd, False),
        (Outputs().of_both, True),
        (Outputs(), False),
        (functools.partial(lambda table, rdd: None, "t"), False),
        (functools.partial(lambda rdd, table: None, table="t"), False),
        (functools.partial(lambda batch_time, rdd, table: None, table="t"), True),
        (passing_on(lambda rdd: None), False),
        (passing_on(lambda batch_time, rdd: None), True),
        (adding_time(lambda batch_time, rdd: None), False),
        ([].append, False),
    ],
)
def test_a_function_gets_what_spark_would_give_it(ssc, words, old_settings, function, gets_time):
    """The time and the RDD, unless it has one positional parameter only."""
    assert dstream._takes_time(function) == gets_time


def test_partial_functions_and_methods_are_called(ssc, words, old_settings):
    """In `foreachRDD` and in `transform`."""
    found, counts = [], []
    stream = KafkaUtils.createDirectStream(ssc, [words], old_settings)

    def keep(target, rdd, *, least=0):
        target.append(rdd.count())

    stream.foreachRDD(functools.partial(keep, counts))
    picked = stream.transform(functools.partial(lambda rdd, letter: rdd.filter(
        lambda pair: pair[1] == letter), letter="b"))  # fmt: skip
    picked.foreachRDD(lambda rdd: found.extend(rdd.collect()))
    drain(ssc, stream)
    assert (sum(counts), found) == (len(WORDS), [("key", "b")] * 3)


@pytest.mark.parametrize(
    "decoders, name",
    [
        ({}, "valueDecoder"),
        pytest.param({"keyDecoder": int}, "keyDecoder", marks=pytest.mark.long),
        pytest.param(
            {"valueDecoder": bytes, "messageHandler": lambda record: record.none},
            "messageHandler",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_record_that_cannot_be_decoded_is_named(
    ssc, kafka, topic, produce, old_settings, decoders, name
):
    """Its place and what would take it, so that the user need not search for it."""
    (sent,) = produce(topic, [b"\xff\xfe"])
    stream = KafkaUtils.createDirectStream(ssc, [topic], old_settings, **decoders)
    stream.foreachRDD(lambda rdd: rdd.collect())
    place = f"{topic}, partition {sent.partition}, offset 0 can't be processed by {name}: "
    with pytest.raises(StreamError, match=f"the record at {place}.*Give the stream a {name} that"):
        drain(ssc, stream)


@pytest.mark.long
def test_a_stopped_session_is_one_sentence(tmp_path):
    """A notebook's cell that stopped Spark leaves a session that nothing can use."""
    program = f"""
from helpers.spark import SessionError, get_spark
from helpers.streaming import KafkaQuery, new_streaming_context
spark = get_spark(cores=1)
spark.stop()
for use in (lambda: new_streaming_context(spark, 1),
            lambda: KafkaQuery(spark, ["t"], {{"bootstrap.servers": "h:1"}}, "{tmp_path}")):
    try:
        use()
    except SessionError as error:
        print(error)
print(new_streaming_context(get_spark(), 1).sparkContext.range(3).count())
"""
    run = run_python("-c", program)
    told = "this Spark session was stopped: start a new one with get_spark().\n"
    assert run.stdout == f"{told}{told}3\n", run.stderr[-3000:]
