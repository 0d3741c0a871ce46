"""MIOpen needs an AMD GPU; torch's flag, which ROCm's torch hands to it, can be seen on any machine."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from deployments.accelerations.miopen_autotune import MIOPEN_AUTOTUNE
from deployments.devices import Device
from tests.support.stage_modules import denoiser_stage, env, vae_stage
from tests.support.tiny_models.random_weights import diffusers_model

ROCM = Device("rocm", torch.device("cpu"))
ON = env(USE_ROCM_CUDNN_BENCHMARK="1")


@pytest.fixture
def flags_seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The flag at every convolution of this process."""
    seen: list[bool] = []
    compute = torch.nn.Conv2d._conv_forward

    def recording(self: torch.nn.Conv2d, *args: Any) -> torch.Tensor:
        seen.append(torch.backends.cudnn.benchmark)
        return compute(self, *args)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", recording)
    return seen


def tiny_vae() -> AutoencoderKL:
    return diffusers_model(AutoencoderKL, block_out_channels=(8,), norm_num_groups=4)


@pytest.mark.parametrize("before", [False, True])
def test_use_rocm_cudnn_benchmark_is_on_inside_the_vaes_convolutions_and_restored(
    before: bool, flags_seen: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    vae, elsewhere = tiny_vae(), torch.nn.Conv2d(4, 4, 1)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        line = MIOPEN_AUTOTUNE.install(vae_stage(vae, ROCM), ON)
        flags_seen.clear()
        assert torch.equal(vae.decode(latents).sample, expected)
    num_convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in vae.modules())
    assert line == f"miopen_autotune: MIOpen searches in {num_convolutions} convolutions of vae"
    assert flags_seen == [True] * len(flags_seen)
    assert len(flags_seen) > 5
    assert torch.backends.cudnn.benchmark is before
    elsewhere(latents)
    assert flags_seen[-1] is before


def test_use_rocm_cudnn_benchmark_is_restored_after_an_error() -> None:
    vae = tiny_vae()
    MIOPEN_AUTOTUNE.install(vae_stage(vae, ROCM), ON)
    before = torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError):
        vae.decode(torch.zeros(1, 3, 8, 8))
    assert torch.backends.cudnn.benchmark is before


def test_use_rocm_cudnn_benchmark_is_inert_off_rocm_and_without_a_vae(flags_seen: list[bool]) -> None:
    vae = tiny_vae()
    line = MIOPEN_AUTOTUNE.install(vae_stage(vae), ON)
    assert line == ("miopen_autotune: inert, SGLANG_USE_ROCM_CUDNN_BENCHMARK is for rocm and this replica runs on cpu")
    vae.decode(torch.zeros(1, 4, 8, 8))
    assert not any(flags_seen)
    line = MIOPEN_AUTOTUNE.install(denoiser_stage(device=ROCM, transformer=torch.nn.Identity()), ON)
    assert line == "miopen_autotune: inert, this stage holds no autoencoder"


def test_use_rocm_cudnn_benchmark_is_off_by_default() -> None:
    assert MIOPEN_AUTOTUNE.is_on(ON)
    assert not MIOPEN_AUTOTUNE.is_on(env())
