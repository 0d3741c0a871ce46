"""`tensor` by gloo: diffusers allows it on accelerators only, torch's tensors over ranks go on CPUs too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers.hooks import tensor_parallel

from deployments.ranks import weights
from tests.support.engine_parity import Stages, assert_same_bits, deviation
from tests.support.ranks import run_denoiser_rank, stages_on_ranks
from tests.support.tiny_models import checkpoint

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600), pytest.mark.rest]

DEVICES = ("cpu", *tensor_parallel._SUPPORTED_TP_DEVICES)


def run_on_cpu(*args: Any) -> None:
    """In the process of a rank."""
    tensor_parallel._SUPPORTED_TP_DEVICES = weights._SUPPORTED_TP_DEVICES = DEVICES
    run_denoiser_rank(*args)


def test_ranks_with_parts_of_the_weights_make_what_one_process_makes(
    checkpoints_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_parallel, "_SUPPORTED_TP_DEVICES", DEVICES)
    monkeypatch.setattr(weights, "_SUPPORTED_TP_DEVICES", DEVICES)
    folder = checkpoint("flux", checkpoints_root)
    before = Stages(folder)
    request = before.request(0, deterministic=True, steps=3)
    truth = before.plain(request)
    before.close()
    with stages_on_ranks(folder, {"tensor": 2}, run=run_on_cpu) as stages:
        numbers, _ = stages.alone(request)
        assert deviation(numbers, truth) <= 2e-5
        again, _ = stages.alone(request)
        assert_same_bits(again, numbers)
