"""Tests of where a stream begins and resumes, and of topics that are deleted and created again."""

import contextlib
import json
import time
import uuid

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import NewPartitions
from kafka.structs import OffsetAndMetadata
from processes import wait_until
from pyspark.streaming import StreamingContext

from helpers.streaming import (
    KafkaUtils,
    OffsetPlanner,
    OffsetRange,
    StreamError,
    TopicAndPartition,
    errors,
    new_streaming_context,
    run_stream,
    source,
    stop_streaming,
)
from helpers.streaming import client as client_module
from helpers.streaming.batches import Batches
from helpers.streaming.client import KafkaClient

AGAIN = "was deleted and created again"


@pytest.fixture
def settings(kafka):
    """A stream's settings: from the topic's end, in a new consumer group."""
    return {
        "bootstrap.servers": kafka.bootstrap_servers,
        "group.id": f"group-{uuid.uuid4()}",
        "auto.offset.reset": "latest",
    }


@pytest.fixture
def one(kafka):
    """A new topic with one partition."""
    name = f"one-{uuid.uuid4()}"
    kafka.create_topic(name, partitions=1)
    return name


def create_again(kafka, name, partitions=1):
    """Delete a topic, and create one of the same name."""
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.delete_topics([name])
    wait_until(lambda: name not in kafka.topics())
    kafka.create_topic(name, partitions=partitions)


def send(kafka, topic, partition, values):
    """Write records to a partition."""
    with KafkaProducer(
        bootstrap_servers=kafka.bootstrap_servers, metadata_max_age_ms=200
    ) as producer:
        wait_until(lambda: partition in (producer.partitions_for(topic) or ()))
        for value in values:
            producer.send(topic, value, partition=partition).get(10)


def committed(spark, settings, partition):
    """Return what the group has committed for a partition; None if nothing."""
    client = KafkaClient(spark, settings)
    found = client.committed([partition])
    client.close()
    return found[partition].offset if partition in found else None


def commit(settings, partition, offset):
    """Commit an offset for the group with another client."""
    with KafkaConsumer(
        bootstrap_servers=settings["bootstrap.servers"], group_id=settings["group.id"]
    ) as consumer:
        place = TopicPartition(partition.topic, partition.partition)
        consumer.assign([place])
        consumer.commit({place: OffsetAndMetadata(offset, "", -1)})


def collected(ssc, topic, settings, **options):
    """Return a stream, and the list that it fills with values."""
    values = []
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings, **options)
    stream.foreachRDD(lambda rdd: values.extend(value for _, value in rdd.collect()))
    return stream, values


@pytest.mark.parametrize("reset", ["latest", "none"])
def test_a_partition_added_while_the_stream_is_down_is_read_from_its_beginning(
    spark, kafka, one, settings, reset
):
    """A topic that grows loses no records, whatever auto.offset.reset says."""
    OffsetPlanner(spark, [one], settings).close()  # the group begins
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.create_partitions({one: NewPartitions(2)})
    send(kafka, one, 1, [b"early"] * 3)
    planner = OffsetPlanner(spark, [one], {**settings, "auto.offset.reset": reset})
    assert planner.next_batch() == [OffsetRange(one, 1, 0, 3)]
    planner.close()


def test_a_partition_whose_lookup_fails_is_found_later(spark, kafka, one, settings, monkeypatch):
    """A broker that is away while a new partition is looked up leaves the planner as it was."""
    planner = OffsetPlanner(spark, [one], settings)
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.create_partitions({one: NewPartitions(2)})
    send(kafka, one, 1, [b"early"] * 3)
    begins, calls = planner._client.begins, []

    def fails_once(partitions):
        calls.append(partitions)
        if len(calls) == 1:
            raise errors.BrokerAwayError("no answer")
        return begins(partitions)

    monkeypatch.setattr(planner._client, "begins", fails_once)
    with pytest.raises(errors.BrokerAwayError):
        planner.next_batch()
    assert planner.positions() == {TopicAndPartition(one, 0): 0}
    assert planner.next_batch() == [OffsetRange(one, 1, 0, 3)]
    planner.close()


