"""Run a notebook from the command line, with parameters and progress; print its results in a line.

    python -m helpers.notebook 1_walkthrough EVENTS=20000

Set the notebook's parameters, the names in the cell tagged `parameters`, in capitals. The last
cell's value is a dictionary of results, which the last line of the output repeats.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import linecache
import math
import mimetypes
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import nbformat
from nbconvert import HTMLExporter
from papermill import PapermillExecutionError, execute_notebook
from traitlets.config import Config

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
CELL_SECONDS = 7_200  # trainings on the whole file of the challenge take up to an hour
_IMAGE = re.compile(r"!\[[^]]*\]\(([^)\s:]+)")
_LONGEST_FOLDER = 76  # bytes: a socket's path in a private folder there may have 107


class NotebookError(RuntimeError):
    """A notebook or parameter doesn't exist, a value is invalid, or nothing was recorded."""


def find_notebook(name: str) -> Path:
    """Return the path of a notebook, given as a path or by its name alone.

    Raises
    ------
    NotebookError
        If the notebook doesn't exist; the message lists the existing ones.

    Examples
    --------
    >>> find_notebook("1_walkthrough").name
    '1_walkthrough.ipynb'
    """
    for path in (Path(name), NOTEBOOKS / name, NOTEBOOKS / f"{name}.ipynb"):
        if path.suffix == ".ipynb" and path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
    raise NotebookError(f"there is no notebook {name!r}; the notebooks are: {known}.")


def parameters(path: Path) -> dict[str, Any]:
    """Return the names and values in a notebook's cell tagged `parameters`.

    Raises
    ------
    NotebookError
        If the notebook has no such cell.

    Examples
    --------
    >>> parameters(find_notebook("1_walkthrough"))["topic"]
    'Machine_Learning'
    """
    for cell in _read(path).cells:
        if "parameters" in cell.metadata.get("tags", []):
            try:
                return {
                    statement.targets[0].id: ast.literal_eval(statement.value)
                    for statement in ast.parse(cell.source).body
                    if isinstance(statement, ast.Assign)
                }
            except (ValueError, SyntaxError, AttributeError):
                raise NotebookError(
                    "the cell tagged 'parameters' must assign values, not expressions, to names."
                ) from None
    raise NotebookError("the notebook has no cell tagged 'parameters'.")


def parameter_values(path: Path, given: Mapping[str, str]) -> dict[str, Any]:
    """Return parameters that are given as text, by name and with the right types.

    Parameters
    ----------
    path : pathlib.Path
        The notebook.
    given : mapping of str to str
        Values as text, by parameter names in capitals.

    Raises
    ------
    NotebookError
        If a parameter doesn't exist, or a text is not a value of the parameter's type.

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
    """Run the cells of a notebook that have a tag, and return the names that they define.

    Parameters
    ----------
    name : str
        The notebook, as for `find_notebook`.
    tag : str
        Cells with this tag are run, one after the other, in this process.

    Returns
    -------
    dict of str to object
        The values, such as the notebook's functions, by name.

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
            # So that tracebacks and inspect.getsource can show the lines.
            lines = cell.source.splitlines(keepends=True)
            linecache.cache[file] = len(cell.source), None, lines, file
            exec(compile(cell.source, file, "exec"), namespace)
    return namespace


