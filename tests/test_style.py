"""The style of code and English, and what must not be committed."""

import ast
import json
import re
import subprocess

import pytest
from processes import ROOT, run_python

# The files whose English is checked, as patterns of paths.
PROSE = ["README.md", "docs/*.md", "notebooks/*.ipynb", "helpers/**/*.py", "examples/*.py"]

# Patterns of unidiomatic English: the pattern, a sentence that has it, and a better one.
UNIDIOMATIC = [
    (r"(?<![Tt]here )\b(is|are) no (?!\w+er\b|more\b|less\b)",
     "a record that is no event", "a record that is not an event"),
    (r"\bthat (is|are) none\b", "four records that are none", "four records that are not events"),
    (r"\b(that|what|which) (is|are|isn't|aren't) (all )?there\b",
     "columns which aren't there", "columns that are missing"),
    (r"(^|[.|] )(What|Who) [^.?:|]*\.( |$)",
     "What is bad goes to a topic.", "Bad records go to a topic."),
    (r", for (it|they|he|she|we|you|there|nothing|nobody|each|its|their)\b",
     "it waits, for there is no broker", "it waits, because there is no broker"),
    (r"\b(an?|one|two|three) \w+ an? (batch|partition|topic|event|record|line|file|task|core)\b",
     "it prints a row a batch", "it prints a row per batch"),
    (r"\b(goes|go|going|went) on (after|behind|from|where)\b",
     "it goes on where it was", "it resumes from there"),
    (r'"""Have ', '"""Have offsets committed."""', '"""Commit offsets."""'),
    (r"\b(anew|mend(s|ed|ing)?|lives)\b", "it is made anew", "it is rebuilt"),
    (r"\b(tells|(is|are) told|holds? for)\b", "Spark tells of its end", "Spark reports its end"),
    (r", too\b(?! \w)", "it is counted, too", "it is also counted"),
]  # fmt: skip


def test_ruff_finds_nothing():
    """`ruff check` finds no problem."""
    run = run_python("-m", "ruff", "check", ".")
    assert run.returncode == 0, run.stdout


def test_every_dependency_is_pinned_and_explained():
    """Every requirement has an exact version, and a comment that explains it."""
    for file in [*ROOT.glob("requirements*.txt"), *ROOT.glob("tests/requirements*.txt")]:
        for line in file.read_text().splitlines():
            if not line.startswith("#"):
                assert "==" in line.split(";")[0]
                assert "  # " in line


def test_no_data_and_no_generated_file_is_committed():
    """Only files of known kinds are committed: no data, and nothing that can be generated."""
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    allowed = (".py", ".ipynb", ".md", ".txt", ".toml", ".cfg", ".sh", ".svg", ".png", ".yml")
    plain = {"Makefile", "LICENSE", ".gitignore", ".ci/run", "Dockerfile", ".dockerignore"}
    plain |= {"binder/postBuild", ".devcontainer/devcontainer.json"}
    assert [name for name in listing if not name.endswith(allowed) and name not in plain] == []


def test_a_room_imports_only_from_rooms_above_it():
    """The rooms can be read in the table's order, since none imports from a later one."""
    helpers = ROOT / "helpers"
    rooms = re.findall(r"^\| `(\w+)` \|", (helpers / "__init__.py").read_text(), re.MULTILINE)
    files = {file: file.parent.name for file in helpers.glob("*/*.py")}
    files |= {file: file.stem for file in helpers.glob("*.py") if file.stem in rooms}
    for file, room in files.items():
        place = rooms.index(room)
        for other in re.findall(r"^ *from helpers\.(\w+)", file.read_text(), re.MULTILINE):
            assert rooms.index(other) <= place, f"{file} imports from {other}"


def test_only_the_face_of_a_room_is_imported_from_outside():
    """Examples and notebooks import from rooms, never from modules inside them."""
    programs = [*(ROOT / "examples").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    for file in programs:
        assert not re.search(r"from helpers\.\w+\.\w+ import", file.read_text()), file


@pytest.mark.parametrize(("pattern", "worse", "better"), UNIDIOMATIC)
def test_a_pattern_finds_unidiomatic_english_only(pattern, worse, better):
    """Each pattern matches its example and not the improved sentence."""
    assert re.search(pattern, worse) and not re.search(pattern, better)


@pytest.mark.parametrize("glob", PROSE)
def test_the_english_is_idiomatic(glob):
    """No paragraph of a file has a pattern of unidiomatic English; code in it may."""
    found = [
        f"{file.name}, {match[0]!r} in: {paragraph}"
        for file in sorted(ROOT.glob(glob))
        for paragraph in paragraphs(prose_of(file))
        for pattern, *_ in UNIDIOMATIC
        for match in [re.search(pattern, paragraph)]
        if match
    ]
    assert found == []


def prose_of(file):
    """Return what a file says to people: text cells; docstrings, messages and comments."""
    text = file.read_text()
    if file.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] != "code")
    if file.suffix != ".py":
        return text
    strings = [
        node.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    comments = re.sub(r"^(?!\s*#).*$", "", text, flags=re.MULTILINE).replace("# ", "")
    examples = r"^\s*(>>>|\.\.\.) .*$"
    return re.sub(examples, "", "\n\n".join([*strings, comments]), flags=re.MULTILINE)


def paragraphs(text):
    """Return the paragraphs of a text, each as one line, without code."""
    prose = re.sub(r"```.*?```|(`+)[^`\n]*\1", "", text, flags=re.DOTALL)
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", prose)]