def test_a_partition_that_had_no_records_is_not_read_from_its_beginning_later(
    spark, kafka, topic, settings
):
    """Offsets committed by hand cover all partitions, also those in which nothing was read."""
    settings = {**settings, "enable.auto.commit": "false"}
    send(kafka, topic, 0, [b"old"] * 3)
    send(kafka, topic, 1, [b"old"] * 4)
    ssc = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(ssc, [topic], settings)
    stream.foreachRDD(lambda rdd: rdd.offsetRanges() and stream.commitAsync(rdd.offsetRanges()))
    ssc.start()
    send(kafka, topic, 0, [b"new"] * 5)
    first = TopicAndPartition(topic, 0)
    run_stream(ssc, until=lambda: committed(spark, settings, first) == 8, timeout=300)
    planner = OffsetPlanner(spark, [topic], settings)
    assert planner.positions() == {first: 8, TopicAndPartition(topic, 1): 4}
    planner.close()


def test_offsets_committed_by_hand_expire_together(spark, kafka, topic, settings, monkeypatch):
    """A partition at rest keeps its offset as long as those that move on: all are repeated."""
    monkeypatch.setattr(source, "REPEAT_SECONDS", 0.2)
    settings = {**settings, "enable.auto.commit": "false", "auto.offset.reset": "earliest"}
    commits = []
    send(kafka, topic, 0, [b"x"] * 2)
    commit(settings, TopicAndPartition(topic, 0), 1)
    commit(settings, TopicAndPartition(topic, 1), 0)
    ssc = new_streaming_context(spark, 0.5)
    stream, _ = collected(ssc, topic, settings)
    client = stream._batches.source.planner._client
    send_all = client.commit
    monkeypatch.setattr(
        client, "commit", lambda offsets, *more: (commits.append(offsets), send_all(offsets, *more))
    )
    run_stream(ssc, until=lambda: len(commits) >= 2, timeout=300)
    assert {tuple(offsets.values()) for offsets in commits} == {(1, 0)}


def test_a_new_topic_of_a_known_group_begins_where_it_is_told(spark, kafka, one, produce, settings):
    """Only a topic that the group has read before has partitions that were added since."""
    OffsetPlanner(spark, [one], settings).close()
    other = f"other-{uuid.uuid4()}"
    kafka.create_topic(other, partitions=1)
    produce(other, [b"old"] * 4)
    planner = OffsetPlanner(spark, [one, other], settings)
    assert planner.positions()[TopicAndPartition(other, 0)] == 4
    planner.close()


@pytest.mark.parametrize("reset, start", [("earliest", 0), ("latest", 4), ("none", None)])
def test_a_new_topic_of_a_known_output_begins_where_it_is_told(
    spark, one, produce, settings, caplog, reset, start
):
    """The positions of other topics don't decide where a topic without any begins."""
    produce(one, [b"old"] * 4)
    settings = {**settings, "auto.offset.reset": reset}
    kept = {TopicAndPartition("another", 0): 20}
    if start is None:
        with pytest.raises(StreamError, match=r"auto\.offset\.reset is none, and group .* has no"):
            OffsetPlanner(spark, [one], settings, positions=kept)
        return
    planner = OffsetPlanner(spark, [one], settings, positions=kept)
    assert planner.positions() == {TopicAndPartition(one, 0): start}
    assert "without a committed offset" not in caplog.text
    planner.close()


def test_a_stream_with_a_checkpoint_begins_where_it_began_first(
    spark, kafka, one, produce, settings, tmp_path
):
    """What arrives between a stream's start and its first batch is read after a crash as well."""
    values = []

    def set_up():
        ssc = new_streaming_context(spark, 0.5)
        without_group = {k: v for k, v in settings.items() if k != "group.id"}
        stream = KafkaUtils.createDirectStream(ssc, [one], without_group)
        stream.foreachRDD(lambda rdd: values.extend(value for _, value in rdd.collect()))
        ssc.checkpoint(str(tmp_path))
        return ssc

    produce(one, [b"old"] * 5)
    first = set_up()
    first.start()
    wait_until(lambda: list(tmp_path.glob("checkpoint-*")))
    stop_streaming(first, gracefully=False)
    produce(one, [b"new"] * 3)
    again = StreamingContext.getOrCreate(str(tmp_path), lambda: pytest.fail("no checkpoint"))
    again.start()
    try:
        wait_until(lambda: planned(tmp_path) == 3)
    finally:
        stop_streaming(again, gracefully=False)


