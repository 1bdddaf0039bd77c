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
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from tqdm import tqdm
from traitlets.config import Config

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CELL_SECONDS = 7_200  # three trainings on the whole file of the challenge take up to an hour


class NotebookError(RuntimeError):
    """A notebook or a parameter isn't there, a value doesn't fit, or a cell failed."""


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


def parameters(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Return the names and values of the cell tagged `parameters`.

    Examples
    --------
    >>> notebook = nbformat.read(find_notebook("1_walkthrough"), as_version=4)
    >>> parameters(notebook)["topic"]
    'Machine_Learning'
    """
    source = notebook.cells[_parameters_index(notebook)].source
    return {
        statement.targets[0].id: ast.literal_eval(statement.value)
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
    }


def set_parameters(notebook: nbformat.NotebookNode, given: Mapping[str, str]) -> None:
    """Insert a cell after the `parameters` that sets some of them anew.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
        The notebook; it is changed.
    given : mapping of str to str
        Values as text, by the parameters' names in capitals.

    Raises
    ------
    NotebookError
        If there is no such parameter, or the text is no value of the parameter's type.
    """
    if not given:
        return
    defaults = parameters(notebook)
    lines = []
    for name, text in given.items():
        if name.lower() not in defaults:
            known = ", ".join(parameter.upper() for parameter in defaults)
            raise NotebookError(f"the notebook has no parameter {name}; it has: {known}.")
        lines.append(f"{name.lower()} = {_convert(name, text, defaults[name.lower()])!r}")
    cell = nbformat.v4.new_code_cell("\n".join(lines))
    notebook.cells.insert(_parameters_index(notebook) + 1, cell)


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
        The names that they define. It is the namespace of the functions, too: what a function looks
        up, such as a folder to write to, can be put in it.

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
        Parameters, as for `set_parameters`.

    Returns
    -------
    nbformat.NotebookNode
        The executed notebook. Where a cell fails, the rest of it wasn't executed.
    str or None
        The section, the source and the error of the cell that failed; None if none did.

    Raises
    ------
    NotebookError
        If a parameter doesn't fit.
    """
    notebook = nbformat.read(path, as_version=4)
    set_parameters(notebook, given)
    for cell in notebook.cells:
        if cell.cell_type == "code":  # what an earlier run left must not pass for this one's
            cell.outputs, cell.execution_count = [], None
    code_cells = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    with tempfile.TemporaryDirectory(prefix="kernel-") as sockets:
        client = NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(path.parent)}},
            config=_kernel_settings(sockets),
        )
        with _Progress(path.stem, notebook, code_cells) as progress:
            client.on_cell_start = progress.cell_starts
            try:
                client.execute()
            except CellExecutionError as error:
                return notebook, progress.place(f"{error.ename}: {error.evalue}")
            except (DeadKernelError, CellTimeoutError) as error:
                return notebook, progress.place(f"{type(error).__name__}: {error}")
            progress.done = True
    return notebook, None


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
        nbformat.write(notebook, path)
    print(f"the executed notebook: {page}", file=sys.stderr)
    name = re.sub(r"^\d+_", "", path.stem)
    print(f"{name}: {' '.join(f'{key}={value}' for key, value in values.items())}")
    return 0


class _Progress:
    """Says which cell of which section runs: a bar in a terminal, lines elsewhere."""

    def __init__(
        self, name: str, notebook: nbformat.NotebookNode, code_cells: list[int]
    ) -> None:
        self._notebook = notebook
        self._code_cells = code_cells
        self._started = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=len(code_cells), desc=name, unit="cell", disable=not self._terminal, leave=False
        )
        self._cell_index = code_cells[0]
        self.done = False

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        seconds = time.monotonic() - self._started
        print(f"{'done' if self.done else 'stopped'} after {seconds:.0f} s", file=sys.stderr)

    def place(self, error: str) -> str:
        """Return an error with the section and the source of the cell that runs."""
        section = _section(self._notebook, self._cell_index)
        source = self._notebook.cells[self._cell_index].source
        return f"in {section!r}, the cell\n\n{source}\n\n{error}"

    def cell_starts(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """Show that a cell begins; nbclient calls this."""
        if cell_index not in self._code_cells:
            return
        self._cell_index = cell_index
        number = self._code_cells.index(cell_index)
        section = _section(self._notebook, cell_index)
        if self._terminal:
            self._bar.set_description(section, refresh=False)
            self._bar.update(number - self._bar.n)
            self._bar.refresh()
        else:
            seconds = time.monotonic() - self._started
            cells = f"{number + 1:2}/{len(self._code_cells)}"
            print(f"{seconds:4.0f} s  cell {cells}  {section}", file=sys.stderr, flush=True)


def _kernel_settings(sockets: str) -> Config:
    """Return how the kernel is reached and ended."""
    manager = {
        # Over sockets in a folder, not over network ports that anybody on this machine can read.
        "transport": "ipc",
        "ip": f"{sockets}/kernel",
    }
    return Config({"KernelManager": manager})


def _section(notebook: nbformat.NotebookNode, index: int) -> str:
    """Return the heading that a cell stands under."""
    for cell in reversed(notebook.cells[:index]):
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+\s+(.+)$", cell.source, re.MULTILINE)
            if headings:
                return headings[-1]
    return "the beginning"


def _parameters_index(notebook: nbformat.NotebookNode) -> int:
    """Return the index of the cell tagged `parameters`."""
    for index, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", []):
            return index
    raise NotebookError("the notebook has no cell tagged 'parameters'.")


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
        raise NotebookError(f"{setting!r} is no setting: write NAME=value.")
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
