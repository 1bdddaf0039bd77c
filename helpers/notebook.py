"""A notebook run from the command line, with parameters, progress, and its results in one line.

    python -m helpers.notebook 1_walkthrough EVENTS=20000

The names that can be set, in capitals, are those of the cell tagged `parameters`. The notebook's
last cell is a dictionary: what it records, and what the last line of the output repeats.
"""

from __future__ import annotations

import argparse
import ast
import linecache
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from papermill import PapermillExecutionError, execute_notebook
from traitlets.config import Config

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CELL_SECONDS = 7_200  # trainings on the whole file of the challenge take up to an hour


class NotebookError(RuntimeError):
    """A notebook or a parameter doesn't exist, a value doesn't fit, or nothing was recorded."""


def find_notebook(name: str) -> Path:
    """Return the path of a notebook, given as a path or by its name alone.

    Raises
    ------
    NotebookError
        If there is none; the message lists those that there are.

    Examples
    --------
    >>> find_notebook("1_walkthrough").name
    '1_walkthrough.ipynb'
    """
    for path in (Path(name), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb"):
        if path.suffix == ".ipynb" and path.is_file():
            return path
    there_are = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
    raise NotebookError(f"there is no notebook {name!r}; there are: {there_are}.")


def parameters(path: Path) -> dict[str, Any]:
    """Return the names and values of a notebook's cell tagged `parameters`.

    Raises
    ------
    NotebookError
        If the notebook has no such cell.

    Examples
    --------
    >>> parameters(find_notebook("1_walkthrough"))["topic"]
    'Machine_Learning'
    """
    for cell in nbformat.read(path, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return {
                statement.targets[0].id: ast.literal_eval(statement.value)
                for statement in ast.parse(cell.source).body
                if isinstance(statement, ast.Assign)
            }
    raise NotebookError("the notebook has no cell tagged 'parameters'.")


def parameter_values(path: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the parameters that were given as text, by their names and with their types.

    Parameters
    ----------
    path : pathlib.Path
        The notebook.
    given : mapping of str to str
        Values as text, by the parameters' names in capitals.

    Raises
    ------
    NotebookError
        If there is no such parameter, or the text is not a value of the parameter's type.

    Examples
    --------
    >>> parameter_values(find_notebook("1_walkthrough"), {"EVENTS": "20_000"})
    {'events': 20000}
    """
    if not given:
        return {}
    defaults = parameters(path)
    for name in given:
        if name.lower() not in defaults:
            known = ", ".join(parameter.upper() for parameter in defaults)
            raise NotebookError(f"the notebook has no parameter {name}; it has: {known}.")
    return {
        name.lower(): _convert(name, text, defaults[name.lower()]) for name, text in given.items()
    }


def definitions(name: str, tag: str) -> dict[str, Any]:
    """Return what the cells of a notebook with a tag define: for programs that use its functions.

    Parameters
    ----------
    name : str
        The notebook, as for `find_notebook`.
    tag : str
        Only the cells with this tag are run, in this process, one after the other.

    Returns
    -------
    dict of str to object
        The names that they define.

    Examples
    --------
    >>> definitions("1_walkthrough", "pipeline")["post_process"].__doc__
    'Add the index of the class.'
    """
    notebook = nbformat.read(find_notebook(name), as_version=4)
    namespace: dict[str, Any] = {}
    for number, cell in enumerate(notebook.cells):
        if tag in cell.metadata.get("tags", []):
            file = f"<{name}, cell {number}, tagged {tag}>"
            # So that a traceback, and inspect.getsource, can show its lines.
            lines = cell.source.splitlines(keepends=True)
            linecache.cache[file] = len(cell.source), None, lines, file
            exec(compile(cell.source, file, "exec"), namespace)
    return namespace


def recorded(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Return what the last cell recorded: the dictionary that is its value.

    Raises
    ------
    NotebookError
        If the last cell has no dictionary as its value.
    """
    return record_in([cell for cell in notebook.cells if cell.cell_type == "code"][-1].outputs)


def record_in(outputs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the dictionary that is the value of a cell with these outputs.

    Raises
    ------
    NotebookError
        If the cell has no dictionary as its value.

    Examples
    --------
    >>> record_in([{"output_type": "execute_result", "data": {"text/plain": "{'events': 5}"}}])
    {'events': 5}
    """
    for output in outputs:
        if output["output_type"] == "execute_result":
            value = ast.literal_eval(output["data"]["text/plain"])
            if isinstance(value, dict):
                return value
    raise NotebookError("the notebook's last cell records nothing: its value must be a dictionary.")


def run(path: Path, given: Mapping[str, str]) -> tuple[nbformat.NotebookNode, str | None]:
    """Execute a notebook in a fresh kernel, in its own folder, and say on stderr where it is.

    Parameters
    ----------
    path : pathlib.Path
        The notebook; the file isn't changed.
    given : mapping of str to str
        Parameters, as for `parameter_values`.

    Returns
    -------
    nbformat.NotebookNode
        The executed notebook. Where a cell fails, the rest of it isn't executed.
    str or None
        The section, the source and the error of the cell that failed; None if none did.

    Raises
    ------
    NotebookError
        If a parameter doesn't fit.
    """
    values = parameter_values(path, given)
    cells = nbformat.read(path, as_version=4).cells
    # Papermill sets the values in a cell of its own, after the parameters.
    progress = _Progress(sum(cell.cell_type == "code" for cell in cells) + bool(values))
    failure = None
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        executed = Path(folder) / path.name
        try:
            execute_notebook(
                path, executed, values, cwd=path.parent, kernel_name="python3", language="python",
                progress_bar=False, execution_timeout=CELL_SECONDS,
                on_cell_start=progress.cell_starts, config=_over_sockets(folder),
            )  # fmt: skip
        except PapermillExecutionError as error:
            failure = progress.place(f"{error.ename}: {error.evalue}")
        except (RuntimeError, TimeoutError) as error:  # the kernel has died, or a cell takes long
            failure = progress.place(f"{type(error).__name__}: {error}")
        return nbformat.read(executed, as_version=4), failure


def main(arguments: list[str] | None = None) -> int:
    """Run a notebook as the command line says, and return the exit code."""
    options = _options(arguments)
    try:
        path = find_notebook(options.notebook)
        given = dict(_split(setting) for setting in options.settings)
        notebook, failure = run(path, given)
        # A run that fails leaves the page of the last one that didn't.
        name = f"{path.stem}.failed" if failure else path.stem
        page = _write_html(notebook, Path(options.html), name)
        if failure:
            print(f"{path.name} failed {failure}\n\nThe whole of it: {page}", file=sys.stderr)
            return 1
        values = recorded(notebook)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if options.store:
        _store_outputs(notebook, path)
    seconds = notebook.metadata.papermill.duration
    print(f"done after {seconds:.0f} s; the executed notebook: {page}", file=sys.stderr)
    name = re.sub(r"^\d+_", "", path.stem)
    print(f"{name}: {' '.join(f'{key}={value}' for key, value in values.items())}")
    return 0


class _Progress:
    """Says which cell of which section runs."""

    def __init__(self, code_cells: int) -> None:
        self._code_cells = code_cells
        self._number = 0
        self._section = "the beginning"
        self._source = ""
        self._started = time.monotonic()

    def cell_starts(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """Show that a cell begins; nbclient calls this, also for the cells with text."""
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE)
            self._section = headings[-1] if headings else self._section
            return
        self._number += 1
        self._source = cell.source
        seconds = time.monotonic() - self._started
        cells = f"{self._number:2}/{self._code_cells}"
        print(f"{seconds:4.0f} s  cell {cells}  {self._section}", file=sys.stderr, flush=True)

    def place(self, error: str) -> str:
        """Return an error with the section and the source of the cell that runs."""
        return f"in {self._section!r}, the cell\n\n{self._source}\n\n{error}"


def _over_sockets(folder: str) -> Config:
    """Return how to reach the kernel: not over network ports that all users here can read."""
    return Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})


def _store_outputs(executed: nbformat.NotebookNode, path: Path) -> None:
    """Put the outputs of a run into the notebook itself, and nothing else of what was executed."""
    notebook = nbformat.read(path, as_version=4)
    results = {cell.id: cell for cell in executed.cells}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = results[cell.id].outputs
            cell.execution_count = results[cell.id].execution_count
    nbformat.write(notebook, path)


def _convert(name: str, text: str, default: Any) -> Any:
    """Return the value that a text stands for where `default` is the parameter's usual value."""
    kinds = {bool: "True or False", int: "a whole number", float: "a number"}
    kind = type(default)
    if kind not in kinds:
        return text
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise NotebookError(f"{name} must be {kinds[kind]}, not {text!r}.") from None


def _split(setting: str) -> tuple[str, str]:
    name, equals, text = setting.partition("=")
    if not equals:
        raise NotebookError(f"{setting!r} is not a setting: write NAME=value.")
    return name, text


def _write_html(notebook: nbformat.NotebookNode, folder: Path, name: str) -> Path:
    """Write a notebook as one HTML page, and return the page's path."""
    exporter = HTMLExporter(embed_images=True)
    page, _ = exporter.from_notebook_node(
        notebook, resources={"metadata": {"path": str(NOTEBOOKS), "name": name}}
    )
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.html"
    target.write_text(page)
    return target


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.notebook",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("notebook", help="a path, or a name such as 1_walkthrough")
    parser.add_argument("settings", nargs="*", metavar="NAME=value")
    parser.add_argument("--html", default="build", help="folder for the page; default: %(default)s")
    parser.add_argument("--store", action="store_true", help="keep the outputs in the notebook")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