def test_a_checkpoint_that_was_moved_is_not_begun_anew(spark, one, produce, settings, tmp_path):
    """A recovered stream whose plans are gone says so, instead of beginning at the topic's end."""
    ssc = new_streaming_context(spark, 0.5)
    stream, values = collected(ssc, one, {**settings, "auto.offset.reset": "earliest"})
    ssc.checkpoint(str(tmp_path / "first"))
    produce(one, [b"x"] * 3)
    assert not stream._batches._recovery.definition().begun
    run_stream(ssc, until=lambda: len(values) == 3, timeout=300)
    kept = stream._batches._recovery.definition()
    (tmp_path / "first").rename(tmp_path / "second")
    with pytest.raises(StreamError, match=r"whose plans are missing: .*/first/.* is empty"):
        Batches(kept)._open()


def test_a_clock_that_was_set_back_is_said(spark, one, produce, settings, tmp_path):
    """A batch that was planned later than now would be passed over, and its records be lost."""
    ssc = new_streaming_context(spark, 0.5)
    stream, values = collected(ssc, one, {**settings, "auto.offset.reset": "earliest"})
    ssc.checkpoint(str(tmp_path))
    produce(one, [b"x"] * 3)
    run_stream(ssc, until=lambda: len(values) == 3, timeout=300)
    kept = stream._batches._recovery.definition()
    *_, plan = sorted(tmp_path.glob("kafka-plans/*/*.json"))
    later = round(time.time() * 1000) + 3_600_000
    plan.rename(plan.with_name(f"{later:0{len(plan.stem)}}.json"))
    with pytest.raises(StreamError, match=r"is planned 3\d{3} s in the future: the clock was set"):
        Batches(kept)._open()


def planned(folder):
    """Return how many records the plans of a checkpoint have, all of them after the old ones."""
    plans = [json.loads(file.read_text()) for file in folder.glob("kafka-plans/*/*.json")]
    ranges = [part for plan in plans for part in plan["ranges"]]
    assert all(start >= 5 for _, _, start, *_ in ranges)
    return sum(end - start for _, _, start, end, _ in ranges)


def test_offsets_of_another_topic_of_the_same_name_are_refused(
    spark, kafka, one, produce, settings
):
    """A local broker that is started again has other records at the same offsets."""
    produce(one, [b"new"] * 10)
    client = KafkaClient(spark, settings)
    client.commit({TopicAndPartition(one, 0): 7}, {one: "the id of the topic before"})
    client.close()
    with pytest.raises(StreamError, match=f"{AGAIN}.*Begin with a new output.*or read the new"):
        OffsetPlanner(spark, [one], settings)


@pytest.mark.parametrize("begins_with_ids", [True, False])
def test_a_broker_without_topic_ids_is_not_taken_for_another_cluster(
    spark, one, produce, settings, monkeypatch, begins_with_ids
):
    """A group continues when its cluster begins to give ids to topics, or another gives none."""
    produce(one, [b"x"] * 10)
    partition = TopicAndPartition(one, 0)
    earliest = {**settings, "auto.offset.reset": "earliest"}
    client = KafkaClient(spark, settings)
    given = client.topic_ids([one])
    client.close()
    for has_ids, start, end in ((begins_with_ids, 0, 3), (not begins_with_ids, 3, 5)):
        monkeypatch.setattr(client_module, "_NO_ID", "" if has_ids else given[one])
        planner = OffsetPlanner(spark, [one], earliest)
        assert planner.topic_ids() == (given if has_ids else {one: ""})
        assert planner.positions() == {partition: start}
        planner.commit({partition: end})
        planner.close()


def test_kept_positions_of_another_topic_are_refused(spark, kafka, one, produce, settings):
    """A checkpoint's, or a sink's, offsets are of one topic, not of a name."""
    produce(one, [b"old"] * 5)
    planner = OffsetPlanner(spark, [one], {**settings, "auto.offset.reset": "earliest"})
    planner.next_batch()
    kept, ids = planner.positions(), planner.topic_ids()
    create_again(kafka, one)
    produce(one, [b"new"] * 8)
    with pytest.raises(StreamError, match=AGAIN):
        planner.next_batch()
    with pytest.raises(StreamError, match=AGAIN):
        planner.commit(kept)
    planner.close()
    with pytest.raises(StreamError, match=AGAIN):
        OffsetPlanner(spark, [one], settings, positions=kept, topic_ids=ids)


def test_a_running_stream_stops_when_its_topic_is_created_again(
    spark, kafka, one, produce, settings
):
    """The first records of the new topic must not be taken for done."""
    produce(one, [b"old"] * 5)
    ssc = new_streaming_context(spark, 0.5)
    stream, values = collected(ssc, one, {**settings, "auto.offset.reset": "earliest"})
    made = []

    def make_again():
        if len(values) == 5 and stream.lag() == 0 and not made:
            made.append(create_again(kafka, one))
            produce(one, [b"new"] * 8)
        return False

    with pytest.raises(StreamError, match=f"{AGAIN}|doesn't exist"):
        run_stream(ssc, until=make_again, timeout=300)
    assert values == ["old"] * 5


