"""Notebooks run from the command line, and what all of them have: exercises, outputs, links."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from notebook_cells import broken_links, cells_of, text_of
from processes import ROOT, dry_run_make, run_python, running, wait_until

from conftest import compare_records
from helpers.notebook import (
    NotebookError,
    find_notebook,
    main,
    parameter_values,
    parameters,
    recorded,
)


@pytest.fixture
def make_notebook(tmp_path):
    """Write a notebook of a heading, a parameters cell, and other code cells."""

    def make(*sources, name="7_small"):
        cells = [nbformat.v4.new_markdown_cell("# A heading\n\n[Next](8_next.ipynb#Then)")]
        defaults = 'events = 5\nrate = 0.5\nname = ""\nfast = False\nsteps = [2.0, 0.5]'
        cells += [nbformat.v4.new_code_cell(defaults)]
        cells[1].metadata["tags"] = ["parameters"]
        cells += [nbformat.v4.new_code_cell(source) for source in sources]
        path = tmp_path / f"{name}.ipynb"
        metadata = {"sparkconnect": {"bundled_options": [], "list_of_options": []}}  # as on SWAN
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
        return path

    return make


def run_notebook(path, *arguments):
    """Run a notebook as `make run` does, but in this process, where all is imported already."""
    printed, reported = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(reported):
        code = main([str(path), "--html", str(path.parent / "pages"), *arguments])
    return subprocess.CompletedProcess([], code, printed.getvalue(), reported.getvalue())


def test_it_ends_with_what_the_last_cell_records(make_notebook):
    """The last line on stdout has the recorded values, for scripts."""
    path = make_notebook("{'events': events, 'double': events * 2}")
    page = str(path.parent / "pages")
    run = run_python("-m", "helpers.notebook", str(path), "--html", page, "EVENTS=21")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "small: events=21 double=42\n"
    assert "A heading" in (path.parent / "pages" / "7_small.html").read_text()


def test_a_page_is_written_whatever_the_locale(make_notebook, tmp_path):
    """A page with characters beyond ASCII is written where the locale knows only ASCII."""
    path, page = make_notebook("{'text': '\u2022'}"), str(tmp_path / "pages")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **ascii_only, "PYTHONIOENCODING": "utf8"}
    run = run_python("-m", "helpers.notebook", str(path), "--html", page, env=environment)
    assert run.returncode == 0, run.stderr
    assert "\u2022" in (path.parent / "pages" / "7_small.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("moment", ["kernel-*", "kernel-*/kernel-*", "begun"])
def test_a_run_that_is_ended_leaves_nothing(make_notebook, tmp_path, moment):
    """SIGTERM, as a CI system sends it, ends the kernel as well, even while that starts."""
    path = make_notebook(
        "import os, pathlib, time",
        "(pathlib.Path(os.environ['TMPDIR']) / 'begun').touch()\ntime.sleep(600)",
    )
    command = [sys.executable, "-m", "helpers.notebook", str(path), "--html", str(tmp_path)]
    with tempfile.TemporaryDirectory() as folder:  # with a path that is short enough for sockets
        with running(command, env={**os.environ, "TMPDIR": folder}) as process:
            wait_until(lambda: list(Path(folder).glob(moment)))
            process.terminate()
            assert process.wait(600) == 143
        assert set(os.listdir(folder)) <= {"begun"}


def test_a_signal_that_is_ignored_ends_nothing(make_notebook, tmp_path):
    """A run that was started with `nohup` goes on when its terminal is closed."""
    path = make_notebook("import os, signal\nos.kill(os.getppid(), signal.SIGHUP)", "{'events': 1}")
    command = [sys.executable, "-m", "helpers.notebook", str(path), "--html", str(tmp_path)]
    run = subprocess.run(["nohup", *command], capture_output=True, text=True, timeout=600)
    assert run.stdout == "small: events=1\n", run.stderr


def test_the_links_of_its_page_lead_to_the_files_beside_the_notebook(make_notebook):
    """The page is in another folder, so its relative links are rewritten."""
    path = make_notebook("{'events': events}")
    run_notebook(path)
    page = (path.parent / "pages" / "7_small.html").read_text()
    assert '<a href="../8_next.ipynb#Then">Next</a>' in page


def test_its_page_contains_its_images_and_hides_solutions(make_notebook):
    """The page needs no other file, and a solution is inside the part that a click opens."""
    path = make_notebook("{'events': events}")
    (path.parent / "images").mkdir()
    (path.parent / "images" / "one.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    notebook = nbformat.read(path, as_version=4)
    hidden = "<details><summary>Solution</summary>\n\n```python\n1 + 1\n```\n\n</details>"
    text = f"![A picture](images/one.svg)\n\n![Another](gone.png)\n\n{hidden}"
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(text))
    nbformat.write(notebook, path)
    run = run_notebook(path)
    assert run.returncode == 0, run.stderr
    page = (path.parent / "pages" / "7_small.html").read_text()
    assert re.search(r'src="data:image/svg\+xml;base64,[^"]{20,}" alt="A picture"|'
                     r'alt="A picture" src="data:image/svg\+xml;base64,[^"]{20,}"', page)
    assert re.search(r"<summary>Solution</summary>\s*<div.*?</div>\s*</details>", page, re.S)


def test_a_long_path_of_temporary_files_does_not_matter(make_notebook, tmp_path, monkeypatch):
    """The path of a socket, through which the kernel is reached, has a limit of 107 bytes."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    run = run_notebook(make_notebook("{'events': events}"))
    assert run.stdout == "small: events=5\n", run.stderr


