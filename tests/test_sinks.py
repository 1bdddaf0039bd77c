"""Tests of helpers/sinks.py: each event once, whatever is done twice or is left half done."""

import logging
import shutil

import pytest
from pyspark.ml.functions import array_to_vector
from pyspark.sql import functions as F

from helpers import sinks
from helpers.sinks import (
    BadRecordError,
    ParquetSink,
    SinkError,
    read_bad_records,
    read_scored,
)
from helpers.streaming import OffsetRange, TopicAndPartition

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
        F.when(~is_bad, F.lit(0.0)).alias("prediction_index"),
        F.lit(topic).alias("topic"),
        F.lit(0).alias("partition"),
        offset.alias("offset"),
        F.timestamp_millis(1_700_000_000_000 + offset).alias("timestamp"),
        F.when(is_bad, content).alias("bad"),
    )


def write(sink, spark, start, end, bad=(), topic="events"):
    """Write the records of an offset range as a batch."""
    sink.begin(lambda batch_id: [OffsetRange(topic, 0, start, end)])
    sink.write(rows(spark, start, end, bad, topic), batch_id=start)


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
    monkeypatch.setattr(sinks, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(sinks, "PATIENCE_SECONDS", 0.5)


def test_what_is_stored_of_an_event(spark, path):
    """Otherwise results could not be joined with the events, or be traced back to the topic."""
    with ParquetSink(spark, path) as sink:
        write(sink, spark, 0, 2)
    row = read_scored(spark, path).orderBy("offset").collect()[1].asDict()
    assert row.pop("event_time").timestamp() == pytest.approx(1_700_000_000.001)
    assert row == {
        "EventId": 100_001, "probability_0": 0.75, "probability_1": 0.25, "predicted_index": 0,
        "topic": "events", "partition": 0, "offset": 1, "batch": 0, "model_version": None,
    }  # fmt: skip


def test_a_batch_that_comes_again_is_not_stored_again(spark, path):
    """Otherwise each crash would count some events twice."""
    with ParquetSink(spark, path) as sink:
        write(sink, spark, 0, 10)
        assert sink.has(0)
        write(sink, spark, 0, 10)
    with ParquetSink(spark, path) as sink:  # after a restart
        assert sink.positions() == {PARTITION: 10}
        write(sink, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_of_a_batch_that_overlaps_only_the_rest_is_stored(spark, path):
    """Otherwise a lost checkpoint, and with it other batches, would count events twice."""
    with ParquetSink(spark, path) as sink:
        write(sink, spark, 0, 10)
        write(sink, spark, 5, 15)
        assert sink.positions() == {PARTITION: 15}
    assert stored(spark, path) == list(range(15))


def test_a_gap_between_batches_is_told(spark, path, caplog):
    """Otherwise nobody would know that events are missing."""
    with ParquetSink(spark, path) as sink:
        write(sink, spark, 0, 10)
        write(sink, spark, 15, 20)
    assert "offsets 10 to 14 of events, partition 0, are in no batch" in caplog.text


def test_files_without_a_manifest_do_not_count_and_are_named(spark, path, caplog):
    """Otherwise a batch that a crash has interrupted would be read, and then again."""
    with ParquetSink(spark, path) as sink:
        write(sink, spark, 0, 10)
    rows(spark, 10, 20).write.parquet(f"{path}/data/interrupted")
    with caplog.at_level(logging.WARNING):
        assert stored(spark, path) == list(range(10))
    assert "1 of the batches" in caplog.text and "interrupted" in caplog.text


def test_a_batch_that_fails_leaves_nothing_behind(spark, path, tmp_path):
    """Otherwise the folder would fill with files that nobody reads."""
    broken = rows(spark, 0, 10).withColumn("EventId", F.raise_error(F.lit("broken")).cast("long"))
    with ParquetSink(spark, path) as sink:
        sink.begin(lambda batch_id: [OffsetRange("events", 0, 0, 10)])
        with pytest.raises(Exception, match="broken"):
            sink.write(broken, 0)
        assert list((tmp_path / "scored" / "data").iterdir()) == []
        assert not sink.has(0)
        write(sink, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_a_second_sink_on_a_path_is_refused(spark, path, impatient):
    """Otherwise two jobs would store the same events."""
    with ParquetSink(spark, path) as sink:
        with (
            pytest.raises(SinkError, match=r"another job writes to .*scored: end it, or give"),
            ParquetSink(spark, path),
        ):
            pass
        write(sink, spark, 0, 10)
    with ParquetSink(spark, path) as sink:  # the path is free again
        assert sink.positions() == {PARTITION: 10}


def test_a_sink_whose_job_died_is_taken_over(spark, path, impatient):
    """Otherwise a job could not go on after a crash."""
    dead = ParquetSink(spark, path)
    dead.__enter__()
    dead._writer._closed.set()  # it no longer shows that it lives
    with ParquetSink(spark, path) as sink:
        write(sink, spark, 0, 10)
        # It was not dead, only slow: now it is late.
        with pytest.raises(SinkError, match="another job writes to"):
            write(dead, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_a_late_sink_cannot_commit_over_another(spark, path, impatient, monkeypatch):
    """Otherwise a job that wakes up between its last look and its commit would count twice."""
    late = ParquetSink(spark, path)
    late.__enter__()
    late._writer._closed.set()
    monkeypatch.setattr(late._writer, "check", lambda: None)
    with ParquetSink(spark, path) as sink:
        write(sink, spark, 0, 10)
    with pytest.raises(SinkError, match="another job writes to"):
        write(late, spark, 0, 10)
    assert stored(spark, path) == list(range(10))


def test_nothing_stays_behind_a_sink(spark, path, tmp_path):
    """Otherwise the next job would wait for one that has ended."""
    with ParquetSink(spark, path):
        assert list((tmp_path / "scored" / "writer").glob("*.json"))
    assert not list((tmp_path / "scored" / "writer").glob("*.json"))


def test_a_bad_record_stops_a_strict_sink(spark, path):
    """Otherwise those who can't go on without one event would go on."""
    message = r"events, partition 0, offset 3 is no event: it is no JSON\. To go on"
    with ParquetSink(spark, path) as sink:
        with pytest.raises(BadRecordError, match=message):
            write(sink, spark, 0, 10, bad=[3, 7])
        assert sink.positions() == {}
    assert stored(spark, path) == []


def test_bad_records_are_skipped_and_kept(spark, path):
    """Otherwise they would vanish."""
    with ParquetSink(spark, path, on_bad_record="skip") as sink:
        write(sink, spark, 0, 10, bad=[3, 7])
    assert stored(spark, path) == [0, 1, 2, 4, 5, 6, 8, 9]
    kept = read_bad_records(spark, path).orderBy("offset").collect()
    assert [(row.offset, bytes(row.value), row.reason) for row in kept] == [
        (3, b"\xffrubbish", "it is no JSON"), (7, b"\xffrubbish", "it is no JSON"),
    ]  # fmt: skip


def test_a_sink_can_be_moved(spark, path, tmp_path):
    """Otherwise results could not be archived."""
    with ParquetSink(spark, path) as sink:
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
        ParquetSink(spark, path, **arguments)


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
    with ParquetSink(spark, path) as sink:
        write(sink, spark, 0, 1)
    with pytest.raises(SinkError, match=reason), ParquetSink(spark, path, **other):
        pass


def test_a_sink_that_knows_no_stream_is_refused(spark, path):
    """Otherwise it could not know which offsets it has."""
    with ParquetSink(spark, path) as sink, pytest.raises(SinkError, match="call `begin`"):
        sink.write(rows(spark, 0, 1), 0)