def test_an_idle_stream_keeps_its_offsets_alive(
    spark, kafka, one, produce, settings, monkeypatch
):
    """Kafka forgets offsets that are not committed for a while, and a restart would begin anew."""
    monkeypatch.setattr(source, "RECOMMIT_SECONDS", 0.5)
    produce(one, [b"x"] * 5)
    ssc = new_streaming_context(spark, 0.5)
    stream, values = collected(ssc, one, {**settings, "auto.offset.reset": "earliest"})
    partition, forgotten = TopicAndPartition(one, 0), []

    def is_committed_again():
        if len(values) == 5 and stream.lag() == 0 and not forgotten:
            with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
                forgotten.append(admin.delete_groups([settings["group.id"]]))
        return forgotten and committed(spark, settings, partition) == 5

    run_stream(ssc, until=is_committed_again, timeout=300)


def test_an_idle_stream_that_commits_by_hand_keeps_the_offsets_of_an_earlier_one_alive(
    spark, kafka, one, produce, settings, monkeypatch
):
    """What an earlier stream of the group committed by hand stays, though this one asks nothing."""
    monkeypatch.setattr(source, "RECOMMIT_SECONDS", 0.5)
    settings = {**settings, "auto.offset.reset": "earliest", "enable.auto.commit": "false"}
    partition, forgotten = TopicAndPartition(one, 0), []
    produce(one, [b"x"] * 5)
    ssc = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(ssc, [one], settings)
    stream.foreachRDD(lambda rdd: stream.commitAsync(rdd.offsetRanges()))
    run_stream(ssc, until=lambda: committed(spark, settings, partition) == 5, timeout=300)

    ssc = new_streaming_context(spark, 0.5)
    stream, _ = collected(ssc, one, settings)

    def is_committed_again():
        if not forgotten:
            assert committed(spark, settings, partition) == 5
            with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
                forgotten.append(admin.delete_groups([settings["group.id"]]))
            assert forgotten == [{settings["group.id"]: "OK"}]
        return committed(spark, settings, partition) == 5

    run_stream(ssc, until=is_committed_again, timeout=300)


@pytest.mark.parametrize("period", ["RECOMMIT_SECONDS", "REPEAT_SECONDS"])
def test_a_stream_that_commits_by_hand_leaves_others_commits_alone(
    spark, kafka, one, produce, settings, monkeypatch, period
):
    """What another program commits for the group, forwards or back, is not overwritten."""
    monkeypatch.setattr(source, period, 0.2)
    settings = {**settings, "auto.offset.reset": "earliest", "enable.auto.commit": "false"}
    partition, looks = TopicAndPartition(one, 0), []
    restore = source.Source._restore

    def note(self, repeats):
        looks.append(restore(self, repeats))

    monkeypatch.setattr(source.Source, "_restore", note)
    produce(one, [b"x"] * 5)
    commit(settings, partition, 2)
    ssc = new_streaming_context(spark, 0.5)
    stream, _ = collected(ssc, one, settings)
    moved = []

    def is_looked_at_again():
        if looks and not moved:
            with stream._batches.source._sending:  # not between a look and its commit
                commit(settings, partition, 4)
            moved.append(len(looks))
        return moved and len(looks) >= moved[0] + 3

    run_stream(ssc, until=is_looked_at_again, timeout=300)
    assert committed(spark, settings, partition) == 4


