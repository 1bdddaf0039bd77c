"""The style of all code, including the notebooks, and what must not be committed."""

import re
import subprocess

from processes import ROOT, run_python


def test_ruff_finds_nothing():
    """`ruff check` finds no problem."""
    run = run_python("-m", "ruff", "check", ".")
    assert run.returncode == 0, run.stdout


def test_every_dependency_is_pinned_and_explained():
    """Every requirement has an exact version, and a comment that explains it."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            assert "==" in line.split(";")[0]
            assert "  # " in line


def test_no_data_and_no_generated_file_is_committed():
    """Only files of known kinds are committed: no data, and nothing that can be generated."""
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    allowed = (".py", ".ipynb", ".md", ".txt", ".toml", ".cfg", ".sh", ".svg", ".png", ".yml")
    plain = {"Makefile", "LICENSE", ".gitignore", ".ci/run"}
    assert [name for name in listing if not name.endswith(allowed) and name not in plain] == []


def test_a_room_imports_only_from_rooms_above_it():
    """The rooms can be read in the table's order, since none imports from a later one."""
    helpers = ROOT / "helpers"
    rooms = re.findall(r"^\| `(\w+)` \|", (helpers / "__init__.py").read_text(), re.MULTILINE)
    for file in helpers.glob("*/*.py"):
        place = rooms.index(file.parent.name)
        for other in re.findall(r"^ *from helpers\.(\w+)", file.read_text(), re.MULTILINE):
            assert rooms.index(other) <= place, f"{file} imports from {other}"


def test_only_the_face_of_a_room_is_imported_from_outside():
    """Examples and notebooks import from rooms, never from modules inside them."""
    programs = [*(ROOT / "examples").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    for file in programs:
        assert not re.search(r"from helpers\.\w+\.\w+ import", file.read_text()), file
