"""Paths mean what they say; JSON files are written once, and are either complete or absent."""

import contextlib
import errno
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
from processes import run_python

from helpers.spark import JsonFolder, exact_path, exact_reader, file_size, folder_names, full_path

# Names with characters that mean something to Hadoop, to Spark or to a URI.
ODD_NAMES = [
    "results[1]", "{a}", "x*", "q?", "b\\c", "a,b", "p%20q", "h#i", "c:d", "e f", " g", "Prüf-日本",
    "'q\"", "${user.name}", "all [1]{a,b}*?\\,%20#:ü",
]  # fmt: skip


@pytest.fixture(scope="module")
def table(spark, tmp_path_factory):
    """A folder with a Parquet file of seven rows."""
    folder = tmp_path_factory.mktemp("table") / "seven"
    spark.range(7).coalesce(1).write.parquet(str(folder))
    return folder


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_is_exactly_that_path(spark, tmp_path, table, name):
    """Python, Hadoop and Spark use the same folder, with or without a scheme, and no neighbour."""
    for neighbour in ("xy", "qq", "a", "b", "results1", "bc"):
        shutil.copytree(table, tmp_path / neighbour / "data")
    folder = exact_path(spark, tmp_path / name)
    spark.range(4).coalesce(1).write.parquet(f"{folder}/data")
    assert exact_reader(spark).parquet(f"file:{folder}/data").count() == 4
    assert set(folder_names(spark, f"{folder}/data")) <= set(os.listdir(tmp_path / name / "data"))
    JsonFolder(spark, f"file:{folder}/notes").write("one", name)
    assert JsonFolder(spark, tmp_path / name / "notes").read("one") == name
    note = tmp_path / name / "notes" / "one.json"
    assert file_size(spark, note) == note.stat().st_size


def test_a_relative_path_is_relative_to_this_process(spark, tmp_path, monkeypatch):
    """A relative path is relative to Python's current folder, which Java doesn't follow."""
    monkeypatch.chdir(tmp_path)
    for path in ("scored", "a:b", "a:b/c", Path("a:b")):
        assert exact_path(spark, path) == f"{tmp_path}/{path}"
    assert full_path(spark, Path("scored")) == f"file:{tmp_path}/scored"
    assert exact_path(spark, f"/{tmp_path}") == str(tmp_path)  # not the host `tmp`


@pytest.mark.parametrize(
    "path, fault",
    [
        ("", "the path '' is empty"),
        ("/tmp/a\0b", "a NUL"),
        (b"/tmp/\xff", "bytes that are not UTF-8: choose another name"),
        (Path("hdfs://host/scored"), "is a URI, which pathlib changes: pass it as a string"),
        ("hdfs://host:8020/a:b", "has a colon, which HDFS doesn't allow: choose another name"),
    ],
)
def test_a_path_that_hadoop_cannot_use_is_refused(spark, path, fault):
    """A path that Hadoop would change or can't use is refused, with the remedy."""
    with pytest.raises(ValueError, match=fault):
        exact_path(spark, path)


IN_ANOTHER_LOCALE = """
import sys
from pathlib import Path
from helpers.sinks import ParquetSink
from helpers.spark import get_spark
spark = get_spark(cores=1)
try:
    ParquetSink(spark, Path(sys.argv[1]), signal_index=0).__enter__()
except ValueError as error:
    print(error)
"""


def test_a_path_that_the_locale_cannot_write_is_refused(tmp_path):
    """In a locale without the path's characters, it is refused before anything is written."""
    environment = {**os.environ, "LC_ALL": "C"}
    run = run_python("-c", IN_ANOTHER_LOCALE, str(tmp_path / "Prüf"), env=environment)
    assert "can't be written in ANSI_X3.4-1968" in run.stdout, run.stderr
    assert "LC_ALL=C.UTF-8" in run.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(spark, tmp_path):
    """An empty folder for JSON files."""
    return JsonFolder(spark, str(tmp_path / "files"))


