"""Previews: they decode to pictures like the last one, and change no bit of it."""

from pathlib import Path

import pytest

from deployments.denoising.preview import Previews
from deployments.messages import STAGES, DecodeInputs, Envelope, GenerationRequest, OutputFormat
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoisingFollower
from deployments.stages.encode import encode
from tests.support.further import all_but
from tests.support.parity_models import PREVIEWED
from tests.support.preview_parity import check_previews

pytestmark = pytest.mark.filterwarnings("default")

EMOJI = Path(__file__).resolve().parents[3] / "checkpoints" / "emoji-flux"


@pytest.mark.parametrize("name", all_but(["flux"], PREVIEWED))
def test_previews_decode_and_change_nothing(name: str, checkpoints_root: Path) -> None:
    check_previews(name, checkpoints_root)


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