def recorded(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """Return the results that a notebook records: the dictionary that is its last cell's value.

    Raises
    ------
    NotebookError
        If the last cell's value is not a dictionary.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return record_in(cells[-1].outputs if cells else [])


def record_in(outputs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the dictionary that is the value of a cell with these outputs.

    Raises
    ------
    NotebookError
        If the cell's value is not a dictionary.

    Examples
    --------
    >>> record_in([{"output_type": "execute_result", "data": {"text/plain": "{'events': 5}"}}])
    {'events': 5}
    """
    for output in outputs:
        if output["output_type"] == "execute_result":
            with contextlib.suppress(ValueError, SyntaxError):  # not of such values
                value = ast.literal_eval(output["data"]["text/plain"])
                if isinstance(value, dict):
                    return value
    raise NotebookError(
        "the notebook's last cell records nothing: its value must be a dictionary of numbers and "
        "texts."
    )


def run(path: Path, given: Mapping[str, str]) -> tuple[nbformat.NotebookNode, str | None]:
    """Execute a notebook in a new kernel, in the notebook's folder, and report progress on stderr.

    Parameters
    ----------
    path : pathlib.Path
        The notebook; the file stays unchanged.
    given : mapping of str to str
        Parameters, as for `parameter_values`.

    Returns
    -------
    nbformat.NotebookNode
        The executed notebook. If a cell fails, the cells after it aren't executed.
    str or None
        The section, source and error of the failed cell; None if all cells succeeded.

    Raises
    ------
    NotebookError
        If a parameter is invalid.
    """
    values = parameter_values(path, given)
    cells = _read(path).cells
    # Papermill adds a cell with the values after the parameters.
    progress = _Progress(sum(cell.cell_type == "code" for cell in cells) + bool(values))
    failure = None
    with (
        _Signals() as signals,
        tempfile.TemporaryDirectory(prefix="kernel-", dir=folder_for_sockets()) as folder,
    ):
        executed = Path(folder) / path.name
        # Sockets in this private folder, because ports are open to all users.
        kernel = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
        try:
            execute_notebook(
                path, executed, values, cwd=path.parent, kernel_name="python3", language="python",
                progress_bar=False, execution_timeout=CELL_SECONDS,
                config=Config({"KernelManager": kernel}), on_cell_start=progress.cell_starts,
                on_cell_execute=signals.end_now, on_cell_executed=signals.end_later,
            )  # fmt: skip
        except PapermillExecutionError as error:
            failure = progress.place(f"{error.ename}: {error.evalue}")
        except (RuntimeError, TimeoutError) as error:  # the kernel died, or a cell took too long
            failure = progress.place(f"{type(error).__name__}: {error}")
        return nbformat.read(executed, as_version=4), failure


def main(arguments: list[str] | None = None) -> int:
    """Run a notebook according to the command line, and return the exit code."""
    options = _options(arguments)
    try:
        path = find_notebook(options.notebook)
        given = dict(_split(setting) for setting in options.settings)
        _make_folder(options.html)
        notebook, failure = run(path, given)
        if failure:
            print(f"{path.name} failed {failure}\n", file=sys.stderr)
        # A failed run keeps the page of the last successful one.
        name = f"{path.stem}.failed" if failure else path.stem
        page = _write_html(notebook, path.parent, Path(options.html), name)
        if failure:
            print(f"The whole notebook: {page}", file=sys.stderr)
            return 1
        values = recorded(notebook)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{options.notebook} can't be run: {error}. Check the file that this names, the kernel "
            f"python3 (jupyter kernelspec list), and the free space in {tempfile.gettempdir()}.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    if options.store:
        _store_outputs(notebook, path)
    seconds = notebook.metadata.papermill.duration
    print(f"done after {seconds:.0f} s; the executed notebook: {page}", file=sys.stderr)
    name = re.sub(r"^\d+_", "", path.stem)
    print(f"{name}: {' '.join(f'{key}={value}' for key, value in values.items())}")
    return 0


class _Signals:
    """Ends the program on SIGINT, SIGTERM or SIGHUP, with its kernel and folder.

    While a cell runs, it is interrupted. While the kernel starts or ends, the end comes after that:
    an interrupted start would leave the kernel behind.
    """

    def __init__(self) -> None:
        self._running = False
        self._received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            # One that is ignored stays so: nohup asks for that.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None:
            self._end_if_received()

    def end_now(self, **_: object) -> None:
        """Interrupt what runs from here on; nbclient calls this when a cell begins."""
        self._running = True
        self._end_if_received()

    def end_later(self, **_: object) -> None:
        """Interrupt nothing from here on; nbclient calls this when a cell is done."""
        self._running = False

    def _receive(self, number: int, _: object) -> None:
        if self._received is None:  # a second signal doesn't interrupt the end
            self._received = number
            if self._running:
                self._end_if_received()

    def _end_if_received(self) -> None:
        if self._received is not None:
            sys.exit(128 + self._received)


class _Progress:
    """Reports which cell of which section is running."""

    def __init__(self, code_cells: int) -> None:
        self._code_cells = code_cells
        self._number = 0
        self._section = "the beginning"
        self._source = ""
        self._started = time.monotonic()

    def cell_starts(self, cell: nbformat.NotebookNode, cell_index: int) -> None:
        """Report that a cell begins; nbclient calls this for cells with text as well."""
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
        """Return an error with the section and source of the current cell."""
        return f"in {self._section!r}, the cell\n\n{self._source}\n\n{error}"


def folder_for_sockets() -> str:
    """Return the folder for temporary files, or /tmp if its path is too long for a socket's.

    Examples
    --------
    >>> Path(folder_for_sockets()).is_dir()
    True
    """
    folder = tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) < _LONGEST_FOLDER else "/tmp"


