"""The real MLX library, on its CPU backend: what runs on a Mac is the same call on Metal."""

import copy
import sys
import threading

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.normalization import FP32LayerNorm, RMSNorm

from deployments.accelerations.mlx_norms import MLX_NORMS
from deployments.devices import Device
from deployments.modules import AccelerationError
from tests.support.stage_modules import KernelWatcher, denoiser_stage, env
from tests.support.tiny_models.flux import TRANSFORMER
from tests.support.tiny_models.random_weights import diffusers_model

pytest.importorskip("mlx.core", reason="pip install 'triptych[mlx]'")

MPS = Device("mps", torch.device("cpu"))  # tensors stay on the CPU; the replica believes it is a Mac
ON = env(USE_MLX="1")
NORMS = {
    "layer_norm": lambda: torch.nn.LayerNorm(48),
    "layer_norm_without_parameters": lambda: torch.nn.LayerNorm(48, eps=1e-6, elementwise_affine=False),
    "layer_norm_without_bias": lambda: torch.nn.LayerNorm(48, bias=False),
    "fp32_layer_norm": lambda: FP32LayerNorm(48, eps=1e-6),
    "rms_norm": lambda: torch.nn.RMSNorm(48, eps=1e-6),
    "rms_norm_with_torchs_eps": lambda: torch.nn.RMSNorm(48),
    "rms_norm_without_weight": lambda: torch.nn.RMSNorm(48, eps=1e-6, elementwise_affine=False),
    "diffusers_rms_norm": lambda: RMSNorm(48, eps=1e-6),
    "diffusers_rms_norm_with_bias": lambda: RMSNorm(48, eps=1e-6, bias=True),
    "diffusers_rms_norm_without_weight": lambda: RMSNorm(48, eps=1e-6, elementwise_affine=False),
}
TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", NORMS)
def test_use_mlx_gives_torchs_numbers_in_torchs_dtype(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = NORMS[kind]()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, mean=1.0)
    norm = norm.to(dtype)
    inputs = (torch.randn(2, 7, 48) * 3 + 1).to(dtype)
    with torch.no_grad():
        expected = norm(inputs)
        line = MLX_NORMS.install(denoiser_stage(device=MPS, transformer=torch.nn.Sequential(norm)), ON)
        assert line == "mlx_norms: 1 of transformer norms run in MLX"
        output = norm(inputs)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_use_mlx_serves_a_whole_transformer_from_another_thread_and_is_seen_by_the_kernel_log() -> None:
    transformer = diffusers_model(FluxTransformer2DModel, **TRANSFORMER)
    plain = copy.deepcopy(transformer)
    watcher = KernelWatcher()
    line = MLX_NORMS.install(denoiser_stage(device=MPS, wrap_kernel=watcher, transformer=transformer), ON)
    norms = [m for m in transformer.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.RMSNorm | RMSNorm)]
    assert line == f"mlx_norms: {len(norms)} of transformer norms run in MLX"
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    outputs: list[torch.Tensor] = []

    def run() -> None:
        with torch.no_grad():
            outputs.append(transformer(**inputs).sample)

    thread = threading.Thread(target=run)  # as the engine does
    thread.start()
    thread.join()
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], plain(**inputs).sample, rtol=1e-4, atol=1e-5)
    assert watcher.calls.keys() == {"layer_norm.transformer.mlx", "rms_norm.transformer.mlx"}
    assert sum(watcher.calls.values()) == len(norms)


def test_use_mlx_leaves_norms_over_several_dimensions_and_unknown_subclasses() -> None:
    class OtherNorm(torch.nn.LayerNorm):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs) + 1

    modules = torch.nn.Sequential(torch.nn.LayerNorm((4, 8)), OtherNorm(8))
    line = MLX_NORMS.install(denoiser_stage(device=MPS, transformer=modules), ON)
    assert line == "mlx_norms: no norms run in MLX"


def test_use_mlx_refuses_what_mlx_cannot_compute() -> None:
    norm = torch.nn.LayerNorm(8, elementwise_affine=False)
    MLX_NORMS.install(denoiser_stage(device=MPS, transformer=torch.nn.Sequential(norm)), ON)
    with pytest.raises(TypeError, match=r"SGLANG_USE_MLX=1: MLX norms take .*float32.*got torch\.float64"):
        norm(torch.zeros(2, 8, dtype=torch.float64))


def test_use_mlx_is_inert_off_mps_with_one_line() -> None:
    norm = torch.nn.LayerNorm(8)
    line = MLX_NORMS.install(denoiser_stage(transformer=torch.nn.Sequential(norm)), ON)
    assert line == "mlx_norms: inert, SGLANG_USE_MLX is for mps and this replica runs on cpu"
    assert "forward" not in vars(norm)


def test_use_mlx_without_mlx_is_refused_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(AccelerationError, match=r"SGLANG_USE_MLX=1 needs MLX: pip install 'triptych\[mlx\]'"):
        MLX_NORMS.install(denoiser_stage(device=MPS, transformer=torch.nn.LayerNorm(8)), ON)


def test_use_mlx_is_off_unless_set_to_true() -> None:
    assert MLX_NORMS.is_on(ON)
    assert not MLX_NORMS.is_on(env())
    assert not MLX_NORMS.is_on(env(USE_MLX="0"))
