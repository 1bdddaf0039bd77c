"""The Parquet sink: each event is stored once, despite retries, crashes and late writers."""

import itertools
import json
import os
import re
import shutil
import threading
from pathlib import Path

import keras
import pytest
from processes import wait_until
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F

from helpers.records import BadRecordError
from helpers.sinks import (
    Counts,
    ParquetSink,
    SinkError,
    check_topics,
    commits,
    lease,
    read_bad_records,
    read_scored,
)
from helpers.sinks.progress import Progress
from helpers.spark import JsonFolder
from helpers.spark import files as files_of_spark
from helpers.streaming import (
    KafkaUtils,
    OffsetRange,
    TopicAndPartition,
    new_streaming_context,
)
from helpers.transformers import ModelPredictor

PARTITION = TopicAndPartition("events", 0)


def rows(spark, start, end, bad=(), topic="events"):
    """Return scored records of a partition, some of them bad, as from a batch function."""
    offset = F.col("id")
    is_bad = offset.isin(list(bad))
    vector = array_to_vector(F.array(F.lit(0.75), F.lit(0.25)))
    content = F.struct(
        F.lit(b"key").alias("key"), F.lit(b"\xffrubbish").alias("value"),
        F.lit("it is no JSON").alias("reason"),
    )  # fmt: skip
    return spark.range(start, end).select(
        F.when(~is_bad, 100_000 + offset).alias("EventId"),
        F.when(~is_bad, vector).alias("prediction"),
        F.when(~is_bad, F.lit(0.0)).alias("predicted_index"),
        F.lit(topic).alias("topic"),
        F.lit(0).alias("partition"),
        offset.alias("offset"),
        F.timestamp_millis(1_700_000_000_000 + offset).alias("timestamp"),
        F.when(is_bad, content).alias("bad"),
        F.lit(None).cast("array<string>").alias("unused"),
    )


class Stream:
    """A stream's starting offsets, and the current ids of its topics."""

    def __init__(self, starts=None):
        self.ids = {"events": "id-1"}
        self.starts = starts or {}

    def plan(self, start, end, topic="events"):
        """Return the offset ranges of a batch."""
        return [OffsetRange(topic, 0, start, end, self.ids.get(topic))]


class Sink(ParquetSink):
    """A sink that begins with its own stream, and checks topic ids as a stream does."""

    def __init__(self, spark, path, stream=None, signal_index=0, **options):
        super().__init__(spark, path, signal_index=signal_index, **options)
        self.stream = stream or Stream()

    def __enter__(self):
        super().__enter__()
        self.begin(self.stream.starts, self.stream.ids)
        return self

    def write(self, scored, ranges):
        """Write a batch."""
        return super().write(scored, ranges, lambda: check_topics(ranges, self.stream.ids))


def write(sink, spark, start, end, bad=(), topic="events"):
    """Write the records of an offset range as a batch."""
    ranges = sink.stream.plan(start, end, topic)
    return sink.write(rows(spark, start, end, bad, topic), ranges)


def stored(spark, path):
    """Return the stored offsets, sorted."""
    return sorted(row.offset for row in read_scored(spark, path).collect())


def stored_ids(path):
    """Return the ids of the topics in the last manifest."""
    last = max(Path(path).glob("commits/*.json"))
    return json.loads(last.read_text())["topic_ids"]


@pytest.fixture
def path(tmp_path):
    """A path for a sink."""
    return str(tmp_path / "scored")


@pytest.fixture
def impatient(monkeypatch):
    """Shorten the time after which a dead writer is noticed."""
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 2)


def end_heartbeat(sink):
    """Let a sink no longer renew its claim, as if its job had died."""
    sink._lease._closed.set()
    sink._lease._thread.join()


def warnings_in(caplog):
    """Return what the kit has logged; the tests' clients of Kafka log as well."""
    return [each.getMessage() for each in caplog.records if each.name.startswith("helpers.")]


