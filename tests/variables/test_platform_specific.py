"""The variables of platforms that this machine need not have: the replica is told that it runs there.

Its tensors stay on the CPU. MLX is the real library on its CPU backend; AITer and FlashInfer are stand-ins
that compute the same numbers; torch's own flag stands for MIOpen's search.
"""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deployments.weights.quantization.convert_to_nvfp4 import convert_checkpoint
from deployments.weights.quantization.nvfp4 import NVFP4Linear
from tests.support.aiter_stand_in import StandInGroupNorm
from tests.support.flashinfer_stand_in import StandInFlashInfer
from tests.support.further import further
from tests.support.proofs import proof
from tests.support.whole_replica import MakeReplica, WholeReplica, pretend

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def pixels(whole: WholeReplica) -> np.ndarray:
    with Image.open(io.BytesIO(whole.generate().files[0].data)) as picture:
        return np.asarray(picture).astype(int)


def largest_difference(picture: np.ndarray, other: np.ndarray) -> int:
    return int(abs(picture - other).max())


@proof("real library on CPU (mlx's CPU backend)")
def test_sglang_use_mlx_computes_the_norms_in_mlx(
    make_replica: MakeReplica, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mx = pytest.importorskip("mlx.core", reason="pip install 'triptych[mlx]'")
    calls: list[str] = []
    for name in ("rms_norm", "layer_norm"):
        monkeypatch.setattr(mx.fast, name, counted(calls, name, getattr(mx.fast, name)))
    pretend(monkeypatch, "mps")
    without = pixels(make_replica(flux_checkpoint))
    assert calls == []
    with_mlx = pixels(make_replica(flux_checkpoint, SGLANG_USE_MLX="1"))
    assert set(calls) == {"rms_norm", "layer_norm"}
    assert largest_difference(with_mlx, without) <= 1
    calls.clear()
    pretend(monkeypatch, "cpu")
    pixels(make_replica(flux_checkpoint, SGLANG_USE_MLX="1"))
    assert calls == [], "inert on any other platform"


@proof("stand-in kernel")
def test_sglang_use_rocm_vae_computes_the_vaes_group_norms_in_aiter(
    make_replica: MakeReplica, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    forward = counted(calls, "aiter", StandInGroupNorm.forward)
    stand_in = type("StandInGroupNorm", (StandInGroupNorm,), {"forward": forward})
    for name in ("aiter", "aiter.ops", "aiter.ops.groupnorm"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["aiter.ops.groupnorm"], "GroupNorm", stand_in, raising=False)
    pretend(monkeypatch, "rocm")
    without = pixels(make_replica(flux_checkpoint))
    assert calls == []
    with_aiter = pixels(make_replica(flux_checkpoint, SGLANG_USE_ROCM_VAE="true"))
    assert len(calls) > 5
    assert largest_difference(with_aiter, without) <= 1


@proof("torch's flag on CPU")
def test_sglang_use_rocm_cudnn_benchmark_searches_in_the_vaes_convolutions_only(
    make_replica: MakeReplica, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[bool] = []
    compute = torch.nn.Conv2d._conv_forward

    def recording(self: torch.nn.Conv2d, *args: Any) -> torch.Tensor:
        flags.append(torch.backends.cudnn.benchmark)
        return compute(self, *args)

    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", recording)
    pretend(monkeypatch, "rocm")
    seen = {}
    for value in ("false", "true"):
        whole = make_replica(flux_checkpoint, SGLANG_USE_ROCM_CUDNN_BENCHMARK=value)
        flags.clear()
        whole.generate()
        assert torch.backends.cudnn.benchmark is False
        seen[value] = set(flags)
    assert seen == {"false": {False}, "true": {True}}


@pytest.fixture
def nvfp4_checkpoint(flux_checkpoint: Path, tmp_path: Path) -> Iterator[Path]:
    convert_checkpoint(flux_checkpoint, tmp_path / "flux")
    yield tmp_path / "flux"
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backend", [further("cutlass"), further("cudnn"), "trtllm", further("auto")])
@proof("stand-in kernel")
def test_sglang_diffusion_flashinfer_fp4_gemm_backend_multiplies_in_the_nvfp4_layers(
    backend: str, make_replica: MakeReplica, nvfp4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashinfer = StandInFlashInfer()
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    pretend(monkeypatch, "cuda")
    whole = make_replica(nvfp4_checkpoint, "bfloat16", SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND=backend)
    layers = [m for m in whole.replica.stage.components["transformer"].modules() if isinstance(m, NVFP4Linear)]
    flashinfer.calls.clear()
    whole.generate(2)
    assert set(flashinfer.calls) == {backend}
    assert len(flashinfer.calls) >= 2 * len(layers) > 40


def test_sglang_diffusion_flashinfer_fp4_gemm_backend_is_inert_on_the_cpu(
    make_replica: MakeReplica, nvfp4_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flashinfer = StandInFlashInfer()
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    whole = make_replica(nvfp4_checkpoint, "bfloat16", SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND="cutlass")
    assert pixels(whole).std() > 1
    assert flashinfer.calls == []


def counted(calls: list[str], name: str, function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return call