def test_without_a_terminal_the_progress_is_lines(make_notebook):
    """A log has a line per cell, and no redrawn bars."""
    run = run_notebook(make_notebook("{'events': events}"))
    lines = run.stderr.splitlines()
    assert lines[0].endswith("cell  1/2  A heading")
    assert "\r" not in run.stderr


def test_a_failing_cell_is_shown_and_fails(make_notebook):
    """The cell, its section and its error are shown, without the runner's traceback."""
    run = run_notebook(make_notebook("print('before')\n1 / 0", "{'events': 1}"))
    assert run.returncode == 1
    assert run.stdout == ""
    assert "failed in 'A heading', the cell" in run.stderr
    assert "1 / 0\n\nZeroDivisionError: division by zero" in run.stderr
    assert "nbclient" not in run.stderr


def test_outputs_of_an_earlier_run_do_not_show(make_notebook):
    """The page of a failed run has no results of an earlier run below the error."""
    path = make_notebook("fast or 1 / 0", "{'secret': 12345}")
    assert run_notebook(path, "FAST=True", "--store").returncode == 0
    assert run_notebook(path).returncode == 1
    pages = path.parent / "pages"
    page = (pages / "7_small.failed.html").read_text()
    assert page.count("12345") == 1  # in the source, not in an output
    assert (pages / "7_small.html").read_text().count("12345") == 2  # of the run before


def test_a_kernel_that_dies_is_said(make_notebook):
    """The cell that was running is named, without the runner's traceback."""
    run = run_notebook(make_notebook("import os\nos.kill(os.getpid(), 9)", "{'events': 1}"))
    assert run.returncode == 1
    assert "failed in 'A heading', the cell\n\nimport os" in run.stderr
    assert "DeadKernelError" in run.stderr
    assert "Traceback" not in run.stderr


def test_stored_outputs_are_those_of_the_run(make_notebook):
    """`make notebooks` keeps the outputs that the tests compare, and changes nothing else."""
    path = make_notebook("{'events': events}")
    before = nbformat.read(path, as_version=4)
    assert run_notebook(path, "EVENTS=21", "--store").returncode == 0
    stored = nbformat.read(path, as_version=4)
    assert recorded(stored) == {"events": 21}
    for cell in stored.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    assert stored == before


def test_outputs_are_also_stored_in_a_notebook_without_ids(make_notebook):
    """Cells have ids since format 4.5; older notebooks are as welcome."""
    path = make_notebook("{'events': events}")
    older = json.loads(path.read_text()) | {"nbformat_minor": 4}
    for cell in older["cells"]:
        del cell["id"]
    path.write_text(json.dumps(older))
    assert run_notebook(path, "EVENTS=21", "--store").returncode == 0
    assert recorded(nbformat.read(path, as_version=4)) == {"events": 21}


