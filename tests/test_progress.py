"""What `make test` shows while it runs, and how many processes it starts."""

import os
import re

import pytest
from processes import dry_run_make, run_python

from conftest import processes_for

FILES = {
    "test_first.py": "def test_good():\n    pass\n\ndef test_bad():\n    assert 1 == 2\n",
    "test_second.py": "def test_good():\n    pass\n",
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What a run of two files prints, with the options of `make test`."""
    folder = tmp_path_factory.mktemp("tests")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    options = dry_run_make("test", "WORKERS=2").rpartition("pytest ")[2].split()
    run = run_python("-m", "pytest", *options, "-p", "conftest", "-c", os.devnull,
                     "--rootdir", str(folder), str(folder))  # fmt: skip
    assert run.returncode == 1, run.stdout + run.stderr
    return run.stdout.splitlines()


@pytest.mark.long
def test_each_file_is_one_line_when_it_is_done(lines):
    """The share of all tests, the time so far, the file's name, and how many tests it has."""
    done = [line for line in lines if re.fullmatch(r" *\d+ % +\d+:\d\d  \S+ \(\d\)", line)]
    files = sorted(line.split("  ")[-1] for line in done)
    assert files == ["test_first.py (2)", "test_second.py (1)"]
    assert done[-1].startswith("100 %")


@pytest.mark.long
def test_a_test_that_fails_is_named_before_its_file_is_done(lines):
    """And once more in the summary, with the reason."""
    done = next(index for index, line in enumerate(lines) if line.endswith("test_first.py (2)"))
    assert "FAILED test_first.py::test_bad" in lines[:done]
    assert lines[-2].startswith("FAILED ")


@pytest.mark.parametrize("free, processes", [(0.5e9, 1), (5e9, 2), (7.4e9, 2), (60e9, 3)])
def test_the_free_memory_decides_how_many_processes_run(free, processes):
    """A laptop of 8 GB, of which 5 are free, runs two."""
    assert processes_for(free) == processes


def test_the_number_of_processes_can_be_set():
    """By default it is what the free memory decides."""
    assert "-n auto " in dry_run_make("test")
    assert "-n 1 " in dry_run_make("test", "WORKERS=1")
