"""Every variable names a test that shows its effect, and that test exists under this folder."""

import ast
from pathlib import Path

import pytest

from env_config.section import Declaration
from env_config.variables import DECLARATIONS

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("declaration", DECLARATIONS, ids=lambda declaration: declaration.variable.lower())
def test_the_named_proof_exists_and_is_found_by_the_name_of_the_variable(declaration: Declaration) -> None:
    file, _, test = declaration.proof.partition("::")
    tree = ast.parse((FOLDER / file).read_text(encoding="utf-8"))
    tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert test in tests
    assert test.startswith(f"test_{declaration.variable.lower()}_")
    assert declaration.ran_on


def test_no_two_variables_share_a_proof() -> None:
    assert len({declaration.proof for declaration in DECLARATIONS}) == 45
