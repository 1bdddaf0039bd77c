"""After many batches, a sink has few files and few manifests, and each event once."""

import statistics
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_sinks import PARTITION, Sink, stored, write

from helpers.sinks import SinkError, commits, lease, read_scored
from helpers.sinks.commits import CommitLog, Part, State
from helpers.sinks.parts import PartFiles
from helpers.sinks.progress import Progress
from helpers.spark import changed_settings


@pytest.fixture
def path(tmp_path):
    """A path for a sink."""
    return str(tmp_path / "scored")


@pytest.fixture
def often(monkeypatch):
    """Merge every five batches instead of every hundred, and keep two manifests."""
    monkeypatch.setattr(commits, "FAN_IN", 5)
    monkeypatch.setattr(commits, "MANIFESTS_KEPT", 2)


def files_of(tmp_path):
    """Return the Parquet files of a sink."""
    return list((tmp_path / "scored" / "data").rglob("*.parquet"))


def test_small_files_are_merged_while_the_sink_is_in_use(spark, path, tmp_path, often):
    """Small files are merged, and readers that began before still find each event once."""
    readers = []
    with Sink(spark, path) as sink:
        for start in range(0, 240, 10):
            write(sink, spark, start, start + 10)
            readers.append((start + 10, read_scored(spark, path)))
        assert sink.positions() == {PARTITION: 240}
    for end, reader in readers:
        assert sorted(row.offset for row in reader.collect()) == list(range(end))
    state = CommitLog(spark, path).last()
    assert len(state.parts) < 12 and max(part.level for part in state.parts) == 2
    assert sum(part.rows for part in state.parts) == 240
    assert len(list((tmp_path / "scored" / "commits").glob("*.json"))) == 2
    batches = {row.batch for row in read_scored(spark, path).collect()}
    assert len(batches) == 24


@pytest.mark.long
def test_merged_files_are_removed_after_a_while(spark, path, tmp_path, often, monkeypatch):
    """Files that a merge has replaced are removed after a while."""
    monkeypatch.setattr(commits, "KEPT_SECONDS", 0)
    with Sink(spark, path) as sink:
        for start in range(0, 120, 10):
            write(sink, spark, start, start + 10)
    state = CommitLog(spark, path).last()
    there = {folder.name for folder in (tmp_path / "scored" / "data").iterdir()}
    assert there == {name.partition("/")[0] for name in state.folders()}
    assert len(state.replaced) <= 5
    assert stored(spark, path) == list(range(120))


@pytest.mark.long
def test_readers_see_each_event_once_while_files_are_merged(spark, path, often):
    """A reader sees the files before a merge or after it, never both or none."""
    counts, ended = [], threading.Event()

    def read():
        while not ended.is_set():
            found = stored(spark, path)
            counts.append(len(found))
            assert found == list(range(len(found)))

    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        reader = threading.Thread(target=read, daemon=True)  # if it fails, so does the test
        reader.start()
        for start in range(10, 150, 10):
            write(sink, spark, start, start + 10)
        ended.set()
        reader.join(60)
    assert not reader.is_alive()
    assert counts == sorted(counts) and counts[-1] >= 10


def test_a_merge_changes_nothing_for_a_query_that_is_planned_meanwhile(
    spark, path, often, monkeypatch
):
    """It reads row by row in a separate session: a plan with both ways to read fails."""
    seen, write_files = set(), PartFiles.write

    def look(files, rows, name):
        if name.startswith("merged"):
            setting = spark.conf.get("spark.sql.parquet.enableVectorizedReader")
            seen.add((rows.sparkSession is spark, setting))
        write_files(files, rows, name)

    monkeypatch.setattr(PartFiles, "write", look)
    gzip = {"spark.sql.parquet.compression.codec": "gzip"}
    with changed_settings(spark, gzip), Sink(spark, path) as sink:
        for start in range(0, 60, 10):
            write(sink, spark, start, start + 10)
    assert seen == {(False, "true")}
    merged = [part for part in CommitLog(spark, path).last().parts if part.level]
    assert merged and all(name.endswith(".gz.parquet") for name in merged[0].files)


def test_files_that_cannot_be_merged_still_count(spark, path, often, monkeypatch, caplog):
    """If a merge fails, the batches stay readable, and the merge is retried later."""
    with Sink(spark, path) as sink:
        with monkeypatch.context() as failing:
            failing.setattr(PartFiles, "merge", lambda *_: 1 / 0)
            for start in range(0, 50, 10):
                write(sink, spark, start, start + 10)
        assert "can't be merged now" in caplog.text
        assert stored(spark, path) == list(range(50))
        sink._unmerged.clear()
        write(sink, spark, 50, 60)
    assert CommitLog(spark, path).last().parts[0].level == 1
    assert stored(spark, path) == list(range(60))


def test_files_that_cannot_be_merged_hold_up_no_others(spark, path, often, monkeypatch):
    """Files that can't be merged don't stop the merging of later ones."""
    merge = PartFiles.merge

    def fail_first(files, group):
        assert group[0].first, "a file is broken"
        return merge(files, group)

    monkeypatch.setattr(PartFiles, "merge", fail_first)
    with Sink(spark, path) as sink:
        for start in range(0, 110, 10):
            write(sink, spark, start, start + 10)
    assert [part.first for part in CommitLog(spark, path).last().parts if part.level] == [5]
    assert stored(spark, path) == list(range(110))