def _store_outputs(executed: nbformat.NotebookNode, path: Path) -> None:
    """Store the outputs of a run in the notebook, and change nothing else in it."""
    notebook = nbformat.read(path, as_version=4)
    # Cells of older formats have no ids, but a position; papermill adds a cell with parameters.
    cells = executed.cells
    results = [c for c in cells if "injected-parameters" not in c.metadata.get("tags", [])]
    by_id = {cell.id: cell for cell in results}
    for cell, result in zip(notebook.cells, results, strict=False):
        if cell.cell_type == "code":
            result = by_id.get(cell.get("id"), result)
            cell.outputs, cell.execution_count = result.outputs, result.execution_count
    nbformat.write(notebook, path)


def _convert(name: str, text: str, default: Any) -> Any:
    """Return a parameter's value, given as text, with the type of the parameter's default."""
    kinds = {bool: "True or False", int: "a whole number", float: "a number"}
    kind = type(default)
    if default is None or kind is str:
        return text
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return _like(kind(text) if kind in kinds else ast.literal_eval(text), default)
    except (ValueError, KeyError, TypeError, SyntaxError, OverflowError, RecursionError):
        expected = kinds.get(kind, f"a {kind.__name__} such as {default}")
        raise NotebookError(f"{name} must be {expected}, not {text!r}.") from None


def _like(value: Any, default: Any) -> Any:
    """Return a value with the type of a default; raise `ValueError` if its own doesn't fit.

    The elements of a list must fit the first element of the default.
    """
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{value!r} is not like {default!r}")
    if isinstance(default, list | tuple) and default:
        return type(default)(_like(element, default[0]) for element in value)
    return value


def _split(setting: str) -> tuple[str, str]:
    name, equals, text = setting.partition("=")
    if not equals:
        raise NotebookError(f"{setting!r} is not a setting: write NAME=value.")
    return name, text


def _write_html(notebook: nbformat.NotebookNode, home: Path, folder: Path, name: str) -> Path:
    """Write a notebook as an HTML page, and return the page's path.

    Links in the notebook are relative to its folder, `home`; those of the page are relative to the
    page's.
    """
    _embed_images(notebook, home)
    resources = {"metadata": {"path": str(home), "name": name}}
    page, _ = HTMLExporter().from_notebook_node(notebook, resources)
    to_home = quote(os.path.relpath(home.resolve(), folder.resolve()))
    page = re.sub(r'(<a\s[^>]*?href=")(?![a-z]+:|[#/])', rf"\g<1>{to_home}/", page)
    target = folder / f"{name}.html"
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise NotebookError(
            f"the page {target} can't be written ({error.strerror}): choose another --html."
        ) from None
    return target


def _embed_images(notebook: nbformat.NotebookNode, home: Path) -> None:
    """Put the images of a notebook's text into it, if their files exist in `home`.

    nbconvert can embed images as well, but then closes each `<details>` before its content.
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for name in set(_IMAGE.findall(cell.source)):
                if (file := home / unquote(name)).is_file():
                    content = base64.b64encode(file.read_bytes()).decode()
                    kind, _ = mimetypes.guess_type(file)
                    cell.setdefault("attachments", {})[name] = {kind or "image/png": content}
                    cell.source = cell.source.replace(f"]({name}", f"](attachment:{name}")


def _make_folder(folder: str) -> None:
    """Create the folder for the page, and try to write there, before a run takes minutes."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise NotebookError(
            f"the folder {folder} can't be used ({error.strerror}): choose another --html."
        ) from None


def _read(path: Path) -> nbformat.NotebookNode:
    """Return a notebook; raise `NotebookError` if the file is none."""
    try:
        return nbformat.read(path, as_version=4)
    except (ValueError, RecursionError, nbformat.ValidationError):
        raise NotebookError(f"{path} is not a notebook.") from None


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m helpers.notebook",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("notebook", help="a path, or a name such as 1_walkthrough")
    parser.add_argument("settings", nargs="*", metavar="NAME=value")
    parser.add_argument("--html", default="build", help="folder for the page; default: %(default)s")
    parser.add_argument("--store", action="store_true", help="store the outputs in the notebook")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
