"""A denoiser whose weights are held in few bits merges, checkpoints and resumes as any other."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.precision_parity import check_precision

TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
SCHEMES = ["layerwise", pytest.param("int8", marks=[TORCHAO, pytest.mark.rest])]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_merges_and_resumes_with_its_own_bits(scheme: str, flux_checkpoint: Path) -> None:
    check_precision(flux_checkpoint, scheme)
