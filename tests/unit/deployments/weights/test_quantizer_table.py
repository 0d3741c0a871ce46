"""A row of QUANTIZERS costs nothing until a checkpoint names its method."""

import subprocess
import sys
from pathlib import Path

import pytest

from deployments.weights.quantization import table
from deployments.weights.quantization.table import QUANTIZERS, Quantizer, register_method

ROOT = Path(__file__).parents[4]


def test_the_table_imports_no_library() -> None:
    program = "import deployments.weights.quantization.table, sys; print({'torch', 'diffusers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_only_the_row_that_the_checkpoint_names_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[str] = []
    rows = tuple(Quantizer(name, lambda name=name: registered.append(name)) for name in ("one", "two"))
    monkeypatch.setattr(table, "QUANTIZERS", rows)
    for method in ("two", "bitsandbytes", None):
        register_method(method)
    assert registered == ["two"]


def test_no_two_rows_have_the_same_method() -> None:
    methods = [quantizer.method for quantizer in QUANTIZERS]
    assert len(methods) == len(set(methods))
