"""docs/errors.md lists the codes that the server can answer with: those that its source has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from serve_app.errors import ERROR_KINDS
from serve_app.http.errors import _VALIDATION_CODES, HTTP_CODES
from tests.support.source import syntax_tree

ROOT = Path(__file__).resolve().parents[4]
SOURCES = [*(ROOT / "serve_app").rglob("*.py"), *(ROOT / "deployments").rglob("*.py")]
ROW = re.compile(r"^\| `(\w+)` \| (\d+(?:, \d+)*) \|", re.MULTILINE)


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    rows = ROW.findall((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))
    assert sorted(code for code, _ in rows) == sorted(codes_in_source())


def test_the_documented_status_is_that_of_the_tables() -> None:
    rows = ROW.findall((ROOT / "docs" / "errors.md").read_text(encoding="utf-8"))
    documented = {code: statuses.split(", ") for code, statuses in rows}
    for kind in ERROR_KINDS:
        if kind.code is not None:
            assert str(kind.status) in documented[kind.code]
    for status, code in HTTP_CODES.items():
        assert str(status) in documented[code]


def codes_in_source() -> set[str]:
    tables = {*HTTP_CODES.values(), *_VALIDATION_CODES.values(), *(kind.code for kind in ERROR_KINDS if kind.code)}
    return tables.union(*(codes_of(syntax_tree(file)) for file in SOURCES))


def codes_of(tree: ast.Module) -> Iterator[str]:
    """Constants that are given as `code`, by name or as the third argument of an error, or are its default."""
    for node in ast.walk(tree):
        values: list[ast.expr | None] = []
        if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith(("Error", "ErrorReport", "_failed")):
            values += [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            place = 3 if node.func.id == "ErrorReport" else 2  # type: ignore[attr-defined]
            values += node.args[place : place + 1]
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            defaults = node.args.defaults
            named = dict(zip([each.arg for each in node.args.args[-len(defaults) or None :]], defaults, strict=False))
            values.append(named.get("code"))
        if isinstance(node, ast.Dict):
            values += [each for key, each in zip(node.keys, node.values, strict=True) if _is_code(key)]
        for value in values:
            parts = (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)
            for constant in parts:
                if isinstance(constant, ast.Constant) and re.fullmatch(r"[a-z]+(_[a-z]+)*", str(constant.value)):
                    yield str(constant.value)


def _is_code(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and key.value == "code"
