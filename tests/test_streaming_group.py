"""A query commits its progress to its consumer group, where Kafka's tools show the lag."""

import logging
import threading

import pytest
from kafka import (
    KafkaAdminClient,
    KafkaConsumer,
    KafkaProducer,
    OffsetAndMetadata,
    TopicPartition,
)
from processes import wait_until

from helpers.broker import LocalKafka
from helpers.model import build_model
from helpers.records import parse_events
from helpers.scoring import score_stream
from helpers.sinks import ParquetSink
from helpers.streaming import (
    KafkaQuery,
    KafkaUtils,
    StreamError,
    TopicAndPartition,
    new_streaming_context,
    structured,
)
from helpers.streaming.client import KafkaClient
from helpers.streaming.group import GroupProgress
from helpers.transformers import LabelIndexTransformer, ModelPredictor

NOT_COMMITTED = "the query's offsets can't be committed to group"


@pytest.fixture
def query_of(spark, one, tmp_path):
    """Make queries on the topic, and close them at the end."""
    queries = []

    def make(settings, function=lambda df, batch_id: df.count(), checkpoint="checkpoint"):
        queries.append(KafkaQuery(spark, [one], settings, tmp_path / checkpoint))
        queries[-1].foreachBatch(function)
        return queries[-1]

    yield make
    for query in queries:
        query.close()


def committed(settings):
    """Ask Kafka, by another library than the query's, for the group's offsets by partition."""
    group = settings["group.id"]
    with KafkaAdminClient(bootstrap_servers=settings["bootstrap.servers"]) as admin:
        offsets = admin.list_group_offsets([group])[group]
    return {TopicAndPartition(*part): found.offset for part, found in offsets.items()}


def commit(settings, topic, offset):
    """Commit an offset as another program does, which has joined no group."""
    with KafkaConsumer(
        bootstrap_servers=settings["bootstrap.servers"], group_id=settings["group.id"],
        enable_auto_commit=False,
    ) as consumer:  # fmt: skip
        part = TopicPartition(topic, 0)
        consumer.assign([part])
        consumer.commit({part: OffsetAndMetadata(offset, "", -1)})


def warnings_in(caplog):
    """Return the warnings about commits."""
    return [text for text in caplog.messages if NOT_COMMITTED in text]


def test_kafkas_tools_show_the_progress_of_the_sink(spark, topic, produce, settings, tmp_path):
    """The group's offsets are those at which the sink ends, so the lag is 0 at the end."""
    predictor = ModelPredictor(keras_model=build_model(), features_col="event")

    def score(records):
        return LabelIndexTransformer().transform(predictor.predict(parse_events(records)))

    keys = [b"%d" % number for number in range(30)]
    produce(topic, [b"rubbish"] * 30, keys)
    checkpoint = tmp_path / "checkpoint"
    with (
        ParquetSink(spark, tmp_path / "out", signal_index=0, on_bad_record="skip") as sink,
        KafkaQuery(spark, [topic], settings, checkpoint, max_offsets=10) as query,
    ):
        score_stream(query, score, sink)
        query.run(timeout=600)
        assert committed(settings) == sink.positions()
        assert len(committed(settings)) == 2 and sum(committed(settings).values()) == 30
        assert query.lag() == 0


def test_an_idle_query_keeps_its_offsets_alive(query_of, one, produce, settings, monkeypatch):
    """Kafka forgets offsets that are not committed for a while, and its tools show no lag then."""
    monkeypatch.setattr(structured, "RECOMMIT_SECONDS", 0.5)
    produce(one, [b"x"] * 5)
    query, forgotten = query_of(settings), []

    def is_committed_again():
        found = committed(settings)
        if not forgotten and list(found.values()) == [5]:
            with KafkaAdminClient(bootstrap_servers=settings["bootstrap.servers"]) as admin:
                forgotten.append(admin.delete_groups([settings["group.id"]]))
            return False
        return forgotten and list(found.values()) == [5]

    query.run(until=is_committed_again, timeout=300, interval=1.0)
    assert forgotten == [{settings["group.id"]: "OK"}]


