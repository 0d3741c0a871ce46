from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel

from deployments.accelerations import ACCELERATIONS, install_all
from deployments.devices import Device
from deployments.features import install_features
from deployments.features.cache_dit.request import CACHE_DIT
from deployments.modules import AccelerationError, StageModules
from env_config.variables import EnvConfig
from tests.support.stage_modules import KernelWatcher, denoiser_stage, env
from tests.support.tiny_models.flux import TRANSFORMER
from tests.support.tiny_models.random_weights import diffusers_model

EVERYTHING = {
    "DIFFUSION_ATTENTION_BACKEND": "torch_sdpa",
    "USE_ROCM_VAE": "1",
    "USE_ROCM_CUDNN_BENCHMARK": "1",
    "USE_MLX": "1",
    "DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND": "cutlass",
    "CACHE_DIT_ENABLED": "1",
}


def tiny_transformer() -> FluxTransformer2DModel:
    return diffusers_model(FluxTransformer2DModel, **TRANSFORMER)


def install_everything(stage: StageModules, config: EnvConfig) -> list[str]:
    """As a replica does at its start."""
    return [*install_all(stage, config), *install_features(stage, config)]


def test_without_variables_nothing_is_installed_and_nothing_is_said() -> None:
    transformer = tiny_transformer()
    before = [dict(vars(module)) for module in transformer.modules()]
    assert install_everything(denoiser_stage(transformer=transformer), EnvConfig.from_environ({})) == []
    assert [dict(vars(module)) for module in transformer.modules()] == before


def test_every_acceleration_that_is_on_says_one_line_and_those_of_other_platforms_are_inert(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deployments.accelerations.compile.BACKEND", "eager")
    stage = replace(denoiser_stage(transformer=tiny_transformer()), compile={"transformer": "regional"})
    lines = install_everything(stage, env(**EVERYTHING))
    assert [line.partition(":")[0] for line in lines] == [each.name for each in (*ACCELERATIONS, CACHE_DIT)]
    inert = [line.partition(":")[0] for line in lines if "inert" in line]
    assert inert == ["rocm_vae", "miopen_autotune", "mlx_norms", "fp4_gemm"]
    assert not any("\n" in line for line in lines)


@pytest.mark.filterwarnings("ignore")
def test_accelerations_work_together() -> None:
    """Attention, MLX norms and Cache-DiT on one transformer, which believes it is on a Mac."""
    pytest.importorskip("mlx.core")
    plain, transformer, watcher = tiny_transformer(), tiny_transformer(), KernelWatcher()
    stage = denoiser_stage(device=Device("mps", torch.device("cpu")), wrap_kernel=watcher, transformer=transformer)
    install_everything(stage, env(**EVERYTHING))
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    with torch.no_grad():
        torch.testing.assert_close(transformer(**inputs).sample, plain(**inputs).sample, rtol=1e-4, atol=1e-5)
    kinds = {name.partition(".")[0] for name in watcher.calls}
    assert kinds == {"attention", "layer_norm", "rms_norm"}


def test_what_cannot_be_done_stops_the_installation() -> None:
    with pytest.raises(AccelerationError, match="SGLANG_DIFFUSION_ATTENTION_BACKEND"):
        install_all(denoiser_stage(transformer=tiny_transformer()), env(DIFFUSION_ATTENTION_BACKEND="nonsense"))