@pytest.mark.parametrize(
    "given, values",
    [
        ({"EVENTS": "20_000"}, {"events": 20_000}),
        ({"RATE": "2"}, {"rate": 2.0}),
        ({"NAME": "host:9092"}, {"name": "host:9092"}),
        ({"FAST": "True"}, {"fast": True}),
        ({"STEPS": "[1, 0.25]"}, {"steps": [1.0, 0.25]}),
    ],
)
def test_parameters_keep_their_types(make_notebook, given, values):
    """A value from the command line has the type of the notebook's default."""
    found = parameter_values(make_notebook(), given)
    assert found == values
    assert [type(value) for value in found.values()] == [type(value) for value in values.values()]


def test_each_type_arrives_in_the_notebook(make_notebook):
    """The values that were typed are those that its cells see, quotes and all."""
    values = "{'events': events, 'rate': rate, 'name': name, 'fast': fast, 'sum': sum(steps)}"
    given = ["EVENTS=6", "RATE=1e3", """NAME=it's "a\\b" é""", "FAST=1", "STEPS=[1, 0.25]"]
    run = run_notebook(make_notebook(values), *given)
    assert run.returncode == 0, run.stderr
    assert run.stdout == """small: events=6 rate=1000.0 name=it's "a\\b" é fast=True sum=1.25\n"""
    assert "unknown parameter" not in run.stderr


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"EVENT": "5"}, "no parameter EVENT; it has: EVENTS, RATE, NAME, FAST, STEPS"),
        ({"EVENTS": "many"}, "EVENTS must be a whole number, not 'many'"),
        ({"FAST": "maybe"}, "FAST must be True or False, not 'maybe'"),
        ({"RATE": "nan"}, "RATE must be a number, not 'nan'"),
        ({"RATE": "1e999"}, "RATE must be a number, not '1e999'"),
        ({"STEPS": "1"}, r"STEPS must be a list such as \[2.0, 0.5\], not '1'"),
        ({"STEPS": "['1']"}, r"STEPS must be a list such as \[2.0, 0.5\]"),
        ({"STEPS": "[1e999]"}, r"STEPS must be a list such as \[2.0, 0.5\]"),
        ({"STEPS": "[1, 0.5"}, r"STEPS must be a list such as \[2.0, 0.5\]"),
    ],
)
def test_a_wrong_parameter_is_refused_with_the_right_ones(make_notebook, given, reason):
    """A typo doesn't run the notebook; the message has the parameters that exist."""
    with pytest.raises(NotebookError, match=reason):
        parameter_values(make_notebook(), given)


def test_an_unknown_notebook_is_refused_with_the_known_ones():
    """The message has the notebooks' names."""
    run = run_python("-m", "helpers.notebook", "nowhere")
    assert run.returncode == 2
    assert run.stderr.startswith("there is no notebook 'nowhere'; the notebooks are: 1_walkthrough")


