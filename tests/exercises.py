"""The exercises of the notebooks: run their hidden solutions."""

import ast
import re

import nbformat

from helpers.notebook import find_notebook


def text_of(notebook):
    """Return the text cells of a notebook."""
    cells = nbformat.read(find_notebook(notebook), as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def solution(notebook, number, names):
    """Run the solution of an exercise with these names, and return the value of its last line."""
    pattern = r"<summary>Solution</summary>\n\n```python\n(.*?)```"
    code = re.findall(pattern, text_of(notebook), re.DOTALL)
    *statements, last = ast.parse(code[number - 1]).body
    names = dict(names)
    exec(compile(ast.Module(statements, []), f"solution {number}", "exec"), names)
    return eval(compile(ast.Expression(last.value), f"solution {number}", "eval"), names)
