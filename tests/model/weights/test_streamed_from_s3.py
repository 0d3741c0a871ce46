"""Components whose weights stay in S3, on a real server: loaded like local ones, or refused with the cause."""

import os

os.environ["MKL_CBWR"] = "AUTO,STRICT"  # bits do not depend on where a tensor lies in memory
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from deployments.errors import CheckpointError
from deployments.weights.files import S3_WEIGHTS
from deployments.weights.load import load_component, read_tensors
from deployments.weights.locate import resolve_checkpoint
from tests.support.s3_server import S3Server, s3_server
from tests.support.tiny_models.flux import flux

FLUX_MODELS = {
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "flux"
    flux()[0].save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def bucket(server: S3Server) -> Iterator[Any]:
    """A client of the bucket `models`."""
    server.create_bucket("models")
    with closing(server.client()) as client:
        yield client


@pytest.fixture(scope="module")
def uploaded(bucket: Any, checkpoint: Path) -> str:
    """The checkpoint's address."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), "models", f"tiny/flux/{file.relative_to(checkpoint)}")
    return "s3://models/tiny/flux"


@pytest.fixture
def aws(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "downloaded"])
def test_a_checkpoint_in_s3_loads_like_the_local_one(uploaded, aws, checkpoint, tmp_path, use_streamer):
    folder = resolve_checkpoint(uploaded, tmp_path, use_streamer=use_streamer)
    weights_here = {path.relative_to(folder) for path in folder.rglob("*.safetensors")}
    assert weights_here == (
        set() if use_streamer else {p.relative_to(checkpoint) for p in checkpoint.rglob("*.safetensors")}
    )
    pipeline = FluxPipeline.from_pretrained(
        folder,
        **{n: load_component(c, folder / n, torch.float32, "cpu", use_streamer) for n, c in FLUX_MODELS.items()},
    )
    local = FluxPipeline.from_pretrained(checkpoint)
    request = {**flux()[1], "output_type": "pt"}
    pictures = [p(**request, generator=torch.Generator().manual_seed(0)).images for p in (pipeline, local)]
    assert torch.equal(*pictures)


def test_single_tensors_are_read_from_s3(uploaded, aws, checkpoint, tmp_path):
    folder = resolve_checkpoint(uploaded, tmp_path)
    name = "x_embedder.weight"
    tensors = read_tensors(FluxTransformer2DModel, folder / "transformer", [name])
    assert torch.equal(
        tensors[name], FluxTransformer2DModel.from_pretrained(checkpoint / "transformer").x_embedder.weight
    )


def test_two_components_loaded_at_once_from_s3_are_both_whole(uploaded, aws, checkpoint, tmp_path):
    folder = resolve_checkpoint(uploaded, tmp_path)

    def load(name: str) -> Any:
        return load_component(FLUX_MODELS[name], folder / name, torch.float32, "cpu", use_streamer=True)

    with ThreadPoolExecutor(4) as threads:
        loaded = dict(zip(FLUX_MODELS, threads.map(load, FLUX_MODELS), strict=True))
    for name, cls in FLUX_MODELS.items():
        expected = cls.from_pretrained(checkpoint / name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded[name].state_dict().items())


def test_a_truncated_object_is_refused_before_it_is_streamed(bucket, uploaded, aws, checkpoint, tmp_path):
    whole = (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    folder = resolve_checkpoint(uploaded, tmp_path)
    key = "tiny/flux/vae/diffusion_pytorch_model.safetensors"
    bucket.put_object(Bucket="models", Key=key, Body=whole[:-50])
    try:
        with pytest.raises(CheckpointError, match="its header declares"):
            load_component(AutoencoderKL, folder / "vae", torch.float32, "cpu", use_streamer=True)
    finally:
        bucket.put_object(Bucket="models", Key=key, Body=whole)


def test_weights_left_in_s3_are_refused_without_the_streamer(uploaded, aws, tmp_path):
    folder = resolve_checkpoint(uploaded, tmp_path, use_streamer=True)
    assert (folder / "vae" / S3_WEIGHTS).exists()
    with pytest.raises(CheckpointError, match="SGLANG_USE_RUNAI_MODEL_STREAMER=false downloads them"):
        load_component(AutoencoderKL, folder / "vae", torch.float32, "cpu", use_streamer=False)


def test_a_server_known_by_a_name_is_streamed_from_when_told_how_it_is_addressed(
    server, uploaded, aws, monkeypatch, tmp_path
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint.replace("127.0.0.1", "localhost"))
    folder = resolve_checkpoint(uploaded, tmp_path)
    with pytest.raises(CheckpointError, match="RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING=0"):
        load_component(AutoencoderKL, folder / "vae", torch.float32, "cpu", use_streamer=True)
    monkeypatch.setenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0")
    load_component(AutoencoderKL, folder / "vae", torch.float32, "cpu", use_streamer=True)
