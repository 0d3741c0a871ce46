"""Denoisers of other kinds in few bits: a U-Net, two experts, lists of latents, rewired layers, audio beside video."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.precision_parity import check_precision
from tests.support.tiny_models import checkpoint

TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
SCHEMES = ["layerwise", pytest.param("int8", marks=TORCHAO), pytest.param("fp8", marks=TORCHAO)]
MODELS = ["sd15", "sdxl_controlnet", "wan22", "zimage", "qwenimage", "ltx2"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_it_merges_and_resumes_with_its_own_bits(name: str, scheme: str, checkpoints_root: Path) -> None:
    check_precision(checkpoint(name, checkpoints_root), scheme)
