"""Tests of helpers/sinks/: each event once, whatever is done twice or is left half done."""

import itertools
import os
import shutil
import threading
from pathlib import Path

import pytest
from processes import wait_until
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F

from helpers.sinks import (
    BadRecordError,
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
from helpers.spark import files as files_of_spark
from helpers.streaming import (
    KafkaUtils,
    OffsetRange,
    TopicAndPartition,
    new_streaming_context,
)

PARTITION = TopicAndPartition("events", 0)


def rows(spark, start, end, bad=(), topic="events"):
    """Return scored records of a partition, some of them bad, as a batch's function makes them."""
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
    """Where a stream begins, and the ids that its topics have now."""

    def __init__(self, starts=None):
        self.ids = {"events": "id-1"}
        self.starts = starts or {}

    def plan(self, start, end, topic="events"):
        """Return the ranges of a batch."""
        return [OffsetRange(topic, 0, start, end, self.ids.get(topic))]


class Sink(ParquetSink):
    """A sink that has begun with a stream of its own, and looks at its topics as a stream does."""

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
    """Return the offsets in a sink, sorted."""
    return sorted(row.offset for row in read_scored(spark, path).collect())


@pytest.fixture
def path(tmp_path):
    """Where a sink is to be."""
    return str(tmp_path / "scored")


@pytest.fixture
def impatient(monkeypatch):
    """Have a dead writer be noticed sooner."""
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0.5)


