"""Sound, maps and tensors over HTTP are what the unsplit pipeline makes, in every placement of the stages."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import (
    DanceDiffusionPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    IPNDMScheduler,
    KandinskyV22PriorPipeline,
    MarigoldDepthPipeline,
    UNet1DModel,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load

from tests.support.further import all_but
from tests.support.model_in_process import PLACEMENTS, ModelServer, model_served
from tests.support.tiny_models import checkpoint, request_arguments
from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.checkpoints import load_unsplit
from tests.support.tiny_models.kandinsky import kandinsky22
from tests.support.tiny_models.pictures import noise_image
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.stable_diffusion import NOISE_SCHEDULE, SD15_UNET, UNET_DECODER
from tests.support.tiny_models.text_encoders import clip_text_encoder
from tests.support.tiny_models.tokenizers import clip_tokenizer

# What diffusers and torch say of their own ways.
pytestmark = pytest.mark.filterwarnings("default")

SEED = 5


def unsplit(pipeline: DiffusionPipeline, **arguments: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(SEED)
    with torch.no_grad():
        return pipeline(**arguments, generator=torch.Generator("cpu").manual_seed(SEED))


def made(server: ModelServer, route: str, **fields: Any) -> tuple[dict[str, Any], list[bytes]]:
    answer = server.post(route, json={"seed": SEED} | fields)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told, [base64.b64decode(item["b64_json"]) for item in told["data"]]


def heard(data: bytes) -> np.ndarray:
    """[channels, time] of a wav of 16 bits."""
    with av.open(io.BytesIO(data), "r") as container:
        channels = container.streams.audio[0].codec_context.channels
        return np.concatenate([frame.to_ndarray().reshape(-1, channels) for frame in container.decode(audio=0)]).T


def sixteen_bits(waves: Any) -> np.ndarray:
    return np.rint(np.clip(np.asarray(waves, np.float32), -1, 1) * 32767).astype(np.int16)


@pytest.mark.parametrize("placement", all_but(["three_stage"], PLACEMENTS))
def test_a_served_sound_has_the_samples_of_the_unsplit_call(
    placement: str, checkpoints_root: Path, tmp_path: Path
) -> None:
    folder = checkpoint("stable_audio", checkpoints_root)
    arguments = request_arguments("stable_audio")
    [waves] = unsplit(load_unsplit(folder), **arguments, audio_end_in_s=4.0).audios
    body = {name: arguments[name] for name in ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale")}
    with model_served(folder, tmp_path / "outputs", placement) as server:
        told, [data] = made(server, "/v1/audio/generations", **body, seconds=4)
    assert np.array_equal(heard(data), sixteen_bits(waves))
    assert (told["sample_rate"], told["channels"], told["seconds"]) == (4, 2, waves.shape[1] / 4)


@pytest.mark.rest
def test_a_sound_without_words_is_what_its_denoiser_leaves(tmp_path: Path) -> None:
    unet = diffusers_model(
        UNet1DModel,
        block_out_channels=(32, 32, 64),
        extra_in_channels=64,
        sample_size=512,
        sample_rate=16_000,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )
    pipeline = DanceDiffusionPipeline(unet=unet, scheduler=IPNDMScheduler())
    pipeline.save_pretrained(tmp_path / "dance")
    [waves] = unsplit(pipeline, num_inference_steps=4).audios
    with model_served(tmp_path / "dance", tmp_path / "outputs") as server:
        told, [data] = made(server, "/v1/audio/generations", num_inference_steps=4)
    assert np.array_equal(heard(data), sixteen_bits(waves))
    assert (told["sample_rate"], told["channels"]) == (16_000, 2)


@pytest.mark.rest
def test_a_depth_map_is_served_as_a_picture_of_16_bits(tmp_path: Path) -> None:
    pipeline = MarigoldDepthPipeline(
        unet=diffusers_model(UNet2DConditionModel, **SD15_UNET | UNET_DECODER | {"in_channels": 8}),
        vae=kl_autoencoder(4, (8, 16)),
        scheduler=DDIMScheduler(**NOISE_SCHEDULE, prediction_type="v_prediction", clip_sample=False),
        text_encoder=clip_text_encoder(),
        tokenizer=clip_tokenizer(),
        prediction_type="depth",
        scale_invariant=True,
        shift_invariant=True,
        default_denoising_steps=2,
        default_processing_resolution=32,
    )
    pipeline.save_pretrained(tmp_path / "marigold")
    picture = noise_image(32)
    [depth] = unsplit(pipeline, image=picture, num_inference_steps=2, output_type="pt").prediction
    file = io.BytesIO()
    picture.save(file, "PNG")
    sent = base64.b64encode(file.getvalue()).decode()
    with model_served(tmp_path / "marigold", tmp_path / "outputs") as server:
        _, [data] = made(server, "/v1/images/edits", image=sent, num_inference_steps=2, bit_depth=16)
    grey = Image.open(io.BytesIO(data))
    assert grey.mode == "I;16"
    assert np.array_equal(np.asarray(grey), np.rint(depth[0].numpy() * 65535).astype(np.uint16))


def test_the_embeddings_of_a_prior_are_served_as_tensors(tmp_path: Path) -> None:
    components = {
        name.removeprefix("prior_"): value
        for name, value in kandinsky22()[0].components.items()
        if name.startswith("prior_")
    }
    pipeline = KandinskyV22PriorPipeline(**components)
    pipeline.save_pretrained(tmp_path / "prior")
    output = unsplit(pipeline, prompt="a small cat", num_inference_steps=3)
    with model_served(tmp_path / "prior", tmp_path / "outputs") as server:
        _, [data] = made(server, "/v1/tensors/generations", prompt="a small cat", num_inference_steps=3)
    tensors = load(data)
    assert tensors.keys() == {"image_embeds", "negative_image_embeds"}
    assert all(torch.equal(tensors[name], output[name]) for name in tensors)
