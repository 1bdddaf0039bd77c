"""Print what to change in code of 2016: ``python -m helpers.streaming.migrate FILE...``.

It reads scripts and notebooks, in Python 2 as well, and looks for names that Spark 4, Kafka 4,
Keras 3, Python 3 or `helpers.streaming` replace. `migrate_rules` has the rules, and
`docs/migrating.md` explains what differs in the calls of a stream and of Distributed Keras.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from helpers.streaming.migrate_rules import CHANGES, MARK, STREAM_CHANGES

_OLD_MODULE = re.compile(r"\bpyspark\.streaming(?:\.| import (?:.*\W)?)kafka\b")

_OLD_NUMBER = re.compile(r"(?<![\w.-])(?=(?:0[xX][\da-fA-F]+|\d+)[lL]\b|0[0-7])")
_MAGIC = re.compile(r"\s*(?:!|%{1,2}[a-z])")
_OTHER_CELL = re.compile(r"\s*%%(?!time|capture|prun|writefile|file|spark|pyspark|local|px)")
_STRING = re.compile(r"""(\w*)('{3}|"{3}|['"])(.*)\2""", re.DOTALL)
_F_STRING = getattr(tokenize, "FSTRING_MIDDLE", None)  # since Python 3.12
# Strings that the rules see; in others, such as messages, a name means nothing.
_SETTING = re.compile(r"[\w.,:/-]*|.*(?:spark-streaming-kafka|_2\.1[0-2]:).*")
_ONLY_STRINGS = re.compile(r'(?: ?\w{0,2}"[^"]*")*')
_LONGEST = 1_000  # letters of a string that are looked at
_NOT_PYTHON = "this is not Python"
_REMEDY = " Name its encoding in the first line, such as # -*- coding: latin-1 -*-."
_OPENING, _CLOSING = tuple("([{"), tuple(")]}")


class _Statement(NamedTuple):
    """A statement in one line: its text, the same with blanks for strings, and lines' numbers."""

    text: str
    code: str
    lines: list[int]


def changes(cells: Sequence[str]) -> list[tuple[int, int, str]]:
    r"""Return what to change in a program: the cell and the line, counted from 1, and advice.

    Parameters
    ----------
    cells : sequence of str
        The code of a notebook's cells; that of a script is the only one.

    A cell that isn't Python is reported as such, after what was found before the error.

    Examples
    --------
    >>> changes(["kafkaParams = {'metadata.broker.list': broker}", "# Python 2\nprint 'ready'"])
    [(1, 1, '"metadata.broker.list" -> "bootstrap.servers" (the old name also works)'),
     (2, 2, 'print "ready" -> print("ready")')]
    """
    statements: list[tuple[int, _Statement]] = []
    found = set()
    for number, cell in enumerate(cells, 1):
        try:
            for statement in _parse(cell):
                statements.append((number, statement))
        except tokenize.TokenError as error:
            reason, (line, _) = error.args
            found.add((number, line, f"{_NOT_PYTHON}: {reason}."))
    is_old = any(_OLD_MODULE.search(statement.code) for _, statement in statements)
    for pattern, new, why in [*CHANGES, *(STREAM_CHANGES if is_old else ())]:
        places = {
            (number, lines[match.start(_old(match))], _advice(match, text, new, why))
            for number, (text, code, lines) in statements
            for match in re.finditer(pattern, code)
        }
        found |= {min(places)} if places and new.startswith("the same") else places
    return sorted(found)


def _old(match: re.Match) -> str | int:
    """Return the group of a match that is shown."""
    return "old" if match.groupdict().get("old") else 0


def _advice(match: re.Match, text: str, new: str, why: str) -> str:
    """Return the old code, what to write instead, and why."""
    old = text[slice(*match.span(_old(match)))].strip()
    if old.count("(") > old.count(")"):
        old += " ...)" if old.endswith(",") else "...)"
    advice = f"{old} -> {new} ({why})" if why else f"{old} -> {new}"
    advice = re.sub(r"\\(\d)", lambda group: text[slice(*match.span(int(group[1])))], advice)
    return advice.replace(MARK, "")


