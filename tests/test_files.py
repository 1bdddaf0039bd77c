"""Tests of helpers/files.py: files that are there whole, once, or not at all."""

import threading

import pytest

from helpers.spark import JsonFolder


@pytest.fixture
def folder(spark, tmp_path):
    """An empty folder of JSON files."""
    return JsonFolder(spark, str(tmp_path / "files"))


def test_a_file_is_never_replaced(folder):
    """Otherwise two jobs could commit a batch of the same number, and one would be lost."""
    folder.write("0", {"writer": "first"})
    with pytest.raises(FileExistsError, match=r"files/0\.json exists already"):
        folder.write("0", {"writer": "second"})
    assert folder.read("0") == {"writer": "first"}


def test_only_one_of_many_writers_gets_the_name(folder):
    """Otherwise it would be luck which of two jobs notices the other."""
    refused, together = [], threading.Barrier(8)

    def write(number):
        together.wait(10)
        try:
            folder.write("0", number)
        except FileExistsError:
            refused.append(number)

    writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert len(refused) == 7
    assert folder.read("0") not in refused


def test_what_a_crash_leaves_half_written_is_no_file(folder, tmp_path):
    """Otherwise a batch would count whose files nobody has finished."""
    (tmp_path / "files" / ".0.draft").write_text('{"batch": ')
    (tmp_path / "files" / "_SUCCESS").touch()
    assert folder.names() == []
    with pytest.raises(FileNotFoundError):
        folder.read("0")


def test_names_are_sorted_and_a_file_can_go(folder):
    """Otherwise the last batch would not be found, or old plans stay for ever."""
    for name in ("2", "0", "1"):
        folder.write(name, name)
    folder.delete("1")
    folder.delete("never written")
    assert folder.names() == ["0", "2"]


def test_a_file_shows_that_it_was_touched(folder):
    """Otherwise a job that lives would be taken for dead."""
    assert folder.changed_at("0") is None
    folder.write("0", {})
    before = folder.changed_at("0")
    folder.touch("0")
    assert folder.changed_at("0") > before - 1