def test_of_two_programs_in_a_group_the_one_that_commits_second_stops(
    spark, one, produce, settings
):
    """A program that is started twice neither skips events nor moves the group back."""
    produce(one, [b"x"] * 20)
    settings = {**settings, "auto.offset.reset": "earliest"}
    partition = TopicAndPartition(one, 0)
    first, second = (OffsetPlanner(spark, [one], settings) for _ in range(2))
    for end in (10, 15):
        second.commit({partition: end})
    with pytest.raises(StreamError, match=r"committed offset 15 of .*a separate group\.id"):
        first.commit({partition: 10})
    assert committed(spark, settings, partition) == 15
    second.commit({partition: 20})
    first.close()
    second.close()


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_stream_stops_when_another_program_commits_for_its_group(
    spark, kafka, one, produce, settings, by_hand
):
    """What another program has committed is reported, and not replaced."""
    settings = {**settings, "auto.offset.reset": "earliest", "enable.auto.commit": not by_hand}
    partition = TopicAndPartition(one, 0)
    produce(one, [b"x"] * 10)

    def process(rdd):
        if rdd.offsetRanges():
            commit(settings, partition, 3)
            if by_hand:
                stream.commitAsync(rdd.offsetRanges())

    ssc = new_streaming_context(spark, 0.5)
    stream = KafkaUtils.createDirectStream(ssc, [one], settings)
    stream.foreachRDD(process)
    with pytest.raises(StreamError, match="another program has committed offset 3 of"):
        run_stream(ssc, until=lambda: False, timeout=300)
    assert committed(spark, settings, partition) == 3


@pytest.mark.parametrize("positions", [{}, {0: 2}])
def test_offsets_that_the_group_had_at_the_start_are_replaced(
    spark, one, produce, settings, positions
):
    """A stream that resumes from a sink or a checkpoint moves its group there, even back."""
    produce(one, [b"x"] * 10)
    partition = TopicAndPartition(one, 0)
    commit(settings, partition, 7)
    kept = {TopicAndPartition(one, number): offset for number, offset in positions.items()}
    earliest = {**settings, "auto.offset.reset": "earliest"}
    planner = OffsetPlanner(spark, [one], earliest, positions=kept)
    assert planner.positions() == {partition: positions.get(0, 0)}
    planner.commit({partition: 4})
    assert committed(spark, settings, partition) == 4
    planner.close()


def test_a_commit_without_an_answer_is_not_taken_for_another_programs(
    spark, one, produce, settings, monkeypatch
):
    """Kafka may have stored offsets although its answer was lost; the next commit replaces them."""
    produce(one, [b"x"] * 20)
    partition = TopicAndPartition(one, 0)
    planner = OffsetPlanner(spark, [one], {**settings, "auto.offset.reset": "earliest"})
    send_all = planner._client.commit

    def lose_the_answer(*arguments):
        send_all(*arguments)
        raise errors.BrokerAwayError("no answer")

    monkeypatch.setattr(planner._client, "commit", lose_the_answer)
    with pytest.raises(errors.BrokerAwayError):
        planner.commit({partition: 10})
    monkeypatch.setattr(planner._client, "commit", send_all)
    planner.commit({partition: 20})
    assert committed(spark, settings, partition) == 20
    planner.close()


def replace_by_a_file(folder, kept):
    """Put a file where a folder was; a stream may make the folder again in between."""
    folder.rename(kept)
    for _ in range(1_000):
        try:
            return folder.touch(exist_ok=False)
        except FileExistsError:
            for file in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # a draft
                    file.rename(kept / file.name)
            with contextlib.suppress(OSError):  # a file was added
                folder.rmdir()
    raise AssertionError("the folder was made again a thousand times")


def test_a_plan_that_cannot_be_written_is_written_later(
    spark, kafka, one, produce, settings, tmp_path, caplog
):
    """A checkpoint's file system that fails for seconds costs time, but no records."""
    ssc = new_streaming_context(spark, 0.5)
    stream, values = collected(ssc, one, {**settings, "auto.offset.reset": "earliest"})
    ssc.checkpoint(str(tmp_path))
    numbers = [b"%d" % number for number in range(30)]
    away, back = [], []

    def is_done():
        plans = list(tmp_path.glob("kafka-plans/*"))
        if plans and not away:  # a file stands where the folder was
            replace_by_a_file(plans[0], tmp_path / "away")
            away.append(plans[0])
            produce(one, numbers)
        if away and not back and "tries again" in caplog.text:
            away[0].unlink()
            away[0].mkdir(exist_ok=True)
            for file in (tmp_path / "away").iterdir():
                file.rename(away[0] / file.name)
            back.append(True)
        return back and len(values) >= len(numbers) and stream.lag() == 0

    run_stream(ssc, until=is_done, timeout=600)
    assert values == [number.decode() for number in numbers]
    assert committed(spark, settings, TopicAndPartition(one, 0)) == len(numbers)