def test_what_is_stored_of_an_event(spark, path):
    """An event is stored with its id, scores, class, offset, time, batch and model version."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 2)
    row = read_scored(spark, path).orderBy("offset").collect()[1].asDict()
    assert row.pop("event_time").timestamp() == pytest.approx(1_700_000_000.001)
    assert row == {
        "EventId": 100_001, "probability_0": 0.75, "probability_1": 0.25, "predicted_index": 0,
        "topic": "events", "partition": 0, "offset": 1, "batch": 0, "model_version": None,
    }  # fmt: skip


def test_a_batch_that_comes_again_is_not_stored_again(spark, path):
    """A batch that comes again is stored once, even after a restart."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        assert sink.left(sink.stream.plan(0, 10)) == []
        write(sink, spark, 0, 10)
    with Sink(spark, path) as sink:  # after a restart
        assert sink.positions() == {PARTITION: 10}
        write(sink, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_of_a_batch_that_overlaps_only_the_rest_is_stored(spark, path):
    """Of a batch that overlaps stored offsets, only the new offsets are stored."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        write(sink, spark, 5, 15)
        assert sink.positions() == {PARTITION: 15}
    assert stored(spark, path) == list(range(15))


@pytest.mark.parametrize("signal_index, signal", [(0, 8), (1, 0)])
def test_a_batch_is_counted_while_it_is_written(spark, path, signal_index, signal):
    """`write` returns a batch's counts and unused fields, but not if it is stored already."""
    scored = rows(spark, 0, 10, bad=[3, 7])
    scored = scored.withColumn("unused", F.array(F.lit("Weight"), F.lit("Run")))
    with Sink(spark, path, signal_index=signal_index, on_bad_record="skip") as sink:
        counts = sink.write(scored, sink.stream.plan(0, 10))
        assert counts == (8, signal, 2, ["Run", "Weight"])
        assert sink.write(scored, sink.stream.plan(0, 10)) == Counts()


def test_a_gap_between_batches_is_told(spark, path, caplog):
    """Missing offsets between two batches are logged."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        write(sink, spark, 15, 20)
    assert "offsets 10 to 14 of events, partition 0, are in no batch" in caplog.text


def test_files_without_a_manifest_do_not_count_and_the_next_sink_removes_them(
    spark, path, tmp_path
):
    """Files of an interrupted batch are not read, and the next sink removes them."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
    data = tmp_path / "scored" / "data"
    (batch,) = data.glob("*/*")
    beside_it = batch.with_name("interrupted")
    for folder in (data / "interrupted", data / "merged-interrupted", beside_it):
        rows(spark, 10, 20).write.parquet(str(folder))
    assert stored(spark, path) == list(range(10))
    with Sink(spark, path) as sink:
        assert len(list(data.iterdir())) == 3  # the dead sink may only be slow
        assert beside_it.exists()
        write(sink, spark, 10, 20)
        assert len(list(data.iterdir())) == 1
        assert len(list(data.glob("*/*"))) == 2 and not beside_it.exists()
    assert stored(spark, path) == list(range(20))


def test_reading_events_does_not_load_the_bytes_of_bad_records(spark, path):
    """A thousand bad records of a megabyte each don't fill Java's memory when events are read."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
    scan = read_scored(spark, path)._jdf.queryExecution().executedPlan().collectLeaves().head()
    assert "bad:struct<reason:string>" in scan.requiredSchema().catalogString()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 40)])
def test_what_a_site_lets_spark_skip_is_an_error(spark, path, monkeypatch, damage):
    """A file that is missing or damaged is not left out of the numbers without a word."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
    skipping = ("spark.sql.files.ignoreMissingFiles", "spark.sql.files.ignoreCorruptFiles")
    for name in skipping:
        spark.conf.set(name, "true")
    try:
        found = read_scored(spark, path)
        damage(next(Path(path).glob("data/*/*/*.parquet")))
        with pytest.raises(Exception, match=r"(?i)parquet|file"):
            found.select("EventId").collect()
    finally:
        for name in skipping:
            spark.conf.unset(name)


def test_a_batch_that_fails_leaves_nothing_behind(spark, path, tmp_path):
    """A failed batch leaves no files, and can be written again."""
    reason = F.raise_error(F.lit("broken")).cast("long")
    # One task: Spark doesn't wait for the others of a failed job, and one may still make a folder.
    broken = rows(spark, 0, 10).coalesce(1).withColumn("EventId", reason)
    with Sink(spark, path) as sink:
        with pytest.raises(Exception, match="broken"):
            sink.write(broken, sink.stream.plan(0, 10))
        assert list((tmp_path / "scored" / "data").glob("*/*")) == []
        assert sink.left(sink.stream.plan(0, 10))
        write(sink, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_a_second_sink_on_a_path_is_refused(spark, path, impatient):
    """A second sink on a path is refused while the first one is open."""
    with Sink(spark, path) as sink:
        with (
            pytest.raises(SinkError, match=r"another job writes to .*scored: stop it, or give"),
            Sink(spark, path),
        ):
            pass
        write(sink, spark, 0, 10)
    with Sink(spark, path) as sink:  # the path is free again
        assert sink.positions() == {PARTITION: 10}


def test_a_slow_look_at_a_healthy_sink_does_not_take_its_path(spark, path, impatient, monkeypatch):
    """A file system that answers late hides no heartbeat."""
    with Sink(spark, path) as sink:
        look = files_of_spark.JsonFolder.changed_at
        pause = threading.Event()

        def look_slowly(folder, name):
            found = look(folder, name)
            pause.wait(lease.PATIENCE_SECONDS + 0.5)
            return found

        with monkeypatch.context() as slow:
            slow.setattr(files_of_spark.JsonFolder, "changed_at", look_slowly)
            with pytest.raises(SinkError, match="another job writes to"), Sink(spark, path):
                pass
        write(sink, spark, 0, 10)


def test_a_sink_whose_job_died_is_taken_over(spark, path, impatient):
    """A sink takes over the path of a dead one, which can't write if it wakes up."""
    dead = Sink(spark, path)
    dead.__enter__()
    end_heartbeat(dead)
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        # It was only slow, and now is late.
        with pytest.raises(SinkError, match="another job writes to"):
            write(dead, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_a_late_sink_cannot_commit_over_another(spark, path, impatient, monkeypatch):
    """A sink that lost its path can't commit, even between its last check and its commit."""
    late = Sink(spark, path)
    late.__enter__()
    end_heartbeat(late)
    monkeypatch.setattr(late._lease, "check", lambda: None)
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
    with pytest.raises(SinkError, match="another job writes to"):
        write(late, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_nobody_waits_for_a_sink_that_has_ended(spark, path, monkeypatch):
    """A closed sink's path is free at once."""
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 3600)
    for _ in range(3):
        with Sink(spark, path) as sink:
            assert sink.positions() == {}


def test_a_failed_heartbeat_is_not_the_last_one(spark, path, impatient, caplog):
    """A sink keeps its path through failed heartbeats, which are logged once."""
    failures = itertools.count()

    def touch_when_back(name):
        if next(failures) < 3:
            raise OSError("the file system is away")
        touch(name)

    with Sink(spark, path) as sink:
        claims = sink._lease._claims
        touch, claims.touch = claims.touch, touch_when_back
        name = claims.names()[-1]
        before = claims.changed_at(name)
        wait_until(lambda: claims.changed_at(name) > before)
        with pytest.raises(SinkError, match="another job writes to"), Sink(spark, path):
            pass
        write(sink, spark, 0, 10)
    assert caplog.text.count("can't be renewed, and is retried: the file system is away") == 1


def test_of_many_that_find_a_sink_dead_one_takes_its_path(spark, path, impatient):
    """Of several sinks that find a dead one, exactly one takes over its path."""
    dead = Sink(spark, path)
    dead.__enter__()
    end_heartbeat(dead)
    opened, refused, done = [], [], threading.Event()

    def open_sink():
        try:
            with ParquetSink(spark, path, signal_index=0) as sink:
                opened.append(sink)
                done.wait(600)
                sink._lease.check()
        except Exception as error:
            refused.append(error)

    threads = [threading.Thread(target=open_sink) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(refused) >= 3)
    done.set()
    for thread in threads:
        thread.join(60)
    assert (len(opened), [type(error) for error in refused]) == (1, [SinkError] * 3)
    with pytest.raises(SinkError, match="another job writes to"):
        write(dead, spark, 0, 10)


def test_a_path_that_was_removed_is_not_another_job(spark, path):
    """The message says what happened, instead of naming a job that doesn't exist."""
    removed = pytest.raises(SinkError, match="were removed while the sink was open")
    with removed, Sink(spark, path) as sink:
        shutil.rmtree(path)
        write(sink, spark, 0, 10)


def test_a_forgotten_job_does_not_write_to_the_path_of_a_new_one(spark, path):
    """After a removal, a new sink begins with the same numbers; the old one must not take part."""
    forgotten = Sink(spark, path)
    with pytest.raises(SinkError, match="were removed while the sink was open"), forgotten:
        write(forgotten, spark, 0, 10)
        shutil.rmtree(path)
        with Sink(spark, path) as new:
            write(new, spark, 0, 5)
            try:
                write(forgotten, spark, 10, 20)
            finally:
                write(new, spark, 5, 8)
    assert stored(spark, path) == list(range(8))


@pytest.mark.parametrize(
    "output, message",
    [
        (keras.layers.Dense(3, "softmax"), "distinguishes 3 classes"),
        (keras.layers.Dense(2), "with a softmax over the classes"),
    ],
    ids=["three classes", "logits"],
)
def test_only_two_probabilities_are_stored(spark, path, output, message):
    """The results have columns for two probabilities: nothing is dropped or mistaken for one."""
    network = keras.Sequential([keras.Input((30,)), output])
    records = rows(spark, 0, 10).drop("prediction")
    features = array_to_vector(F.array_repeat(F.lit(0.5), 30))
    scored = ModelPredictor(network).predict(records.withColumn("features", features))
    with Sink(spark, path) as sink:
        with pytest.raises(SinkError, match=message):
            sink.write(scored, sink.stream.plan(0, 10))
        assert sink.positions() == {}


def test_a_start_that_could_not_be_written_is_written_later(spark, path, monkeypatch):
    """After a crash before the first batch, the stream begins at the same place."""
    with ParquetSink(spark, path, signal_index=0) as sink:
        with monkeypatch.context() as failing:
            failing.setattr(files_of_spark.JsonFolder, "write", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                sink.begin({PARTITION: 7}, {"events": "id-1"})
        sink.begin({PARTITION: 7}, {"events": "id-1"})
    with ParquetSink(spark, path, signal_index=0) as sink:
        assert sink.positions() == {PARTITION: 7}


def test_who_waited_too_long_takes_nothing_from_a_healthy_sink(spark, path, monkeypatch):
    """A sink that acts on an outdated view of the claims is refused."""
    dead = Sink(spark, path)
    dead.__enter__()
    end_heartbeat(dead)
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0)
    with Sink(spark, path):
        pass
    with Sink(spark, path) as healthy:
        with monkeypatch.context() as late:
            late.setattr(lease.Lease, "_last_free", lambda self: 0)  # what it saw before it slept
            with pytest.raises(SinkError, match="another job writes to"), Sink(spark, path):
                pass
        write(healthy, spark, 0, 10)
    dead.__exit__()
    assert stored(spark, path) == list(range(10))


def test_a_sink_can_be_closed_when_its_file_system_is_away(spark, path, impatient, caplog):
    """The original error is raised; a claim that can't be released is only logged."""
    with pytest.raises(RuntimeError, match="the network died"), Sink(spark, path) as sink:
        sink._lease._claims.names = lambda: 1 / 0
        raise RuntimeError("the network died")
    assert "can't be released, so the next job there waits" in caplog.text
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)


def test_a_sink_is_closed_although_its_file_system_hangs(
    spark, path, impatient, monkeypatch, caplog
):
    """A renewal that never returns doesn't keep the program from ending."""
    monkeypatch.setattr(lease, "_CLOSE_SECONDS", 0.1)
    hangs, released = threading.Event(), threading.Event()

    def touch(_):
        hangs.set()
        released.wait(60)

    with Sink(spark, path) as sink:
        thread = sink._lease._thread
        sink._lease._claims.touch = touch
        assert hangs.wait(60)
    assert not released.is_set()
    assert "can't be released" in caplog.text and "no answer within 0.1 s" in caplog.text
    released.set()
    thread.join(60)


def test_a_bad_record_stops_a_strict_sink(spark, path):
    """A bad record stops the batch, and none of its records is stored."""
    message = r"events, partition 0, offset 3 is not an event: it is no JSON\. To continue"
    with Sink(spark, path) as sink:
        with pytest.raises(BadRecordError, match=message):
            write(sink, spark, 0, 10, bad=[3, 7])
        assert sink.positions() == {}
    assert stored(spark, path) == []


def test_bad_records_are_skipped_and_kept(spark, path):
    """With `skip`, bad records are kept with value and reason, apart from the events."""
    with Sink(spark, path, on_bad_record="skip") as sink:
        write(sink, spark, 0, 10, bad=[3, 7])
    assert stored(spark, path) == [0, 1, 2, 4, 5, 6, 8, 9]
    kept = read_bad_records(spark, path).orderBy("offset").collect()
    assert [(row.offset, bytes(row.value), row.reason) for row in kept] == [
        (3, b"\xffrubbish", "it is no JSON"), (7, b"\xffrubbish", "it is no JSON"),
    ]  # fmt: skip


def test_a_sink_can_be_moved(spark, path, tmp_path):
    """A sink's folder can be moved and read from its new path."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
    shutil.move(path, tmp_path / "archive")
    assert stored(spark, str(tmp_path / "archive")) == list(range(10))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"on_bad_record": "ignore"}, "on_bad_record is 'ignore': it must be dead-letter, skip,"),
        ({"on_bad_record": "dead-letter"}, "dead letters are sent to Kafka: pass its settings"),
    ],
)
def test_wrong_arguments_are_refused(spark, path, arguments, reason):
    """An invalid `on_bad_record` is refused."""
    with pytest.raises(ValueError, match=reason):
        ParquetSink(spark, path, signal_index=0, **arguments)


def test_a_folder_that_is_no_sink_is_refused(spark, tmp_path):
    """A folder without a sink is refused, not read as an empty one."""
    with pytest.raises(SinkError, match="is not the folder of a ParquetSink: check the path"):
        read_scored(spark, str(tmp_path))
    (tmp_path / "commits").mkdir()  # as in the checkpoint of a query
    with pytest.raises(SinkError, match="is not the folder of a ParquetSink: check the path"):
        read_scored(spark, str(tmp_path))


@pytest.mark.parametrize(
    "other, reason",
    [
        ({"event_id": "Id"}, "has results with event_id 'EventId', not 'Id': choose another path"),
        ({"signal_index": 1}, "has results with signal_index 0, not 1: choose another path"),
    ],
)
def test_results_that_mean_something_else_are_refused(spark, path, other, reason):
    """A path whose results have another id or signal class is refused."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 1)
    with pytest.raises(SinkError, match=reason), Sink(spark, path, **other):
        pass


def test_a_sink_that_knows_no_stream_is_refused(spark, path):
    """A sink that hasn't begun with a stream refuses batches."""
    with (
        ParquetSink(spark, path, signal_index=0) as sink,
        pytest.raises(SinkError, match="call `begin`"),
    ):
        sink.write(rows(spark, 0, 1), Stream().plan(0, 1))


def test_a_topic_that_was_created_again_is_refused(spark, path):
    """A topic that was deleted and created again is refused, since its offsets start over."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        assert stored_ids(path) == {"events": "id-1"}
    again = Stream()
    again.ids["events"] = "id-2"
    message = r"topic events was deleted and created again since the last batch in .*scored.*"
    message += r"new output path, or .* ParquetSink\(\.\.\., from_beginning=True\)"
    with ParquetSink(spark, path, signal_index=0) as sink:
        with pytest.raises(SinkError, match=message):
            sink.positions(again.ids)
        with pytest.raises(SinkError, match=message):
            sink.begin({}, again.ids)


def test_a_topic_that_is_created_again_while_the_stream_runs_is_refused(spark, path):
    """If a topic is recreated while the stream runs, planned and new batches are refused."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        batch = sink.stream.plan(10, 20)
        sink.stream.ids["events"] = "id-2"
        with pytest.raises(SinkError, match="topic events was deleted while a batch was read"):
            sink.write(rows(spark, 10, 20), batch)
        new = sink.stream.plan(20, 30)
        with pytest.raises(SinkError, match="topic events was deleted and created again"):
            sink.left(new)
    assert stored(spark, path) == list(range(10))


def test_a_new_topic_can_be_stored_from_its_beginning(spark, path):
    """`from_beginning` restarts a recreated topic; old events stay, and other topics resume."""
    stream = Stream()
    stream.ids["others"] = "id-of-others"
    with Sink(spark, path, stream=stream) as sink:
        write(sink, spark, 0, 10)
        write(sink, spark, 50, 60, topic="others")
    stream.ids["events"] = "id-2"
    others = TopicAndPartition("others", 0)
    for _ in range(2):  # the second time, it resumes
        with ParquetSink(spark, path, signal_index=0, from_beginning=True) as sink:
            with pytest.raises(SinkError, match="pass Kafka's ids of the topics to `positions`"):
                sink.positions()
            done = stored_ids(path)["events"] == "id-2"
            assert sink.positions(stream.ids) == {PARTITION: 5 if done else 0, others: 60}
            sink.begin({}, stream.ids)
            sink.write(rows(spark, 0, 5), stream.plan(0, 5))
            sink.write(rows(spark, 50, 60, topic="others"), stream.plan(50, 60, "others"))
    assert stored(spark, path) == sorted([*range(10), *range(5), *range(50, 60)])


def test_results_without_topic_ids_are_continued(spark, path):
    """Results without topic ids are continued; the next batch adds the ids."""
    old = Stream()
    old.ids = {}
    with Sink(spark, path, stream=old) as sink:
        write(sink, spark, 0, 10)
        assert stored_ids(path) == {}
    with Sink(spark, path) as sink:
        assert sink.positions() == {PARTITION: 10}
        write(sink, spark, 10, 20)
        assert stored_ids(path) == {"events": "id-1"}


def test_a_second_stream_is_refused(spark, path):
    """An open sink refuses a second stream, and accepts one when it is opened again."""
    with Sink(spark, path) as sink:
        with pytest.raises(SinkError, match="already takes the batches of another stream"):
            sink.begin({}, {})
        write(sink, spark, 0, 10)
    with sink:  # opened again, it can serve another stream
        assert sink.positions() == {PARTITION: 10}


@pytest.mark.parametrize(
    "ranges, reason",
    [
        ([], "a batch without offset ranges"),
        ([(0, 0, 5), (0, 5, 9)], "a batch has two offset ranges of events, partition 0"),
        ([(0, 0, 9), (0, 5, 9)], "a batch has two offset ranges of events, partition 0"),
        ([(0, 5, 5)], "a batch has offsets 5 to 5 of events, partition 0"),
        ([(0, 5, 3)], "a batch has offsets 5 to 3 of events, partition 0"),
    ],
)
def test_a_batch_whose_ranges_make_no_sense_is_refused(spark, path, ranges, reason):
    """A batch without offset ranges, or with empty, reversed or repeated ones, is refused."""
    with Sink(spark, path) as sink:
        ranges = [OffsetRange("events", *part) for part in ranges]
        for use in (lambda: sink.left(ranges), lambda: sink.write(rows(spark, 0, 9), ranges)):
            with pytest.raises(SinkError, match=reason):
                use()
    assert stored(spark, path) == []


def test_a_sink_that_is_not_open_is_refused(spark, path):
    """A sink refuses every use outside its `with` block."""
    sink = Sink(spark, path)
    uses = (lambda: sink.positions(), lambda: sink.left([]), lambda: sink.begin({}, {}),
            lambda: write(sink, spark, 0, 10))  # fmt: skip
    for use in uses:
        with pytest.raises(SinkError, match="is not open: use it in a `with` block"):
            use()
    with sink:
        write(sink, spark, 0, 10)
    with pytest.raises(SinkError, match="is not open"):
        write(sink, spark, 10, 20)


def test_records_outside_their_batch_are_refused(spark, path):
    """Records outside a batch's offset ranges are refused; compacted ones may be missing."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        batch = sink.stream.plan(10, 20)
        for others in (rows(spark, 15, 25), rows(spark, 5, 12), rows(spark, 10, 20, topic="else")):
            with pytest.raises(SinkError, match="records are not in the offset ranges of their"):
                sink.write(others, batch)
        message = "1 records are not .* such as events partition 0 offset 20: write the records"
        with pytest.raises(SinkError, match=message):
            sink.write(rows(spark, 11, 21), batch)
        sink.write(rows(spark, 12, 15), batch)  # the others were compacted away
        assert sink.positions() == {PARTITION: 20}
        sink.write(rows(spark, 20, 20), sink.stream.plan(20, 30))  # all of them were
        assert sink.positions() == {PARTITION: 30}
    assert stored(spark, path) == [*range(10), *range(12, 15)]


@pytest.mark.parametrize(
    "damage, reason",
    [
        (Path.unlink, "driver and all executors must reach the same files"),
        (lambda file: file.write_bytes(b"PAR1"), "a file that Spark has just written can't be rea"),
    ],
)
def test_a_batch_whose_files_are_not_all_there_is_not_stored(
    spark, path, tmp_path, monkeypatch, damage, reason
):
    """A batch with missing or unreadable files is not stored, and can be written again."""
    data = tmp_path / "scored" / "data"
    write_files = ParquetSink._write_files

    def lose_one(sink, *arguments):
        counts = write_files(sink, *arguments)
        damage(max(data.rglob("*.parquet"), key=lambda file: file.stat().st_size))
        return counts

    with Sink(spark, path) as sink:
        with monkeypatch.context() as failing:
            failing.setattr(ParquetSink, "_write_files", lose_one)
            with pytest.raises(SinkError, match=reason):
                write(sink, spark, 0, 10)
        assert sink.left(sink.stream.plan(0, 10))
        write(sink, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_all_of_a_batch_is_on_the_disk_before_it_counts(spark, path, tmp_path, monkeypatch):
    """Data is flushed before the manifest, so after a power cut no manifest names empty files."""
    flushed, fsync, scored = [], os.fsync, tmp_path / "scored"

    def note(descriptor):
        fsync(descriptor)
        manifests = len(list((scored / "commits").glob("*.json")))
        flushed.append((os.readlink(f"/proc/self/fd/{descriptor}"), manifests))

    with Sink(spark, path) as sink:
        monkeypatch.setattr(os, "fsync", note)
        write(sink, spark, 0, 10)
    before = {name for name, manifests in flushed if not manifests}
    files = {str(file) for file in (scored / "data").rglob("*.parquet")}
    folders = {str(scored), *(str(f) for f in (scored / "data").glob("**/"))}
    assert files and files | folders <= {name.rstrip("/") for name in before}
    assert any(name.endswith(".draft") for name in before)
    assert (str(scored / "commits"), 1) in flushed


def test_a_batch_needs_no_new_code(spark, path):
    """Later batches reuse generated code; new code costs 20 ms per class and never warms up."""
    metrics = spark._jvm.org.apache.spark.metrics.source.CodegenMetrics
    batches = [rows(spark, start, start + 10).cache() for start in (0, 10, 20)]
    compiled = []
    with Sink(spark, path) as sink:
        for number, batch in enumerate(batches):
            batch.count()
            before = metrics.METRIC_COMPILATION_TIME().getCount()
            sink.write(batch, sink.stream.plan(10 * number, 10 * number + 10))
            compiled.append(metrics.METRIC_COMPILATION_TIME().getCount() - before)
            batch.unpersist()
    assert compiled[1:] == [0, 0]


def test_one_batch_after_another_has_its_number(spark, path):
    """Each event has the number of its batch."""
    with Sink(spark, path) as sink:
        for start in (0, 10):
            write(sink, spark, start, start + 10)
    found = read_scored(spark, path).select("batch", "offset").collect()
    assert {(row.batch, row.offset) for row in found} == {(n // 10, n) for n in range(20)}


def test_where_a_stream_begins_is_kept_before_its_first_batch(spark, path):
    """Starting offsets are stored before the first batch, so a crash before it skips nothing."""
    with Sink(spark, path, stream=Stream({PARTITION: 7})):
        pass  # it dies before its first batch
    with Sink(spark, path, stream=Stream({PARTITION: 90})) as sink:
        assert sink.positions() == {PARTITION: 7}
        write(sink, spark, 0, 10)  # an earlier start is allowed while nothing is stored
        assert sink.positions() == {PARTITION: 10}
    assert stored(spark, path) == list(range(10))


def test_offsets_below_the_first_stored_one_are_reported(spark, path, caplog):
    """A stream that begins before the output does is told once which offsets are not added."""
    with Sink(spark, path, stream=Stream({PARTITION: 100})) as sink:
        write(sink, spark, 100, 110)
    assert warnings_in(caplog) == []
    with Sink(spark, path, stream=Stream({PARTITION: 20})) as sink:
        for start in (20, 60):
            assert sink.left(sink.stream.plan(start, start + 40)) == []
            write(sink, spark, start, start + 40)
    (warning,) = warnings_in(caplog)
    assert "begins at offset 100 of events, partition 0; offsets 20 to 99 are not added" in warning
    assert stored(spark, path) == list(range(100, 110))


def test_where_an_earlier_kit_noted_a_start_is_read(spark, path):
    """A path stays in use when the kit is updated."""
    with Sink(spark, path, stream=Stream({PARTITION: 7})):
        pass
    (file,) = Path(path).glob("starts/*.json")
    start = json.loads(file.read_text())
    del start["topic"]
    file.write_text(json.dumps(start))
    file.with_name(f".{file.name}.crc").unlink(missing_ok=True)
    with Sink(spark, path, stream=Stream({PARTITION: 90})) as sink:
        assert sink.positions() == {PARTITION: 7}


def test_where_a_stream_began_in_a_deleted_topic_says_nothing_of_a_new_one(spark, path):
    """A topic that is created again before its first batch loses no records, or is refused."""
    begun = {TopicAndPartition("events", 0): 1_000, TopicAndPartition("events", 1): 0}
    with ParquetSink(spark, path, signal_index=0) as sink:
        sink.begin(begun, {"events": "id-1"})
    with ParquetSink(spark, path, signal_index=0) as sink:
        assert sink.positions() == begun
        with pytest.raises(SinkError, match="topic events was deleted and created again"):
            sink.begin(begun, {"events": "id-2"})
    with ParquetSink(spark, path, signal_index=0, from_beginning=True) as sink:
        assert sink.positions({"events": "id-2"}) == dict.fromkeys(begun, 0)


@pytest.mark.parametrize("index", [2, -1])
def test_a_signal_index_that_no_event_can_have_is_refused(spark, path, index):
    """Its counts would be 0 in each batch, and the path would keep the wrong index."""
    with pytest.raises(ValueError, match=f"signal_index is {index}: give 0 or 1"):
        ParquetSink(spark, path, signal_index=index)


def refuses(*_):
    """Fail as a file system does that can't set a file's time."""
    raise PermissionError("not allowed here")


@pytest.mark.parametrize("touch, reason", [(lambda *_: None, ""), (refuses, " (not allowed here)")])
def test_a_file_system_without_times_is_refused(spark, path, monkeypatch, touch, reason):
    """Where nobody sees that a sink is alive, as on an object store, two could write at a time.

    Nothing is left behind that holds up the next sink.
    """
    message = f"can't set the time of a file{reason}, as object stores can't"
    with monkeypatch.context() as patches:
        patches.setattr(JsonFolder, "touch", touch)
        with (
            pytest.raises(SinkError, match=re.escape(message)),
            ParquetSink(spark, path, signal_index=0),
        ):
            pytest.fail("it is not refused")
    with ParquetSink(spark, path, signal_index=0):
        assert set(JsonFolder(spark, f"{path}/writer").names()) == {f"{0:020d}"}


@pytest.mark.parametrize("topic", ["_events", ".events", "topic-", "e" * 249])
def test_where_a_stream_begins_is_kept_whatever_its_topic_is_called(spark, path, topic):
    """Starting offsets are kept for any topic name, however often the sink is opened."""
    partition = TopicAndPartition(topic, 0)
    for start in (7, 90, 91):  # it dies before its first batch
        stream = Stream({partition: start})
        stream.ids = {topic: "id-1"}
        with Sink(spark, path, stream=stream) as sink:
            assert sink.positions() == {partition: 7}


def test_batches_that_are_written_at_once_wait_for_each_other(spark, path):
    """Concurrent batches of a sink are written one by one, each with its own number."""
    failed = []

    def write_one(start, topic):
        try:
            write(sink, spark, start, 20, topic=topic)
        except Exception as error:
            failed.append(error)

    with Sink(spark, path) as sink:
        batches = [(0, "events"), (10, "others")]
        threads = [threading.Thread(target=write_one, args=batch) for batch in batches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert failed == []
    assert stored(spark, path) == sorted([*range(20), *range(10, 20)])
    assert {row.batch for row in read_scored(spark, path).collect()} == {0, 1}


def test_a_broker_without_topic_ids_does_not_make_a_topic_another_one(spark, path):
    """An output continues when its cluster begins to give ids, or another broker gives none."""
    stream = Stream({PARTITION: 7})
    for topic_id, start in (("", 7), ("id-1", 10), ("", 20)):
        stream.ids = {"events": topic_id}
        with Sink(spark, path, stream=stream) as sink:
            assert sink.positions(stream.ids) == {PARTITION: start}
            write(sink, spark, start, (start // 10 + 1) * 10)
            stream.starts = {PARTITION: 90}
    check_topics([OffsetRange("events", 0, 0, 10, "id-1")], {"events": ""})
    assert stored(spark, path) == list(range(7, 30))


def test_the_progress_never_goes_back():
    """An offset moves backwards only if its topic was created again."""
    progress = Progress().after([OffsetRange("events", 0, 0, 20, "id-1")])
    assert progress.after([OffsetRange("events", 0, 0, 10, "id-1")]) == progress
    again = progress.after([OffsetRange("events", 0, 0, 10, "id-2")])
    assert again.positions == {PARTITION: 10}


@pytest.mark.parametrize("failing", ["flush", "names", "names twice", "delete"])
def test_a_batch_whose_manifest_counts_is_stored_whatever_fails_after_it(
    spark, path, tmp_path, monkeypatch, failing
):
    """A batch whose manifest is written is committed, at once or on retry, whatever fails."""
    monkeypatch.setattr(commits, "MANIFESTS_KEPT", 1)
    failures = iter(range(2 if failing == "names twice" else 1))
    manifests = tmp_path / "scored" / "commits"

    def unreliable(method):
        def call(*arguments):
            if (manifests / f"{1:020d}.json").exists() and next(failures, None) is not None:
                raise OSError("the file system is away")
            return method(*arguments)

        return call

    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        files = sink._commits._files
        if failing == "flush":
            monkeypatch.setattr(files_of_spark, "_flush", unreliable(files_of_spark._flush))
        else:
            method = failing.split()[0]
            monkeypatch.setattr(files, method, unreliable(getattr(files, method)))
        if failing == "names twice":
            with pytest.raises(OSError, match="the file system is away"):
                write(sink, spark, 10, 20)
        write(sink, spark, 10, 20)
        assert not sink.left(sink.stream.plan(10, 20)) and next(failures, None) is None
        write(sink, spark, 20, 30)
    assert stored(spark, path) == list(range(30))


def test_a_stream_whose_batches_could_overtake_each_other_is_refused(spark):
    """`spark.streaming.concurrentJobs` above 1 is refused: batches could overtake each other."""
    name, settings = "spark.streaming.concurrentJobs", spark.sparkContext._jsc.sc().conf()
    ssc = new_streaming_context(spark, 1)
    settings.set(name, "2")
    try:
        with pytest.raises(ValueError, match=f"{name} is 2, but .*: set it to 1 or leave it out"):
            KafkaUtils.createDirectStream(ssc, ["events"], {"bootstrap.servers": "localhost:9"})
    finally:
        settings.remove(name)
        ssc.stop(stopSparkContext=False)
