"""The Python files of the project as syntax trees, each parsed once however many tests read it."""

import ast
from functools import cache
from pathlib import Path


def syntax_tree(file: Path) -> ast.Module:
    return parsed(file.read_text(encoding="utf-8"))


@cache
def parsed(code: str) -> ast.Module:
    return ast.parse(code)
