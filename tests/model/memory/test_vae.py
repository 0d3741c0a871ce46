"""Tiles give the same pictures within a stated deviation; lack of memory in a stage is answered by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from deployments.devices import select_device
from deployments.errors import CheckpointError, DeviceFullError
from deployments.memory.args import VAEArgs
from deployments.memory.autoencoder import prepare
from deployments.memory.stage_memory import StageMemory
from deployments.messages import STAGES, GenerationRequest, OutputFormat, StageName
from deployments.model import ModelArgs
from deployments.modules import AccelerationError
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stages.build import build_stage
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode, unpack_conditioning
from deployments.tensors.values import tensors
from env_config.variables import EnvConfig
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches

ROOT = Path(__file__).parents[3]
CPU = select_device("cpu")
FULL = RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")  # as a library says it


def emojis() -> torch.Tensor:
    """A picture of 256 by 256 that the embedded autoencoder was made for: [1, 3, H, W] from -1 to 1."""
    files = sorted((ROOT / "checkpoints/train/emoji").glob("*.png"))[:4]
    pictures = [Image.open(file).convert("RGBA").resize((128, 128)) for file in files]
    white = Image.new("RGBA", (256, 256), "white")
    for index, picture in enumerate(pictures):
        white.alpha_composite(picture, (128 * (index % 2), 128 * (index // 2)))
    pixels = torch.from_numpy(np.asarray(white.convert("RGB")).copy())
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def prepared(vae: Any, **settings: Any) -> Any:
    prepare("vae", vae, lambda: None, VAEArgs.model_validate(settings), StageMemory())
    return vae.eval()


@torch.no_grad()
def differences(whole: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """The mean and the largest, in steps of the 255 of a pixel."""
    assert whole.shape == other.shape
    difference = (whole.clamp(-1, 1) - other.clamp(-1, 1)).abs() * 127.5
    return difference.mean().item(), difference.max().item()


@torch.no_grad()
def test_a_picture_in_tiles_is_the_same_within_the_stated_deviation() -> None:
    folder = ROOT / "checkpoints/emoji-flux/vae"
    whole, tiled = (prepared(AutoencoderKL.from_pretrained(folder), tiling=tiling) for tiling in ("off", "on"))
    picture = emojis()
    latents = whole.encode(picture).latent_dist.mode()
    truth = whole.decode(latents).sample
    in_tiles = (tiled.decode(latents).sample, whole.decode(tiled.encode(picture).latent_dist.mode()).sample)
    for other in in_tiles:
        mean, largest = differences(truth, other)
        assert mean <= 3
        assert largest <= 16
        assert mean > 0


@torch.no_grad()
def test_pictures_of_a_batch_one_by_one_are_the_same_but_for_rounding() -> None:
    folder = ROOT / "checkpoints/emoji-flux/vae"
    whole, sliced = (prepared(AutoencoderKL.from_pretrained(folder), slicing=slicing) for slicing in ("off", "on"))
    latents = torch.randn(2, 16, 4, 4, generator=torch.manual_seed(0))
    torch.testing.assert_close(whole.decode(latents).sample, sliced.decode(latents).sample, rtol=1e-4, atol=1e-5)


# -- in the stages -----------------------------------------------------------------------------------------------


def built(name: str, root: Path, stages: tuple[StageName, ...] = STAGES, **fields: Any) -> StagePipeline:
    tiny_patches()
    model = ModelArgs.model_validate({"path": str(checkpoint(name, root)), "name": name, **fields})
    return build_stage(model, stages, EnvConfig(), CPU)


def request(name: str, **changes: Any) -> GenerationRequest:
    arguments = request_arguments(name) | {"num_inference_steps": 2} | changes
    return GenerationRequest("r", name, arguments, 0, OutputFormat("image", "png"))


def decoded(stages: dict[str, StagePipeline], name: str, **changes: Any) -> torch.Tensor:
    asked = request(name, **changes)
    denoiser = DenoiserStage(stages["denoiser"])
    inputs, _ = denoiser.denoise(asked, encode(stages["encoder"], asked))
    denoiser.engine.close()
    output: torch.Tensor = torch.as_tensor(dict(decode_output(stages["vae"], asked, inputs))["images"])
    return output


@contextmanager
def without_memory(module: torch.nn.Module, times: int) -> Iterator[list[tuple[int, ...]]]:
    """The module finds too little memory so often; the shapes that it was given."""
    given: list[tuple[int, ...]] = []

    def refuse(_: Any, args: Any, kwargs: Any) -> None:
        given.append(tuple(tensors((args, kwargs))[0].shape))
        if len(given) <= times:
            raise FULL

    hook = module.register_forward_pre_hook(refuse, with_kwargs=True)
    yield given
    hook.remove()


@pytest.fixture(scope="module")
def flux(checkpoints_root: Path) -> dict[str, StagePipeline]:
    return {stage: built("flux", checkpoints_root, (stage,)) for stage in STAGES}


LARGE = {"height": 48, "width": 48}  # the tiles of the tiny autoencoder have 32


def test_a_decoder_without_memory_is_asked_again_in_tiles(flux: dict[str, StagePipeline]) -> None:
    whole = decoded(flux, "flux", **LARGE)
    with without_memory(flux["vae"].pipeline.vae.decoder, times=1) as given:
        picture = decoded(flux, "flux", **LARGE)
    assert max(given[1:]) < given[0]
    assert picture.shape == whole.shape
    assert not torch.equal(picture, whole)
    assert decoded(flux, "flux").shape != whole.shape  # another size is made whole


def test_one_without_memory_for_tiles_too_says_so(flux: dict[str, StagePipeline]) -> None:
    with without_memory(flux["vae"].pipeline.vae.decoder, times=100), pytest.raises(DeviceFullError, match="try again"):
        decoded(flux, "flux", **LARGE)


def test_an_encoder_without_memory_is_asked_again(flux: dict[str, StagePipeline]) -> None:
    stage, asked = flux["encoder"], request("flux")
    truth = tensors([call.output for call in unpack_conditioning(encode(stage, asked), stage)])
    with without_memory(stage.pipeline.text_encoder_2, times=1) as given:
        again = tensors([call.output for call in unpack_conditioning(encode(stage, asked), stage)])
    assert len(given) == 2
    assert all(torch.equal(a, b) for a, b in zip(again, truth, strict=True))
    with without_memory(stage.pipeline.text_encoder_2, times=2), pytest.raises(DeviceFullError):
        encode(stage, asked)


def test_a_denoiser_without_memory_for_a_lone_forward_says_so(flux: dict[str, StagePipeline]) -> None:
    with without_memory(flux["denoiser"].pipeline.transformer, times=100), pytest.raises(DeviceFullError):
        decoded(flux, "flux")


@pytest.mark.parametrize("stages", [("encoder",), ("vae",), ("denoiser",)])
def test_every_process_refuses_what_no_autoencoder_of_the_pipeline_can(
    stages: tuple[StageName, ...], checkpoints_root: Path
) -> None:
    with pytest.raises(AccelerationError, match=r"vae: tiling is on, and .*\(movq\) has no tiling: auto and off"):
        built("kandinsky22", checkpoints_root, stages, vae={"tiling": "on"})


def test_the_dtype_is_that_of_all_autoencoders_and_told_once(checkpoints_root: Path) -> None:
    stage = built("flux", checkpoints_root, dtype="bfloat16", vae={"dtype": "float32"})
    dtypes = {name: next(module.parameters()).dtype for name, module in stage.components.items()}
    assert dtypes.pop("vae") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    with pytest.raises(CheckpointError, match="vae: dtype is float32, and component_dtypes says vae: float16"):
        built("flux", checkpoints_root, component_dtypes={"vae": "float16"}, vae={"dtype": "float32"})
