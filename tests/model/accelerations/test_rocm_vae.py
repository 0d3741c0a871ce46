"""AITer needs an AMD GPU: a stand-in class with the same constructor computes torch's own group norm."""

import sys
import types

import pytest
import torch
from diffusers import AutoencoderKL

from deployments.accelerations.rocm_vae import ROCM_VAE
from deployments.devices import Device
from deployments.modules import AccelerationError
from tests.support.aiter_stand_in import StandInGroupNorm
from tests.support.stage_modules import KernelWatcher, denoiser_stage, env, vae_stage
from tests.support.tiny_models.random_weights import diffusers_model

ROCM = Device("rocm", torch.device("cpu"))
ON = env(USE_ROCM_VAE="true")


@pytest.fixture
def stand_in_aiter(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("aiter.ops.groupnorm")
    module.GroupNorm = StandInGroupNorm  # type: ignore[attr-defined]
    for name in ("aiter", "aiter.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "aiter.ops.groupnorm", module)


def tiny_vae() -> AutoencoderKL:
    vae = diffusers_model(
        AutoencoderKL,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, torch.nn.GroupNorm):
                torch.nn.init.normal_(module.weight)
                torch.nn.init.normal_(module.bias)
    return vae


def count(vae: torch.nn.Module, kind: type[torch.nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in vae.modules())


@pytest.mark.usefixtures("stand_in_aiter")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_use_rocm_vae_replaces_every_affine_group_norm_and_shares_its_parameters(
    memory_format: torch.memory_format,
) -> None:
    vae, latents = tiny_vae(), torch.randn(1, 4, 8, 8).to(memory_format=memory_format)
    num_norms = count(vae, torch.nn.GroupNorm)
    parameters = dict(vae.named_parameters())
    with torch.no_grad():
        expected = vae.decode(latents).sample
        watcher = KernelWatcher()
        line = ROCM_VAE.install(vae_stage(vae, ROCM, watcher), ON)
        torch.testing.assert_close(vae.decode(latents).sample, expected)
    assert line == f"rocm_vae: AITer GroupNorm in {num_norms} modules of vae"
    assert count(vae, torch.nn.GroupNorm) == 0
    assert count(vae, StandInGroupNorm) == num_norms > 10
    assert {name: id(p) for name, p in vae.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert watcher.calls["group_norm.vae.aiter"] == count(vae.decoder, StandInGroupNorm)


@pytest.mark.usefixtures("stand_in_aiter")
def test_use_rocm_vae_leaves_a_group_norm_without_parameters() -> None:
    vae = torch.nn.Sequential(torch.nn.GroupNorm(2, 4, affine=False), torch.nn.GroupNorm(2, 4))
    ROCM_VAE.install(vae_stage(vae, ROCM), ON)
    assert [type(module) for module in vae] == [torch.nn.GroupNorm, StandInGroupNorm]


def test_use_rocm_vae_is_inert_off_rocm_with_one_line() -> None:
    vae = tiny_vae()
    before = count(vae, torch.nn.GroupNorm)
    line = ROCM_VAE.install(vae_stage(vae), ON)
    assert line == "rocm_vae: inert, SGLANG_USE_ROCM_VAE is for rocm and this replica runs on cpu"
    assert count(vae, torch.nn.GroupNorm) == before


def test_use_rocm_vae_is_inert_in_a_stage_without_vae() -> None:
    line = ROCM_VAE.install(denoiser_stage(device=ROCM, transformer=torch.nn.Identity()), ON)
    assert line == "rocm_vae: inert, this stage holds no autoencoder"


def test_use_rocm_vae_without_aiter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter", None)
    with pytest.raises(AccelerationError, match="SGLANG_USE_ROCM_VAE=true needs AITer"):
        ROCM_VAE.install(vae_stage(tiny_vae(), ROCM), ON)


def test_use_rocm_vae_is_off_by_default() -> None:
    assert ROCM_VAE.is_on(ON)
    assert not ROCM_VAE.is_on(env())
