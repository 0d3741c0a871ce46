"""The guidance passes of a request as one batch against the plain loop, which makes them one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deployments.messages import Checkpoint, GenerationRequest
from deployments.model import DenoisingArgs
from deployments.stages.denoise import DenoiserStage
from tests.support.engine_parity import MERGED_DEVIATION, Stages, assert_same_bits, deviation
from tests.support.tiny_models import checkpoint

TOGETHER = {"guidance_passes": "together", "merging": "auto"}


@dataclass(frozen=True)
class Counted:
    """Of one request, when the merge is known to be right or wrong."""

    forwards: int
    turns: int  # of the device
    refused: int = 0  # structures, of all requests before it too


# Tiny models whose pipelines make the passes of a step one after the other, with a request of theirs.
TWO_PASSES: dict[str, Counted] = {
    "flux_truecfg": Counted(8, 5),
    "chroma": Counted(8, 5),
    "chroma_img2img": Counted(10, 6),
    "klein": Counted(8, 5),
    "klein_edit": Counted(8, 5),
    "qwenimage": Counted(8, 5),
    "qwen_img2img": Counted(10, 6),
    "qwen_inpaint": Counted(10, 6),
    "qwen_controlnet": Counted(12, 9),
    "qwen_layered": Counted(8, 5),
    "qwen_layered_caption": Counted(8, 5),
    "hunyuan_image": Counted(12, 7),
    "cogview4": Counted(8, 5),
    "lumina2": Counted(8, 5),
    "kandinsky5_t2i": Counted(8, 5),
    "wan21": Counted(12, 7),
    "wan22": Counted(16, 10),
    "wan22_5b": Counted(12, 7),
    "wan21_i2v": Counted(12, 7),
    "wan22_i2v": Counted(12, 8),
    "wan_vace": Counted(12, 7),
    "wan_v2v": Counted(12, 7),
    "skyreels_v2": Counted(12, 7),
    "skyreels_df": Counted(28, 15),
    "helios": Counted(8, 5),
    "hunyuanvideo15": Counted(8, 5),
    "hunyuanvideo15_i2v": Counted(8, 5),
    "cosmos": Counted(8, 5),
}
CORE = ("qwenimage", "wan22")


def check_passes(name: str, checkpoints_root: Path) -> None:
    """They share batches, deviate little, give the same bytes each time, and so does a resume from any step."""
    stages = Stages(checkpoint(name, checkpoints_root), **TOGETHER)
    request = stages.request(0, deterministic=False)
    first, checkpoints = stages.alone(request)
    counted = count(stages, request, first)
    assert deviation(first, stages.plain(request)) <= MERGED_DEVIATION
    assert counted == TWO_PASSES[name]
    assert_same_bits(stages.alone(replace(request, deterministic=True))[0], stages.plain(request))
    assert_resumes(stages, request, first, checkpoints)
    stages.close()


def count(stages: Stages, request: GenerationRequest, truth: list[torch.Tensor]) -> Counted:
    """Of the same request once more."""
    statistics = stages.denoiser.engine.statistics
    forwards, turns = statistics.forwards, statistics.batches
    assert_same_bits(stages.alone(request)[0], truth)
    return Counted(statistics.forwards - forwards, statistics.batches - turns, statistics.refused_structures)


def assert_resumes(
    stages: Stages, request: GenerationRequest, truth: list[torch.Tensor], checkpoints: Sequence[Checkpoint]
) -> None:
    """In a denoiser that has made nothing before."""
    assert checkpoints
    fresh = with_other(stages)
    conditioning = stages.encode(request)
    for saved in checkpoints:
        inputs, run = fresh.denoise(request, conditioning, saved)
        assert run.session.resumed_at == saved.step
        assert_same_bits(stages.numbers(inputs), truth)
    fresh.engine.close()


def with_other(stages: Stages, **settings: Any) -> DenoiserStage:
    """A denoiser of the same modules."""
    args = DenoisingArgs(max_wait_s=1.0, checkpoint_every=1, **TOGETHER)
    return DenoiserStage(stages.stage, args, encode=stages.encode, env=stages.denoiser.env, **settings)
