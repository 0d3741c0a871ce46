"""Previews of a model decode to pictures like its last one, and change no bit of it."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from deployments.errors import HandOffIncompleteError
from deployments.messages import DecodeInputs, Envelope, OutputFormat
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.decode import decode_output
from deployments.stages.denoise_run import DenoisingFollower
from deployments.tensors.values import tensors
from tests.support.engine_parity import Stages, assert_same_bits
from tests.support.tiny_models import TINY_MODELS, checkpoint

# Models that show nothing of use on their way, and why.
NO_PREVIEWS = {
    "kandinsky22": "it has two loops",
    "pixart_alpha": "its scheduler, DEIS, knows no step to a noise level of zero",
    "stable_cascade": "it has two loops",
    "cogvideox_dpm": "its scheduler's step needs what the step before has made",
    "cosmos": "its loop sets the first frames anew at each step, in the shape of the whole video",
    "stable_audio": "sound alone cannot be seen",
    "hunyuanvideo_i2v": "the first frames are cut off when they have been decoded",
    "klein_kv": "its forwards answer with a key-value cache that belongs to one request",
}

DECODED_WHOLE = {"animatediff"}  # frame by frame
GIVEN_FRAMES = {"skyreels_df_v2v": 9}  # before those that are made
OUTPUTS = {
    "image": OutputFormat("image", "png"),
    "video": OutputFormat("video", "mp4"),
    "audio": OutputFormat("audio", "wav"),
}


def check_previews(name: str, checkpoints_root: Path) -> None:
    """Two previews of four steps have the shape of the picture, and the picture has the bits of one without them."""
    folder = checkpoint(name, checkpoints_root)
    stages = Stages(folder)
    request = stages.request(0, deterministic=True, steps=4)
    truth = stages.plain(request)
    previews: dict[int, DecodeInputs] = {}

    kind = describe_stage(stages.stage).media_kind
    request = dataclasses.replace(request, output=OUTPUTS[kind])
    envelope, follower = Envelope(previews=2), DenoisingFollower(preview=previews.__setitem__)
    inputs, _ = stages.denoiser.denoise(request, stages.encode(request), None, envelope, follower)
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
        frames = GIVEN_FRAMES.get(name, 0) + 1
        shapes = [torch.Size((s[0], frames, *s[2:])) if len(s) == 5 else s for s in shapes]
    for preview in previews.values():
        assert shapes_of(decode_output(vae, request, preview)) == shapes


def shapes_of(output: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors(dict(output))]