def test_what_is_stored_of_an_event(spark, path):
    """Otherwise results could not be joined with the events, or be traced back to the topic."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 2)
    row = read_scored(spark, path).orderBy("offset").collect()[1].asDict()
    assert row.pop("event_time").timestamp() == pytest.approx(1_700_000_000.001)
    assert row == {
        "EventId": 100_001, "probability_0": 0.75, "probability_1": 0.25, "predicted_index": 0,
        "topic": "events", "partition": 0, "offset": 1, "batch": 0, "model_version": None,
    }  # fmt: skip


def test_a_batch_that_comes_again_is_not_stored_again(spark, path):
    """Otherwise each crash would count some events twice."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        assert sink.left(sink.stream.plan(0, 10)) == []
        write(sink, spark, 0, 10)
    with Sink(spark, path) as sink:  # after a restart
        assert sink.positions() == {PARTITION: 10}
        write(sink, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_of_a_batch_that_overlaps_only_the_rest_is_stored(spark, path):
    """Otherwise a lost checkpoint, and with it other batches, would count events twice."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        write(sink, spark, 5, 15)
        assert sink.positions() == {PARTITION: 15}
    assert stored(spark, path) == list(range(15))


@pytest.mark.parametrize("signal_index, signal", [(0, 8), (1, 0)])
def test_a_batch_is_counted_while_it_is_written(spark, path, signal_index, signal):
    """The sink knows which class is signal, and what its records have that nobody uses."""
    scored = rows(spark, 0, 10, bad=[3, 7])
    scored = scored.withColumn("unused", F.array(F.lit("Weight"), F.lit("Run")))
    with Sink(spark, path, signal_index=signal_index, on_bad_record="skip") as sink:
        counts = sink.write(scored, sink.stream.plan(0, 10))
        assert counts == (8, signal, 2, ["Run", "Weight"])
        assert sink.write(scored, sink.stream.plan(0, 10)) == Counts()


def test_a_gap_between_batches_is_told(spark, path, caplog):
    """Otherwise nobody would know that events are missing."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        write(sink, spark, 15, 20)
    assert "offsets 10 to 14 of events, partition 0, are in no batch" in caplog.text


def test_files_without_a_manifest_do_not_count_and_the_next_sink_removes_them(
    spark, path, tmp_path
):
    """Files of a batch that a crash has interrupted are not read, and don't stay for ever."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
    data = tmp_path / "scored" / "data"
    interrupted = [f"{data}/interrupted", f"{data}/merged-interrupted"]
    for folder in interrupted:
        rows(spark, 10, 20).write.parquet(folder)
    assert stored(spark, path) == list(range(10))
    with Sink(spark, path) as sink:
        assert len(list(data.iterdir())) == 3  # the sink that died may only be late
        write(sink, spark, 10, 20)
        assert len(list(data.iterdir())) == 1
    assert stored(spark, path) == list(range(20))


def test_a_batch_that_fails_leaves_nothing_behind(spark, path, tmp_path):
    """Otherwise the folder would fill with files that nobody reads."""
    broken = rows(spark, 0, 10).withColumn("EventId", F.raise_error(F.lit("broken")).cast("long"))
    with Sink(spark, path) as sink:
        with pytest.raises(Exception, match="broken"):
            sink.write(broken, sink.stream.plan(0, 10))
        assert list((tmp_path / "scored" / "data").glob("*/*")) == []
        assert sink.left(sink.stream.plan(0, 10))
        write(sink, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_a_second_sink_on_a_path_is_refused(spark, path, impatient):
    """Otherwise two jobs would store the same events."""
    with Sink(spark, path) as sink:
        with (
            pytest.raises(SinkError, match=r"another job writes to .*scored: end it, or give"),
            Sink(spark, path),
        ):
            pass
        write(sink, spark, 0, 10)
    with Sink(spark, path) as sink:  # the path is free again
        assert sink.positions() == {PARTITION: 10}


def test_a_sink_whose_job_died_is_taken_over(spark, path, impatient):
    """Otherwise a job could not go on after a crash."""
    dead = Sink(spark, path)
    dead.__enter__()
    dead._lease._closed.set()  # it no longer shows that it lives
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        # It was not dead, only slow: now it is late.
        with pytest.raises(SinkError, match="another job writes to"):
            write(dead, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_a_late_sink_cannot_commit_over_another(spark, path, impatient, monkeypatch):
    """Otherwise a job that wakes up between its last look and its commit would count twice."""
    late = Sink(spark, path)
    late.__enter__()
    late._lease._closed.set()
    monkeypatch.setattr(late._lease, "check", lambda: None)
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
    with pytest.raises(SinkError, match="another job writes to"):
        write(late, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_nobody_waits_for_a_sink_that_has_ended(spark, path, monkeypatch):
    """The next job begins at once."""
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 3600)
    for _ in range(3):
        with Sink(spark, path) as sink:
            assert sink.positions() == {}


def test_a_failed_heartbeat_is_not_the_last_one(spark, path, impatient, caplog):
    """A file system that was away for a moment must not make a healthy sink look dead."""
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
    assert caplog.text.count("can't be renewed, and is tried again: the file system is away") == 1


def test_of_many_that_find_a_sink_dead_one_takes_its_path(spark, path, impatient):
    """Two that both see the dead one's claim must not remove each other's."""
    dead = Sink(spark, path)
    dead.__enter__()
    dead._lease._closed.set()
    opened, refused, done = [], [], threading.Event()

    def open_sink():
        try:
            with ParquetSink(spark, path, signal_index=0) as sink:
                opened.append(sink)
                done.wait(60)
                sink._lease.check()
        except SinkError:
            refused.append(path)

    threads = [threading.Thread(target=open_sink) for _ in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(refused) == 3)
    done.set()
    for thread in threads:
        thread.join(60)
    assert (len(opened), len(refused)) == (1, 3)
    with pytest.raises(SinkError, match="another job writes to"):
        write(dead, spark, 0, 10)


def test_who_waited_too_long_takes_nothing_from_a_healthy_sink(spark, path, monkeypatch):
    """A job that slept after it had found a dead one may find that others came and went."""
    dead = Sink(spark, path)
    dead.__enter__()
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
    """What went wrong before must be seen, not the claim that can't be released."""
    with pytest.raises(RuntimeError, match="the network died"), Sink(spark, path) as sink:
        sink._lease._claims.names = lambda: 1 / 0
        raise RuntimeError("the network died")
    assert "can't be released, so the next job there waits" in caplog.text
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)


def test_a_bad_record_stops_a_strict_sink(spark, path):
    """Otherwise those who can't go on without one event would go on."""
    message = r"events, partition 0, offset 3 is not an event: it is no JSON\. To go on"
    with Sink(spark, path) as sink:
        with pytest.raises(BadRecordError, match=message):
            write(sink, spark, 0, 10, bad=[3, 7])
        assert sink.positions() == {}
    assert stored(spark, path) == []