def test_make_passes_what_was_typed_to_the_notebook():
    """Each variable on the command line of `make run` is a parameter, with any characters."""
    commands = dry_run_make("run", "EVENTS=20", "NAME=it's", "NOTEBOOK=1_walkthrough")
    assert "helpers.notebook '1_walkthrough'" in commands
    assert "'EVENTS=20'" in commands
    assert r"'NAME=it'\''s'" in commands
    assert "NOTEBOOK=" not in commands.split("helpers.notebook")[1]


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebooks_can_be_run_by_name_and_were_stored_whole(path):
    """Each notebook has parameters, and the outputs of a whole run."""
    assert find_notebook(path.stem) == path
    notebook = nbformat.read(path, as_version=4)
    assert parameters(path)
    assert recorded(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is not None
            assert not [o for o in cell.outputs if o.get("name") == "stderr"]


TUTORIALS = ["1_walkthrough", "2_structured_streaming", "3_train_and_serve", "4_experiments"]


@pytest.mark.parametrize("name", TUTORIALS)
def test_most_outputs_are_compared(name):
    """At most two code cells in ten have an output that nbval ignores."""
    code = [cell for cell in cells_of(name) if cell.cell_type == "code"]
    ignored = [cell for cell in code if "nbval-ignore-output" in cell.metadata.get("tags", [])]
    assert len(ignored) <= 0.2 * len(code)


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_styled_table_shows_texts_as_texts(name):
    """What a broker answers is no HTML for the reader's browser; pandas' styles don't escape it."""
    styled = [cell.source for cell in cells_of(name) if ".style." in cell.source]
    assert all('.style.format(escape="html")' in source for source in styled)


@pytest.mark.parametrize("name", TUTORIALS)
def test_every_link_has_a_target(name):
    """Links lead to existing files and sections."""
    assert broken_links(name) == []


@pytest.mark.parametrize("name", TUTORIALS)
def test_there_are_three_exercises_with_a_hidden_solution(name):
    """The solutions are folded, so that they are not read with the question."""
    exercises = text_of(name).split("## Exercises")[-1]
    assert len(re.findall(r"^\*\*\d\.", exercises, re.MULTILINE)) == 3
    assert exercises.count("<details><summary>Solution</summary>") == 3


@pytest.mark.parametrize("change", [{"events": 99}, {"signal": 71}, {"batches": 0}])
def test_a_record_that_differs_fails_the_comparison(change):
    """Stored results with other names or counts fail a notebook's test."""
    stored = {"events": 100, "signal": 50, "batches": 3}
    compare_records(stored, {**stored, "signal": 52, "batches": 5})
    with pytest.raises(AssertionError):
        compare_records(stored, {**stored, **change})


@pytest.mark.parametrize("change", [{"auc": 0.86}, {"accuracy": 0.9}, {"streamed_auc": 0.905}])
def test_metrics_that_differ_fail_the_comparison(change):
    """A worse training, or a stream that scores otherwise, fails a notebook's test."""
    stored = {"events": 9, "accuracy": 0.8, "auc": 0.9}
    stored |= {"streamed_accuracy": 0.8, "streamed_auc": 0.9}
    near = {name: value + (name != "events") * 0.01 for name, value in stored.items()}
    compare_records(stored, near)
    with pytest.raises(AssertionError):
        compare_records(stored, {**stored, **change})


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "7_small.ipynb is not a notebook."),
        ("{}", "7_small.ipynb is not a notebook."),
        (None, "the notebook's last cell records nothing"),
        ("object()", "the notebook's last cell records nothing"),
        ("{'a': object()}", "the notebook's last cell records nothing"),
    ],
)
def test_a_file_that_is_no_notebook_of_this_kind_is_refused(make_notebook, content, reason):
    """One sentence says what is wrong with it."""
    path = make_notebook(*([content] if content and "(" in content else []))
    if content in ("", "{}"):
        path.write_text(content)
    run = run_notebook(path)
    assert (run.returncode, run.stdout) == (2, "")
    assert reason in run.stderr and "Traceback" not in run.stderr


def test_parameters_that_are_computed_are_refused(make_notebook):
    """The command line can't replace them."""
    path = make_notebook("{'events': 1}")
    path.write_text(path.read_text().replace("rate = 0.5", "rate = 0.5 + 1"))
    run = run_notebook(path, "EVENTS=3")
    assert run.returncode == 2
    assert "must assign values, not expressions" in run.stderr


def test_a_folder_for_the_page_that_cannot_be_made_is_refused_before_the_run(make_notebook):
    """The folder is made first, so no results are lost after minutes."""
    path = make_notebook("{'events': 1}")
    run = run_python("-m", "helpers.notebook", str(path), "--html", str(path))
    assert run.returncode == 2
    assert "choose another --html" in run.stderr and "cell" not in run.stderr


def test_a_page_that_cannot_be_written_after_the_run_is_said(make_notebook):
    """A folder that is gone or full after the run is reported with the option for another one."""
    run = run_notebook(make_notebook("import shutil\nshutil.rmtree('pages')\n{'events': 1}"))
    assert (run.returncode, run.stdout) == (2, "")
    assert "7_small.html can't be written (No such file or directory): choose another --html." in (
        run.stderr
    )


def test_a_kernel_that_cannot_be_started_is_not_taken_for_the_page(
    make_notebook, tmp_path, monkeypatch
):
    """A kernel whose Python is gone is named, with the command that shows where it is defined."""
    kernel = {"argv": ["/nowhere/python", "{connection_file}"], "display_name": "", "language": ""}
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    run = run_notebook(make_notebook("{'events': 1}"))
    assert (run.returncode, run.stdout) == (1, "")
    assert "can't be run: [Errno 2] No such file or directory: '/nowhere/python'" in run.stderr
    assert "(jupyter kernelspec list)" in run.stderr and "--html" not in run.stderr
