"""Weights reach the device as they are stored: the host holds little of them, and casts none."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from deployments.errors import CheckpointError
from deployments.weights.files import DIFFUSERS_FILES, weight_files
from deployments.weights.load import load_component
from deployments.weights.stream import HOST_BYTES, stream_tensors
from env_config.streamer_memory import VARIABLE
from tests.support.forking.command import python_with_libraries
from tests.support.tiny_models.autoencoders import kl_autoencoder

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reading") / "vae"
    kl_autoencoder().save_pretrained(folder)
    return folder


def test_no_loader_casts_weights_on_the_host(tmp_path: Path) -> None:
    command = [*python_with_libraries(), "-m", "tests.support.load_on_simulated_device", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    loads = json.loads(done.stdout.splitlines()[-1])
    assert len(loads) == 4
    for load in loads.values():
        assert load["devices"] == ["npu"]
        assert load["dtypes"] == ["torch.bfloat16"]
        assert load["elements"] > 10_000
        assert load["cast_on_host"] == 0, loads


def test_the_streamer_reads_ahead_into_little_memory_unless_the_user_says_otherwise(folder, monkeypatch) -> None:
    weights, limits = weight_files(DIFFUSERS_FILES, folder), []
    for chosen in (None, "123456789"):
        if chosen is None:
            monkeypatch.delenv(VARIABLE, raising=False)
        else:
            monkeypatch.setenv(VARIABLE, chosen)
        for _ in stream_tensors(weights, keep=False):
            limits.append(os.environ[VARIABLE])
        assert os.environ.get(VARIABLE) == chosen
    assert sorted(set(limits)) == sorted({str(HOST_BYTES), "123456789"})


def test_one_weight_may_be_larger_than_what_is_read_ahead(folder, monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("deployments.weights.stream.HOST_BYTES", 1000)
    loaded = load_component(AutoencoderKL, folder, torch.float32, "cpu", use_streamer=True)
    expected = AutoencoderKL.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())


def test_a_limit_below_the_largest_weight_is_refused_by_its_variable(folder, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, "1000")
    with pytest.raises(CheckpointError, match=r"RUNAI_STREAMER_MEMORY_LIMIT=1000 is below the largest weight of \d+"):
        load_component(AutoencoderKL, folder, torch.float32, "cpu", use_streamer=True)