def test_bad_records_are_skipped_and_kept(spark, path):
    """Otherwise they would vanish."""
    with Sink(spark, path, on_bad_record="skip") as sink:
        write(sink, spark, 0, 10, bad=[3, 7])
    assert stored(spark, path) == [0, 1, 2, 4, 5, 6, 8, 9]
    kept = read_bad_records(spark, path).orderBy("offset").collect()
    assert [(row.offset, bytes(row.value), row.reason) for row in kept] == [
        (3, b"\xffrubbish", "it is no JSON"), (7, b"\xffrubbish", "it is no JSON"),
    ]  # fmt: skip


def test_a_sink_can_be_moved(spark, path, tmp_path):
    """Otherwise results could not be archived."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
    shutil.move(path, tmp_path / "archive")
    assert stored(spark, str(tmp_path / "archive")) == list(range(10))


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"on_bad_record": "ignore"}, "on_bad_record is 'ignore': it must be dead-letter, skip,"),
        ({"on_bad_record": "dead-letter"}, "dead letters go to Kafka: give its settings, too"),
    ],
)
def test_wrong_arguments_are_refused(spark, path, arguments, reason):
    """Otherwise a typo would decide over bad records."""
    with pytest.raises(ValueError, match=reason):
        ParquetSink(spark, path, signal_index=0, **arguments)


def test_a_folder_that_is_no_sink_is_refused(spark, tmp_path):
    """Otherwise a wrong path would look like a sink without events."""
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
    """Otherwise ids would be read as null, or signal be counted with background."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 1)
    with pytest.raises(SinkError, match=reason), Sink(spark, path, **other):
        pass


def test_a_sink_that_knows_no_stream_is_refused(spark, path):
    """Otherwise it could not know which offsets it has."""
    with (
        ParquetSink(spark, path, signal_index=0) as sink,
        pytest.raises(SinkError, match="call `begin`"),
    ):
        sink.write(rows(spark, 0, 1), Stream().plan(0, 1))


def test_a_topic_that_was_created_again_is_refused(spark, path):
    """Its first records have the offsets of the old topic's, and would pass for stored."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        assert sink.topic_ids() == {"events": "id-1"}
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
    """A batch may have been planned with the old topic and read from the new one."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        batch = sink.stream.plan(10, 20)
        sink.stream.ids["events"] = "id-2"
        with pytest.raises(SinkError, match="topic events was deleted while a batch of it was"):
            sink.write(rows(spark, 10, 20), batch)
        new = sink.stream.plan(20, 30)
        with pytest.raises(SinkError, match="topic events was deleted and created again"):
            sink.left(new)
    assert stored(spark, path) == list(range(10))


def test_a_new_topic_can_be_stored_from_its_beginning(spark, path):
    """The old topic's events stay, and other topics go on where they were."""
    stream = Stream()
    stream.ids["others"] = "id-of-others"
    with Sink(spark, path, stream=stream) as sink:
        write(sink, spark, 0, 10)
        write(sink, spark, 50, 60, topic="others")
    stream.ids["events"] = "id-2"
    others = TopicAndPartition("others", 0)
    for _ in range(2):  # when it starts again, it goes on
        with ParquetSink(spark, path, signal_index=0, from_beginning=True) as sink:
            with pytest.raises(SinkError, match="pass Kafka's ids of the topics to `positions`"):
                sink.positions()
            done = sink.topic_ids()["events"] == "id-2"
            assert sink.positions(stream.ids) == {PARTITION: 5 if done else 0, others: 60}
            sink.begin({}, stream.ids)
            sink.write(rows(spark, 0, 5), stream.plan(0, 5))
            sink.write(rows(spark, 50, 60, topic="others"), stream.plan(50, 60, "others"))
    assert stored(spark, path) == sorted([*range(10), *range(5), *range(50, 60)])


def test_results_without_topic_ids_are_continued(spark, path):
    """An older kit wrote none; the next batch brings them."""
    old = Stream()
    old.ids = {}
    with Sink(spark, path, stream=old) as sink:
        write(sink, spark, 0, 10)
        assert sink.topic_ids() == {}
    with Sink(spark, path) as sink:
        assert sink.positions() == {PARTITION: 10}
        write(sink, spark, 10, 20)
        assert sink.topic_ids() == {"events": "id-1"}