def test_the_group_shows_where_a_query_begins_and_partitions_without_records(
    spark, topic, produce, settings, tmp_path
):
    """The lag is known before the first batch is done, and in each partition."""
    produce(topic, [b"x"] * 5, [b"same"] * 5)
    before, after = [], []
    with KafkaQuery(spark, [topic], settings, tmp_path / "checkpoint") as query:

        def look(df, batch_id):
            wait_until(lambda: committed(settings))
            before.append(committed(settings))

        query.foreachBatch(look)
        query.run(timeout=600)
        after.append(committed(settings))
    assert sorted(before[0].values()) == [0, 0]
    assert sorted(after[0].values()) == [0, 5]


def test_a_batch_that_fails_is_not_committed(query_of, one, produce, settings):
    """The group shows the last batch that has succeeded."""
    produce(one, [b"good"] * 5)

    def fail_at_bad(df, batch_id):
        if df.where("value = 'bad'").count():
            raise ValueError("a bad batch")

    query = query_of(settings, fail_at_bad)
    query.run(timeout=600)
    produce(one, [b"bad"] * 3)
    with pytest.raises(StreamError, match="a bad batch"):
        query.run(timeout=600)
    assert list(committed(settings).values()) == [5]
    query.foreachBatch(lambda df, batch_id: None)
    query.run(timeout=600)
    assert list(committed(settings).values()) == [8]


@pytest.mark.parametrize("has_committed", [False, True])
def test_a_group_with_members_is_left_alone(
    query_of, one, produce, settings, caplog, has_committed
):
    """Kafka refuses a query's commits while others subscribe; the query continues and warns."""
    produce(one, [b"x"] * 5)
    seen, sent = [], []
    with KafkaConsumer(
        bootstrap_servers=settings["bootstrap.servers"], group_id=settings["group.id"],
        auto_offset_reset="earliest", enable_auto_commit=False,
    ) as member:  # fmt: skip
        # If it joins before it knows the partitions, kafka-python 3.0.12 never gets any.
        wait_until(lambda: member.partitions_for_topic(one))
        member.subscribe([one])
        wait_until(lambda: member.poll(timeout_ms=200))
        if has_committed:
            member.commit({TopicPartition(one, 0): OffsetAndMetadata(2, "", -1)})
        found = committed(settings)
        query = query_of(settings, lambda df, batch_id: seen.append(df.count()))

        def is_done():
            if seen and not sent:
                sent.append(produce(one, [b"x"] * 3))
            return sum(seen) == 8

        query.run(until=is_done, timeout=600, interval=0.2)
        assert committed(settings) == found
    (warning,) = warnings_in(caplog)
    assert "the query continues" in warning and "another group.id" in warning
    assert ("was committed by another program" in warning) == has_committed
    assert ("another consumer has joined the group" in warning) == (not has_committed)


@pytest.mark.parametrize("committer", ["program", "stream"])
def test_offsets_from_which_another_program_resumes_are_not_replaced(
    spark, query_of, one, produce, settings, caplog, committer
):
    """A program that is being restarted finds its offsets, and the query reads all records."""
    produce(one, [b"x"] * 5)
    if committer == "program":
        commit(settings, one, 3)
    else:
        client = KafkaClient(spark, settings)
        client.commit({TopicAndPartition(one, 0): 3}, client.topic_ids([one]))
        client.close()
    seen = []
    query = query_of(settings, lambda df, batch_id: seen.append(df.count()))
    query.run(timeout=600)
    assert seen == [5] and list(committed(settings).values()) == [3]
    (warning,) = warnings_in(caplog)
    assert f"Offset 3 of {one}, partition 0, was committed by another program" in warning


def test_of_two_queries_in_a_group_the_first_withdraws(query_of, one, produce, settings, caplog):
    """A query reports that another one has moved the group's offsets, and leaves them alone."""
    produce(one, [b"x"] * 5)
    first = query_of(settings)
    first.run(timeout=600)
    produce(one, [b"x"] * 3)
    query_of(settings, checkpoint="another").run(timeout=600)
    assert list(committed(settings).values()) == [8] and warnings_in(caplog) == []
    first.run(timeout=600)
    (warning,) = warnings_in(caplog)
    assert "Offset 8 of" in warning


