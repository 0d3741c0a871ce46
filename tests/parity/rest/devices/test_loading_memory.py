"""How much of the host's memory a load takes: little beyond what stays there."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

ROOT = Path(__file__).parents[4]
MIB = 2**20
HOST_BYTES = 128 * MIB


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 MiB in weights of 16 MiB."""
    folder = tmp_path_factory.mktemp("denoiser")
    weights = {f"blocks.{number}": torch.zeros(8 * MIB, dtype=torch.bfloat16) for number in range(50)}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of 830 MB in bfloat16."""
    folder = tmp_path_factory.mktemp("encoder")
    config = T5Config(
        d_model=1024, d_ff=4096, d_kv=64, num_layers=24, num_heads=16, feed_forward_proj="gated-gelu", vocab_size=32128
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        T5EncoderModel(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return folder


def loaded(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.support.loading_memory", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(arguments, report)
    return report


def test_what_goes_to_another_device_takes_what_is_read_ahead(denoiser: Path) -> None:
    streamed = loaded("denoiser", str(denoiser), "streamed", str(HOST_BYTES))
    assert streamed["file"] > 6 * HOST_BYTES
    assert streamed["peak"] < 1.5 * HOST_BYTES
    assert loaded("denoiser", str(denoiser), "mapped")["peak"] < 64 * MIB


def test_an_encoder_that_stays_on_the_host_is_there_once(encoder: Path) -> None:
    streamed = loaded("encoder", str(encoder), "streamed")
    assert streamed["peak"] < 1.15 * streamed["file"]
    mapped = loaded("encoder", str(encoder), "mapped")
    assert mapped["peak"] < 0.15 * mapped["file"]
