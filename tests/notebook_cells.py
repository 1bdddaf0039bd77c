"""What the tests of the notebooks share: cells by their ids, links, and solutions of exercises."""

import ast
import re

import nbformat

from helpers.notebook import NOTEBOOKS, find_notebook


def cells_of(name):
    """Return the cells of a notebook."""
    return nbformat.read(find_notebook(name), as_version=4).cells


def text_of(name):
    """Return the text of a notebook, without its code."""
    return "\n\n".join(cell.source for cell in cells_of(name) if cell.cell_type == "markdown")


def run_cells(name, ids, names):
    """Run the code cells with these ids, and return the names that exist then."""
    sources = {cell.id: cell.source for cell in cells_of(name)}
    names = dict(names)
    for cell_id in ids:
        exec(compile(sources[cell_id], f"{name}, cell {cell_id}", "exec"), names)
    return names


def solution(name, number, names):
    """Run the solution of a notebook's exercise, and return the value of its last line."""
    code = re.findall(r"<summary>Solution</summary>\n\n```python\n(.*?)```", text_of(name), re.S)
    *statements, last = ast.parse(code[number - 1]).body
    names = dict(names)
    exec(compile(ast.Module(statements, []), f"solution {number}", "exec"), names)
    return eval(compile(ast.Expression(last.value), f"solution {number}", "eval"), names)


def broken_links(name):
    """Return the links of a notebook that lead to no file, or to no section of a page."""
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text_of(name))
    return [(file, section) for file, section in links if not _leads_somewhere(name, file, section)]


def _leads_somewhere(name, file, section):
    target = NOTEBOOKS / (file or f"{name}.ipynb")
    return target.exists() and (not section or section in _sections(target))


def _sections(page):
    """Return the anchors of a page's headings: in lower case on GitHub, but not in Jupyter."""
    text = text_of(page.stem) if page.suffix == ".ipynb" else page.read_text().lower()
    return {title.replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