@pytest.mark.long
def test_a_query_continues_the_commits_of_an_earlier_one(query_of, one, produce, settings, caplog):
    """A restarted program commits to the same group, with its old checkpoint or a new one."""
    for count, checkpoint in ((5, "old"), (8, "old"), (11, "new")):
        produce(one, [b"x"] * (5 if count == 5 else 3))
        query_of(settings, checkpoint=checkpoint).run(timeout=600)
        assert list(committed(settings).values()) == [count]
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("change", [{"group.id": None}, {"enable.auto.commit": False}])
def test_without_a_group_or_automatic_commits_nothing_is_committed(
    query_of, one, produce, settings, caplog, change
):
    """Whoever wants no commits gets none."""
    produce(one, [b"x"] * 5)
    query = query_of({**settings, **change})
    query.run(timeout=600)
    assert query.lag() == 0 and committed(settings) == {}
    assert warnings_in(caplog) == []


def test_a_slow_commit_delays_nobody_and_the_last_offsets_win(
    spark, one, produce, settings, caplog
):
    """Commits happen in the background; while one is slow, only the newest waits for it."""
    produce(one, [b"x"] * 5)
    client = KafkaClient(spark, settings)
    progress = GroupProgress(spark, settings, client.topic_ids([one]))
    begun, may_end, asked = threading.Event(), threading.Event(), []

    def offsets(end):
        asked.append(end)
        return {TopicAndPartition(one, 0): end}

    def slow():
        begun.set()
        assert may_end.wait(600)
        return offsets(1)

    progress.commit(slow)
    assert begun.wait(600)
    for end in (2, 3, 4):
        progress.commit(lambda end=end: offsets(end))
    assert asked == [] and committed(settings) == {}
    may_end.set()
    progress.wait()
    assert asked == [1, 4] and list(committed(settings).values()) == [4]
    progress.close()
    client.close()


@pytest.mark.long
def test_a_commit_that_gets_no_answer_is_made_up_for(spark, tmp_path, caplog):
    """A broker that goes away after a batch stops no query; the next run commits the batch."""
    with LocalKafka() as broker:
        broker.create_topic("events", partitions=1)
        with KafkaProducer(bootstrap_servers=broker.bootstrap_servers) as producer:
            for _ in range(10):
                producer.send("events", b"x").get(10)
        settings = {
            "bootstrap.servers": broker.bootstrap_servers, "group.id": "scoring",
            "auto.offset.reset": "earliest", "request.timeout.ms": "2000",
            "default.api.timeout.ms": "2000",
        }  # fmt: skip
        calls = []

        def lose_the_broker(df, batch_id):
            calls.append(df.count())
            broker.kill()

        with KafkaQuery(spark, ["events"], settings, tmp_path / "checkpoint") as query:
            query.foreachBatch(lose_the_broker)
            query.run(until=lambda: calls and query.finished(), timeout=600, interval=0.5)
            (warning,) = warnings_in(caplog)
            assert "gave no answer" in warning
            broker.start()
            query.run(timeout=600)
        assert calls == [10] and list(committed(settings).values()) == [10]


def test_a_group_that_works_again_is_reported_when_it_fails_again(
    spark, one, produce, settings, caplog
):
    """A warning is not repeated, unless a commit has succeeded in between."""
    produce(one, [b"x"] * 5)
    client = KafkaClient(spark, settings)
    place, ids = TopicAndPartition(one, 0), client.topic_ids([one])
    progress = GroupProgress(spark, settings, ids)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            commit(settings, one, 3)
            for _ in range(3):
                progress.commit(lambda: {place: 4})
                progress.wait()
            assert list(committed(settings).values()) == [3]
            client.commit({place: 3}, ids, by_query=True)
            progress.commit(lambda: {place: 3})
            progress.wait()
    assert len(warnings_in(caplog)) == 2
    progress.close()
    client.close()


def test_a_dstream_does_not_resume_from_what_a_query_has_read(spark, one, produce, settings):
    """A query's offsets only show its lag; the stream commits its beginning in their place."""
    produce(one, [b"x"] * 5)
    client, place = KafkaClient(spark, settings), TopicAndPartition(one, 0)
    client.commit({place: 3}, client.topic_ids([one]), by_query=True)
    ssc = new_streaming_context(spark, 1.0)
    stream = KafkaUtils.createDirectStream(ssc, [one], settings)
    assert stream.positions() == {place: 0}
    assert list(committed(settings).values()) == [0]
    ssc.stop(stopSparkContext=False)
    client.close()