def test_a_folder_inside_a_file_is_refused(spark, tmp_path):
    """A folder whose parent is a file can't be created, and the message names both."""
    (tmp_path / "note").touch()
    with pytest.raises(OSError, match=r"note/files can't be created: .*note\. Check the path\."):
        JsonFolder(spark, tmp_path / "note" / "files")


def test_a_file_is_never_replaced(folder):
    """Writing a file that exists fails and leaves its content unchanged."""
    folder.write("0", {"writer": "first"})
    with pytest.raises(FileExistsError, match=r"files/0\.json exists already"):
        folder.write("0", {"writer": "second"})
    assert folder.read("0") == {"writer": "first"}


def test_only_one_of_many_writers_gets_the_name(folder):
    """Of eight concurrent writers of a file, one succeeds and the others fail."""
    refused, together = [], threading.Barrier(8)

    def write(number):
        together.wait(300)
        try:
            folder.write("0", number)
        except FileExistsError:
            refused.append(number)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(300)
    assert len(refused) == 7
    assert folder.read("0") not in refused


def test_what_a_crash_leaves_half_written_is_no_file(folder, tmp_path):
    """A draft that a crash leaves behind is neither listed nor readable."""
    (tmp_path / "files" / ".0.draft").write_text('{"batch": ')
    (tmp_path / "files" / "_SUCCESS").touch()
    assert folder.names() == []
    with pytest.raises(FileNotFoundError):
        folder.read("0")


def test_a_folder_that_cannot_be_flushed_is_used(folder, monkeypatch):
    """Some file systems flush files only."""
    flush = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    folder.write("1", {})
    assert folder.names() == ["1"]


def test_a_folder_that_can_be_written_but_not_read_is_used(folder, monkeypatch):
    """A drop box, whose entries its users can't list, is as good a place as any."""
    opened = os.open

    def refuse_folders(path, flags, *mode):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refuse_folders)
    folder.write("1", {})
    assert folder.names() == ["1"]


def test_names_are_sorted_and_a_file_can_go(folder):
    """Names are listed in order, and deleting a missing file is not an error."""
    for name in ("2", "0", "1"):
        folder.write(name, name)
    folder.delete("1")
    folder.delete("never written")
    assert folder.names() == ["0", "2"]


def test_a_file_shows_that_it_was_touched(folder):
    """Touching a file updates its modification time; a missing file has none."""
    assert folder.changed_at("0") is None
    folder.write("0", {})
    before = folder.changed_at("0")
    folder.touch("0")
    assert folder.changed_at("0") > before - 1


def test_a_file_that_another_process_removes_is_only_missing(folder):
    """A file that goes while it is looked at is missing, not an error of Java's."""

    def come_and_go():
        for _ in range(300):
            folder.write("0", {"a": "note"})
            folder.delete("0")

    other = threading.Thread(target=come_and_go)
    other.start()
    while other.is_alive():
        assert folder.names() in ([], ["0"])
        folder.changed_at("0")
        with contextlib.suppress(FileNotFoundError):
            assert folder.read("0") == {"a": "note"}
    assert folder.names() == []


def test_what_is_there_but_cannot_be_read_is_not_called_missing(folder, tmp_path):
    """Java has the same exception for a missing file, a folder and too many open files."""
    (tmp_path / "files" / "0.json").mkdir()
    with pytest.raises(Exception, match="Is a directory") as refused:
        folder.read("0")
    assert not isinstance(refused.value, FileNotFoundError)


def test_a_file_that_cannot_be_written_is_said_in_a_sentence(folder, tmp_path):
    """The error is Python's, with Java's reason, and no draft stays behind."""
    (tmp_path / "files").rmdir()
    (tmp_path / "files").touch()
    with pytest.raises(OSError, match=r"files/0\.json can't be written: "):
        folder.write("0", {})
