"""One process with all the stages makes what three make, whatever class of output its pipeline has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.messages import GenerationRequest, OutputFormat
from deployments.stage_pipeline.loading import load_stage
from deployments.stage_pipeline.outputs import media_kind
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from tests.support.tiny_models import checkpoint, request_arguments, run_unsplit, tiny_patches

pytestmark = pytest.mark.filterwarnings("default")


# Outputs with fields that are None and asked for, with all of their fields, and of videos.
@pytest.mark.parametrize("name", ["sd15", "kandinsky22", "flux", "wan21", "ltx2"])
def test_one_process_makes_the_numbers_of_the_unsplit_pipeline(name: str, checkpoints_root: Path) -> None:
    tiny_patches()
    folder, arguments = checkpoint(name, checkpoints_root), request_arguments(name)
    stage = load_stage(folder)
    kind = media_kind(type(stage.pipeline))
    request = GenerationRequest("r", name, arguments, 0, OutputFormat(kind, "png" if kind == "image" else "mp4"), True)
    denoiser = DenoiserStage(stage)
    inputs, _ = denoiser.denoise(request, encode(stage, request))
    denoiser.engine.close()
    made = numbers(torch.utils._pytree.tree_leaves(dict(decode_output(stage, request, inputs))))
    truth = numbers(run_unsplit(folder, arguments, 0))
    assert len(made) == len(truth) > 0
    assert all(torch.equal(a, b) for a, b in zip(made, truth, strict=True))


def numbers(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