def _parse(source: str) -> Iterator[_Statement]:
    """Yield the statements of a cell, without comments, docstrings and indentation.

    At an error, what was read of a statement is yielded first; the error's place is the line of the
    bracket that was opened last, if there is one.
    """
    lines = "\n".join(line.lstrip() for line in source.split("\n"))
    pieces, end, brackets = [], None, []
    try:
        for token in tokenize.generate_tokens(io.StringIO(_OLD_NUMBER.sub(MARK, lines)).readline):
            if token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
                statement = _joined(pieces)
                if not _ONLY_STRINGS.fullmatch(statement.code):
                    yield statement
                pieces, brackets = [], []
            elif token.type != tokenize.COMMENT and token.string.strip():
                if token.string in _OPENING:
                    brackets.append(token.start)
                elif token.string in _CLOSING and brackets:
                    brackets.pop()
                text, code = _strings(token)
                before = pieces[-1][0] if pieces else "("
                is_apart = token.start != end and not before.endswith(_OPENING)
                space = " " if is_apart and text[0] not in ")]}.,:" else ""
                pieces.append((space + text, space + code, token.start[0]))
                end = token.end
    except tokenize.TokenError as error:
        yield _joined(pieces)
        if brackets:
            raise tokenize.TokenError("a bracket is not closed", brackets[-1]) from error
        raise


def _joined(pieces: list[tuple[str, str, int]]) -> _Statement:
    """Return the statement of some tokens: text, text with blanks, and the line of each."""
    text = "".join(text for text, _, _ in pieces)
    code = "".join(code for _, code, _ in pieces)
    return _Statement(text, code, [line for text, _, line in pieces for _ in text])


def _strings(token: tokenize.TokenInfo) -> tuple[str, str]:
    """Return a token's text, and the same with blanks for a string unless it may be a setting."""
    quoted = _STRING.fullmatch(token.string)
    if token.type not in (tokenize.STRING, _F_STRING):
        return token.string, token.string
    prefix, _, inner = quoted.groups() if quoted else ("", "", token.string)
    before, after = (f'{prefix.strip("uU")}"', '"') if quoted else ("", "")
    # Embedded pictures and texts are long, and have no old names.
    text = re.sub(r"\s", " ", inner[:_LONGEST].replace(MARK, "")).replace('"', "'")
    blank = text if _SETTING.fullmatch(text) else "\0" * len(text)
    return f"{before}{text}{after}", f"{before}{blank}{after}"


def _read(file: str) -> list[str]:
    """Return the code of a notebook's cells, or that of a script as a single cell."""
    if not _is_notebook(file):
        with tokenize.open(file) as script:
            return [script.read()]
    notebook = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    try:
        sheets = notebook.get("worksheets", [notebook])  # until 2015
        cells = [cell for sheet in sheets for cell in sheet["cells"] if cell["cell_type"] == "code"]
        return [_without_magics("".join(cell.get("source", cell.get("input")))) for cell in cells]
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("not a notebook") from error


def _without_magics(source: str) -> str:
    """Return a cell with its shell commands and other magics as strings."""
    is_other = _OTHER_CELL.match(source)
    return "\n".join(
        f"_({json.dumps(line)})" if is_other or _MAGIC.match(line) else line
        for line in source.split("\n")
    )


def _place(file: str, cell: int, line: int) -> str:
    """Return where something is: a notebook's code cells are counted, as Jupyter does."""
    return f"{file}:cell {cell}, line {line}" if _is_notebook(file) else f"{file}:{line}"


def _is_notebook(file: str) -> bool:
    return file.lower().endswith(".ipynb")


def main(arguments: list[str] | None = None) -> int:
    """Print what to change; return 1 if there is something, and 2 if a file can't be read."""
    parser = argparse.ArgumentParser(
        prog="python -m helpers.streaming.migrate",
        description="Print what to change in code that uses pyspark.streaming.kafka, line by line.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a Python script or a notebook")
    return max(_report(file) for file in parser.parse_args(arguments).files)


def _report(file: str) -> int:
    """Print what to change in a file; return 0, 1 or 2, as `main` does."""
    try:
        found = changes(_read(file))
    except OSError as error:
        print(f"{file} can't be read: {error.strerror}.", file=sys.stderr)
        return 2
    except (ValueError, SyntaxError, RecursionError):
        kind = "notebook in UTF-8." if _is_notebook(file) else f"Python script in UTF-8.{_REMEDY}"
        print(f"{file} can't be read: it is not a {kind}", file=sys.stderr)
        return 2
    status = int(bool(found))
    for cell, line, advice in found:
        is_error = advice.startswith(_NOT_PYTHON)
        status = 2 if is_error else status
        print(f"{_place(file, cell, line)}: {advice}", file=sys.stderr if is_error else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
