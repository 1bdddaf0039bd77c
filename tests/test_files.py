"""JSON files on Spark's file systems: written once, and either complete or absent."""

import threading

import pytest

from helpers.spark import JsonFolder


@pytest.fixture
def folder(spark, tmp_path):
    """An empty folder for JSON files."""
    return JsonFolder(spark, str(tmp_path / "files"))


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
    """A draft that a crash leaves behind is neither listed nor readable."""
    (tmp_path / "files" / ".0.draft").write_text('{"batch": ')
    (tmp_path / "files" / "_SUCCESS").touch()
    assert folder.names() == []
    with pytest.raises(FileNotFoundError):
        folder.read("0")


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
