"""Previews of every family: they decode to pictures like the last one, and change no bit of it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.denoising.preview import Previews
from deployments.errors import HandOffIncompleteError
from deployments.messages import STAGES, DecodeInputs, Envelope, GenerationRequest, OutputFormat
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoisingFollower
from deployments.stages.encode import encode
from deployments.tensors.values import tensors
from tests.parity.test_engine_parity import Stages, assert_same_bits
from tests.support.tiny_models import TINY_MODELS, checkpoint

pytestmark = pytest.mark.filterwarnings("default")

EMOJI = Path(__file__).resolve().parents[3] / "checkpoints" / "emoji-flux"

# Models that show nothing of use on their way, and why.
NO_PREVIEWS = {
    "kandinsky22": "it has two loops",
    "pixart_alpha": "its scheduler, DEIS, knows no step to a noise level of zero",
    "stable_cascade": "it has two loops",
    "cogvideox_dpm": "its scheduler's step needs what the step before has made",
    "cosmos": "its loop sets the first frames anew at each step, in the shape of the whole video",
    "stable_audio": "sound alone is not served",
    "hunyuanvideo_i2v": "the first frames are cut off when they have been decoded",
    "klein_kv": "its forwards answer with a key-value cache that belongs to one request",
}


# Videos that are decoded frame by frame, or behind the frames of a given one, and so shown whole.
DECODED_WHOLE = {"animatediff", "skyreels_df_v2v"}
OUTPUTS = {"image": OutputFormat("image", "png"), "video": OutputFormat("video", "mp4")}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if model.quick else [pytest.mark.slow, pytest.mark.stress])
        for n, model in TINY_MODELS.items()
    ],
)
def test_previews_decode_and_change_nothing(name: str, checkpoints_root: Path) -> None:
    folder = checkpoint(name, checkpoints_root)
    stages = Stages(folder)
    request = stages.request(0, deterministic=True, steps=4)
    truth = stages.plain(request)
    previews: dict[int, DecodeInputs] = {}

    kind = "image" if name == "stable_audio" else describe_stage(stages.stage).media_kind
    request = dataclasses.replace(request, output=OUTPUTS[kind])
    follower = DenoisingFollower(preview=previews.__setitem__)
    inputs, _ = stages.denoiser.denoise(
        request, stages.encode(request), envelope=Envelope(previews=2), follower=follower
    )
    assert_same_bits(stages.numbers(inputs), truth)
    stages.close()
    if name in NO_PREVIEWS:
        return
    assert len(previews) == 2

    vae = load_stage(folder, ("vae",))
    after_load = TINY_MODELS[name].after_load
    if after_load is not None:
        after_load(vae.pipeline)
    try:
        shapes = shapes_of(decode_output(vae, request, inputs))
    except HandOffIncompleteError:  # the application then asks for the complete hand-off, and so for other previews
        return
    if kind == "video" and name not in DECODED_WHOLE:
        shapes = [torch.Size((s[0], 1, *s[2:])) if len(s) == 5 else s for s in shapes]
    for preview in previews.values():
        assert shapes_of(decode_output(vae, request, preview)) == shapes


def shapes_of(output: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors(dict(output))]


@pytest.mark.parametrize(
    ("count", "num_steps", "steps"),
    [(0, 20, set()), (1, 20, {10}), (3, 20, {5, 10, 15}), (3, 4, {1, 2, 3}), (3, 2, {1}), (2, 1, set())],
)
def test_previews_are_spread_over_the_steps_and_never_after_the_last(
    count: int, num_steps: int, steps: set[int]
) -> None:
    assert Previews(count, lambda *_: None).steps(num_steps) == steps


def test_a_preview_shows_the_picture_without_its_noise() -> None:
    """The embedded model: half way the picture is nearly there, while its latents are still half noise."""
    encoder, denoiser, vae = (load_stage(EMOJI, (stage,)) for stage in STAGES)
    arguments = {"prompt": "a big fox on an orange background", "height": 128, "width": 128, "num_inference_steps": 8}
    request = GenerationRequest("fox", "emoji", arguments, 0, OutputFormat("image", "png"))
    stage = DenoiserStage(denoiser)
    previews: list[DecodeInputs] = []
    follower = DenoisingFollower(preview=lambda _, made: previews.append(made))
    inputs, _ = stage.denoise(request, encode(encoder, request), envelope=Envelope(previews=3), follower=follower)
    stage.engine.close()
    picture, *shown = (decode_output(vae, request, each).images for each in (inputs, *previews))
    differences = [float((one - picture).abs().mean()) for one in shown]
    assert differences == sorted(differences, reverse=True)
    assert differences[1] < 0.05  # of 0..1