@pytest.mark.long
def test_large_batches_are_merged_as_far_as_they_fit(spark, path, tmp_path, often, monkeypatch):
    """A group above the size limit is merged in runs, and the replaced files are removed."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
        (one,) = sink._state.parts
        monkeypatch.setattr(commits, "LARGEST_MERGE", round(3.5 * one.size))
        monkeypatch.setattr(commits, "KEPT_SECONDS", 0)
        for start in range(10, 160, 10):
            write(sink, spark, start, start + 10)
    state = CommitLog(spark, path).last()
    assert len(state.parts) < 9
    there = {str(file.parent.relative_to(tmp_path / "scored/data")) for file in files_of(tmp_path)}
    used = {part.folder for part in state.parts} | {folder for folder, _ in state.replaced}
    assert all(any(f"{folder}/".startswith(f"{name}/") for name in used) for folder in there)
    assert stored(spark, path) == list(range(160))


def test_parts_are_merged_up_to_a_size(monkeypatch):
    """Large parts are left out, and the longest run of the others is merged first."""
    monkeypatch.setattr(commits, "FAN_IN", 8)
    monkeypatch.setattr(commits, "LARGEST_MERGE", 10)
    sizes = [5, 5, 9, 4, 3, 2, 1, 5]
    parts = [Part(n, 0, f"0/{n}", ["file"], 1, size) for n, size in enumerate(sizes)]
    state = State(7, parts=parts)
    assert [part.first for part in state.mergeable()] == [3, 4, 5, 6]
    assert state.mergeable(failed={"0/4"}) == []
    left = state.merged(state.mergeable(), Part(3, 1, "merged-3", ["file"], 4, 10), now=0)
    assert [part.first for part in left.mergeable()] == [0, 1]
    assert [folder for folder, _ in left.replaced] == ["0/3", "0/4", "0/5", "0/6"]
    assert left.folders() == {"0", "merged-3", *(f"0/{number}" for number in range(8))}


def test_a_late_sink_cannot_commit_where_a_manifest_was_removed(spark, path, often, monkeypatch):
    """A late sink can't commit, even if the manifest of its number is removed already."""
    log = CommitLog(spark, path)
    late = replace(log.last(), number=1)
    with Sink(spark, path) as sink:
        for start in range(0, 60, 10):
            write(sink, spark, start, start + 10)
    with pytest.raises(SinkError, match="another job writes to"):
        log.write(late)
    assert stored(spark, path) == list(range(60))


def test_a_late_sink_removes_nothing_of_the_one_that_took_over(spark, path, often, monkeypatch):
    """A late sink's clean-up removes no files of the sink that took over."""
    monkeypatch.setattr(lease, "PATIENCE_SECONDS", 0)
    late = Sink(spark, path)
    remove_leftovers = late._remove_leftovers

    def remove_late():
        late._lease._closed.set()
        with Sink(spark, path) as sink:
            for start in range(10, 60, 10):
                write(sink, spark, start, start + 10)
        monkeypatch.setattr(late._lease, "check", lambda: None)  # it came after this check
        remove_leftovers()

    spark.range(1).write.parquet(f"{path}/data/interrupted")
    monkeypatch.setattr(late, "_remove_leftovers", remove_late)
    late.__enter__()
    write(late, spark, 0, 10)
    assert stored(spark, path) == list(range(60))
    assert not (Path(path) / "data" / "interrupted").exists()


def after_long_run(one, batches):
    """Return the state after a number of batches, one per second, with files like a given one."""
    state = State(meaning={"event_id": "EventId", "signal_index": 0})
    for number in range(batches):
        progress = Progress({PARTITION: 10 * (number + 1)}, {"events": "id-1"})
        part = replace(one, first=state.number + 1, folder=state.new_folder())
        state = state.with_batch(part, progress)
        if group := state.mergeable():
            folder, rows = f"merged-{state.number}", sum(part.rows for part in group)
            part = Part(group[0].first, group[0].level + 1, folder, one.files, rows, one.size)
            state = state.merged(group, part, now=number)
    return state


@pytest.mark.long
def test_a_hundred_thousand_batches_open_in_seconds(spark, path, tmp_path):
    """After 100,000 batches, results open within 3 s, and a batch takes little longer."""
    with Sink(spark, path) as sink:
        write(sink, spark, 0, 10)
    (one,) = CommitLog(spark, path).last().parts
    state = after_long_run(one, 100_000)
    assert sum(part.rows for part in state.parts) == 1_000_000
    data = tmp_path / "scored" / "data"
    for part in state.parts:
        (data / part.folder).mkdir(parents=True)
        for name in one.files:
            (data / part.folder / name).hardlink_to(data / one.folder / name)
    CommitLog(spark, path).write(state)

    started = time.monotonic()
    scored = read_scored(spark, path)
    opening = time.monotonic() - started
    started = time.monotonic()
    assert scored.count() == 10 * len(state.parts)
    counting = time.monotonic() - started

    def seconds_a_batch(sink, start):
        started = time.monotonic()
        write(sink, spark, start, start + 10)
        return time.monotonic() - started

    with Sink(spark, str(tmp_path / "new")) as sink:
        new = [seconds_a_batch(sink, start) for start in range(0, 200, 10)][10:]
    with Sink(spark, path) as sink:
        end = sink.positions()[PARTITION]
        old = [seconds_a_batch(sink, start) for start in range(end, end + 200, 10)][10:]
    print(
        f"{len(state.parts)} parts: open {opening:.2f} s, count {counting:.2f} s, a batch "
        f"{statistics.median(old):.3f} s, of a new sink {statistics.median(new):.3f} s"
    )
    assert opening < 3
    assert statistics.median(old) < 1.5 * statistics.median(new) + 0.1
