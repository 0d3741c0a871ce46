"""Requests that come at once to a denoiser that knows nothing yet: what they share is right, in half precision too."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from deployments.engine.batching.closeness import deviation
from deployments.messages import GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.hand_off import unpack_outcome
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from deployments.tensors.values import tensors
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches

pytestmark = pytest.mark.filterwarnings("default")

PROMPTS = ("a small cat", "a red sun bright", "dance monkey dance")
STEPS = 4
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-3}  # relative L2 of latents; a wrong axis made 8e-3 in bfloat16


@pytest.mark.parametrize("learns", [True, False], ids=["learned axes", "guessed axes"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", ["hidream", "zimage", "flux"])
def test_the_first_requests_of_a_fresh_denoiser_get_their_own_pictures(
    name: str, dtype: torch.dtype, learns: bool, checkpoints_root: Path
) -> None:
    tiny_patches()
    folder = checkpoint(name, checkpoints_root)
    encoder, denoiser = (load_stage(folder, (stage,), dtype=dtype) for stage in ("encoder", "denoiser"))
    stage = DenoiserStage(
        denoiser,
        DenoisingArgs(max_wait_s=1.0, merging="always"),
        encode=(lambda request: encode(encoder, request)) if learns else None,
    )

    def latents(number: int, deterministic: bool) -> torch.Tensor:
        arguments = {**request_arguments(name), "prompt": PROMPTS[number], "num_inference_steps": STEPS}
        output = OutputFormat("image", "png")
        request = GenerationRequest(f"r{number}", name, arguments, number, output, deterministic=deterministic)
        inputs, _ = stage.denoise(request, encode(encoder, request))
        outcome = unpack_outcome(inputs, denoiser)
        return tensors([[call.args, call.kwargs] for call in outcome.decoder_calls])[0]

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        together = list(threads.map(lambda number: latents(number, False), range(len(PROMPTS))))
    alone = [latents(number, True) for number in range(len(PROMPTS))]
    stage.engine.close()
    assert max(map(deviation, together, alone)) <= ROUNDING[dtype]
