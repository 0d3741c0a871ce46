"""The Python files of the project as syntax trees, each parsed once however many tests read it."""

import ast
from functools import cache
from pathlib import Path


def nodes_of(file: Path) -> tuple[ast.AST, ...]:
    """Every node of the file's syntax tree: to walk a tree takes longer than to parse it."""
    return _nodes(file.read_text(encoding="utf-8"))


@cache
def _nodes(code: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parsed(code)))


def syntax_tree(file: Path) -> ast.Module:
    return parsed(file.read_text(encoding="utf-8"))


@cache
def parsed(code: str) -> ast.Module:
    return ast.parse(code)
