"""A budget of tokens counts those of the noisy latents, whatever the layout and the patch of the model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.engine.batching.batches import Batches
from deployments.engine.batching.latents import shape_of_sample, tokens_per_sample
from deployments.engine.executor import LocalExecutor
from deployments.engine.fiber import Fiber
from deployments.engine.forward import Forward
from deployments.engine.statistics import EngineStatistics


def of(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


def text(samples: int, words: int, width: int) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": of(samples, words, width)}


# Samples, what the module's config says, the arguments; the tokens of one sample and its shape.
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any], int, str]] = {
    "FLUX 1024": (
        1, {"patch_size": 1, "in_channels": 64}, {"hidden_states": of(1, 4096, 64), **text(1, 512, 4096)},
        4096, "4096x64",
    ),
    "FLUX 2048": (
        1, {"patch_size": 1, "in_channels": 64}, {"hidden_states": of(1, 16384, 64), **text(1, 512, 4096)},
        16384, "16384x64",
    ),
    "SDXL 1024": (2, {"in_channels": 4}, {"sample": of(2, 4, 128, 128), **text(2, 77, 2048)}, 16384, "4x128x128"),
    "SD3 1024": (2, {"patch_size": 2, "in_channels": 16}, {"hidden_states": of(2, 16, 128, 128)}, 4096, "16x128x128"),
    "Wan 720p": (
        1, {"patch_size": (1, 2, 2), "in_channels": 16},
        {"hidden_states": of(1, 16, 21, 90, 160), **text(1, 512, 4096)}, 75600, "16x21x90x160",
    ),
    "HunyuanVideo": (
        1, {"patch_size": 2, "patch_size_t": 1, "in_channels": 16}, {"hidden_states": of(1, 16, 33, 90, 160)}, 118800,
        "16x33x90x160",
    ),
    "CogVideoX": (
        2, {"patch_size": 2, "patch_size_t": None, "in_channels": 16}, {"hidden_states": of(2, 13, 16, 60, 90)}, 17550,
        "13x16x60x90",
    ),
    "channels last": (
        1, {"patch_size": (1, 2, 2), "in_channels": 16}, {"hidden_states": of(1, 5, 64, 96, 16)}, 7680, "5x64x96x16"
    ),
    "Qwen-Image 1328": (
        1, {"patch_size": 2, "in_channels": 64}, {"hidden_states": of(1, 6889, 64), **text(1, 256, 3584)},
        6889, "6889x64",
    ),
    "Z-Image 1024": (
        1, {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16},
        {"x": [of(16, 1, 128, 128)], "cap_feats": [of(128, 2560)]}, 4096, "16x1x128x128",
    ),
    "Z-Image, guided": (
        2, {"all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16},
        {"x": [of(16, 1, 64, 64)] * 2, "cap_feats": [of(128, 2560)] * 2}, 1024, "16x1x64x64",
    ),
    "sound": (2, {"in_channels": 64}, {"hidden_states": of(2, 64, 1024), **text(2, 130, 768)}, 1024, "64x1024"),
    "of no known name": (1, {}, {"noise": of(1, 300, 8), "scale": of(1)}, 300, "300x8"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_are_those_of_the_latents(case: str) -> None:
    samples, config, arguments, tokens, shape = CASES[case]
    assert tokens_per_sample(arguments, SimpleNamespace(config=SimpleNamespace(**config)), samples) == tokens
    assert shape_of_sample(arguments) == shape


def test_a_forward_without_tensors_counts_as_one_token() -> None:
    assert tokens_per_sample({"scale": 1.0}, None, 1) == 1
    assert shape_of_sample({"scale": 1.0}) == ""


def test_a_long_text_fills_no_budget_and_a_large_picture_does() -> None:
    def num_together(side: int) -> int:
        batches = Batches(8, 4 * 64 * 64, LocalExecutor(), EngineStatistics(), merging="always")
        forwards = []
        for _ in range(8):
            arguments = {
                "hidden_states": torch.zeros(1, side**2, 4),
                "encoder_hidden_states": torch.zeros(1, 512, 4096),
            }
            forwards.append(Forward(Fiber("f"), None, "transformer", None, arguments))
            batches.classify(forwards[-1])
        return len(batches.fill(forwards, 0.0))

    assert (num_together(64), num_together(128)) == (4, 1)