def test_a_second_stream_is_refused(spark, path):
    """Its offsets would be compared with those of the first one."""
    with Sink(spark, path) as sink:
        with pytest.raises(SinkError, match="takes the batches of another stream already"):
            sink.begin({}, {})
        write(sink, spark, 0, 10)
    with sink:  # opened once more, it can serve another one
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
    """A batch that the stream doesn't know is not one that is stored."""
    with Sink(spark, path) as sink:
        ranges = [OffsetRange("events", *part) for part in ranges]
        for use in (lambda: sink.left(ranges), lambda: sink.write(rows(spark, 0, 9), ranges)):
            with pytest.raises(SinkError, match=reason):
                use()
    assert stored(spark, path) == []


def test_a_sink_that_is_not_open_is_refused(spark, path):
    """Nothing would protect its path from another sink."""
    sink = Sink(spark, path)
    uses = (lambda: sink.positions(), lambda: sink.left([]), lambda: sink.begin({}, {}),
            lambda: write(sink, spark, 0, 10), lambda: sink.topic_ids())  # fmt: skip
    for use in uses:
        with pytest.raises(SinkError, match="is not open: use it in a `with` block"):
            use()
    with sink:
        write(sink, spark, 0, 10)
    with pytest.raises(SinkError, match="is not open"):
        write(sink, spark, 10, 20)


def test_records_outside_their_batch_are_refused(spark, path):
    """A batch that isn't the one the source names would be stored under its offsets."""
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
    """An executor that doesn't share the driver's folder writes where nobody finds it."""
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
    """After a power cut, a manifest must not name files that are empty."""
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
    """Java would compile it, 20 ms for each piece, and never run it at full speed."""
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
    """Events can be grouped by their batches."""
    with Sink(spark, path) as sink:
        for start in (0, 10):
            write(sink, spark, start, start + 10)
    found = read_scored(spark, path).select("batch", "offset").collect()
    assert {(row.batch, row.offset) for row in found} == {(n // 10, n) for n in range(20)}


def test_where_a_stream_begins_is_kept_before_its_first_batch(spark, path):
    """A stream that begins at the end and dies loses nothing of what comes before it is back."""
    with Sink(spark, path, stream=Stream({PARTITION: 7})):
        pass  # it dies before a batch
    with Sink(spark, path, stream=Stream({PARTITION: 90})) as sink:
        assert sink.positions() == {PARTITION: 7}
        write(sink, spark, 0, 10)  # a stream that begins earlier after all: nothing is stored yet
        assert sink.positions() == {PARTITION: 10}
    assert stored(spark, path) == list(range(10))


@pytest.mark.parametrize("topic", ["_events", ".events", "topic-", "e" * 240])
def test_where_a_stream_begins_is_kept_whatever_its_topic_is_called(spark, path, topic):
    """A stream resumes where it began, and its sink can be opened again and again."""
    partition = TopicAndPartition(topic, 0)
    for start in (7, 90, 91):  # it dies before its first batch
        stream = Stream({partition: start})
        stream.ids = {topic: "id-1"}
        with Sink(spark, path, stream=stream) as sink:
            assert sink.positions() == {partition: 7}


def test_batches_that_are_written_at_once_wait_for_each_other(spark, path):
    """Each gets its number, and neither takes the other's manifest for that of another job."""
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


def test_the_progress_never_goes_back():
    """A batch that ends earlier than what is stored moves no offset, except in a new topic."""
    progress = Progress().after([OffsetRange("events", 0, 0, 20, "id-1")])
    assert progress.after([OffsetRange("events", 0, 0, 10, "id-1")]) == progress
    again = progress.after([OffsetRange("events", 0, 0, 10, "id-2")])
    assert again.positions == {PARTITION: 10}


@pytest.mark.parametrize("failing", ["flush", "names", "names twice", "delete"])
def test_a_batch_whose_manifest_counts_is_stored_whatever_fails_after_it(
    spark, path, tmp_path, monkeypatch, failing
):
    """The sink goes on, or does so when the batch is tried again, and accuses no other job."""
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
    """A later batch that is stored first would pass the earlier one's offsets off as stored."""
    name, settings = "spark.streaming.concurrentJobs", spark.sparkContext._jsc.sc().conf()
    ssc = new_streaming_context(spark, 1)
    settings.set(name, "2")
    try:
        with pytest.raises(ValueError, match=f"{name} is 2, but .*: set it to 1 or leave it out"):
            KafkaUtils.createDirectStream(ssc, ["events"], {"bootstrap.servers": "localhost:9"})
    finally:
        settings.remove(name)
        ssc.stop(stopSparkContext=False)