def test_a_plan_that_is_never_written_stops_the_stream(
    spark, kafka, one, produce, settings, tmp_path, monkeypatch
):
    """No later batch is committed past the records that have no plan."""
    monkeypatch.setattr(errors, "AWAY_SECONDS", 1)
    ssc = new_streaming_context(spark, 0.5)
    _, values = collected(ssc, one, {**settings, "auto.offset.reset": "earliest"})
    (tmp_path / "kafka-plans").touch()  # no folder can be made here
    ssc.checkpoint(str(tmp_path))
    produce(one, [b"x"] * 5)
    with pytest.raises(StreamError, match=r"the next batch can't be planned: .*kafka-plans"):
        run_stream(ssc, until=lambda: False, timeout=300)
    assert values == []
    assert committed(spark, settings, TopicAndPartition(one, 0)) == 0


def test_a_stream_that_runs_long_remembers_only_what_it_needs(
    spark, one, produce, settings
):
    """A stream without a checkpoint has no plans to keep, whose list would grow for ever."""
    ssc = new_streaming_context(spark, 0.2)
    stream, values = collected(ssc, one, {**settings, "auto.offset.reset": "earliest"})
    deadline = time.monotonic() + 60

    def three_batches():
        if len(values) < 3 and stream.lag() == 0 and time.monotonic() < deadline:
            produce(one, [b"x"])
        return len(values) >= 3 and stream.lag() == 0

    run_stream(ssc, until=three_batches, timeout=300)
    batches = stream._batches
    assert not batches._recovery._committed and batches.ledger.is_settled()
    assert not batches.source._being_read and len(batches.ledger._kept) <= 10


def test_what_is_asked_for_is_committed_when_its_batch_has_succeeded(
    spark, kafka, one, produce, settings, monkeypatch
):
    """A slow batch that fails after `commitAsync` is read again."""
    monkeypatch.setattr(source, "RECOMMIT_SECONDS", 0.1)
    partition, seen = TopicAndPartition(one, 0), []
    by_hand = {**settings, "auto.offset.reset": "earliest", "enable.auto.commit": "false"}
    produce(one, [b"x"] * 5)
    ssc = new_streaming_context(spark, 0.2)
    stream = KafkaUtils.createDirectStream(ssc, [one], by_hand)

    def fail_slowly(rdd):
        if not rdd.isEmpty():
            stream.commitAsync(rdd.offsetRanges())
            plans = len(calls)
            wait_until(lambda: len(calls) > plans + 5)  # several chances to commit too early
            seen.append(committed(spark, settings, partition))
            raise ValueError("not this one")

    calls = []
    usual = stream._batches.source.commit_when_idle
    monkeypatch.setattr(
        stream._batches.source, "commit_when_idle", lambda: (usual(), calls.append(1))
    )
    stream.foreachRDD(fail_slowly)
    with pytest.raises(StreamError, match="not this one"):
        run_stream(ssc, until=lambda: False, timeout=300)
    assert seen == [None]
    assert committed(spark, settings, partition) is None


def test_only_partitions_that_exist_have_positions(spark, kafka, one, settings):
    """A topic with fewer partitions than an output knows of can be read."""
    kept = {TopicAndPartition(one, 0): 0, TopicAndPartition(one, 7): 3,
            TopicAndPartition("another", 0): 5}  # fmt: skip
    planner = OffsetPlanner(spark, [one], settings, positions=kept)
    assert planner.positions() == {TopicAndPartition(one, 0): 0}
    assert planner.committed() == {}
    planner.close()


@pytest.mark.long
def test_a_stream_that_is_behind_catches_up_with_larger_batches(
    spark, kafka, one, produce, settings
):
    """Batches that take longer than an interval don't pile up, each as small as the last."""
    sizes, offsets, sent = [], [], []
    ssc = new_streaming_context(spark, 0.2)
    earliest = {**settings, "auto.offset.reset": "earliest"}
    stream = KafkaUtils.createDirectStream(ssc, [one], earliest)
    plans = []
    usual = stream._batches.source.plan

    def plan(interval):
        produce(one, [b"x"])  # one record an interval
        usual(interval)
        plans.append(interval)

    stream._batches.source.plan = plan

    def process(df, batch_id):
        if not sizes:  # the first batch takes twenty intervals
            begun = len(plans)
            wait_until(lambda: len(plans) > begun + 20)
            sent.append(len(plans))
        found = [row.offset for row in df.collect()]
        sizes.append(len(found))
        offsets.extend(found)

    stream.foreachBatch(process)
    run_stream(ssc, until=lambda: sent and len(offsets) >= sent[0], timeout=300)
    assert sorted(offsets) == list(range(len(offsets)))
    assert max(sizes) > 10
