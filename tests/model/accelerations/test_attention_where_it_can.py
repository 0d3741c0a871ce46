"""SGLANG_DIFFUSION_ATTENTION_BACKEND means "where the kernel can": a kernel with flash-attn's checks, real widths."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention

from deployments.accelerations.attention import ATTENTION
from deployments.accelerations.attention_kernels import NATIVE, Choice, function_for, function_where_it_can
from deployments.accelerations.attention_modules import attention_modules, floating_dtype, head_dim
from deployments.modules import AccelerationError, StageModules
from tests.support.flash_attention_stand_in import Seen, flash_attention_stand_in
from tests.support.stage_modules import CPU, KernelWatcher, denoiser_stage, env, vae_stage
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_models.checkpoints import call

FA = {"DIFFUSION_ATTENTION_BACKEND": "fa"}
BFLOAT16 = torch.bfloat16


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    with flash_attention_stand_in(monkeypatch) as seen:
        yield seen


def on_meta(cls: Any, dtype: torch.dtype = BFLOAT16, **config: Any) -> Any:
    with torch.device("meta"):
        return cls(**config).to(dtype).eval()


def kl_of_flux(dtype: torch.dtype = BFLOAT16) -> AutoencoderKL:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return on_meta(AutoencoderKL, dtype, block_out_channels=[128, 256, 512, 512], latent_channels=16, **blocks)


def test_the_kernel_is_tried_with_the_true_numbers_per_head_and_dtype_of_each_module(flash: Seen) -> None:
    widths: dict[str, tuple[Any, set[int | None]]] = {
        "FLUX, SD": (kl_of_flux(), {512}),
        "Wan": (on_meta(AutoencoderKLWan), {384}),
        "Qwen-Image": (on_meta(AutoencoderKLQwenImage), {384}),
        "FLUX's transformer": (on_meta(FluxTransformer2DModel, num_layers=1, num_single_layers=1), {128}),
        "SD 1.5": (
            on_meta(UNet2DConditionModel, attention_head_dim=8, cross_attention_dim=768),
            {40, 80, 160},
        ),
    }
    for name, (model, expected) in widths.items():
        assert {head_dim(module) for _, module in attention_modules(model)} == expected, name
        assert {floating_dtype(module) for _, module in attention_modules(model)} == {BFLOAT16}, name


@pytest.mark.parametrize("stages", [("encoder",), ("vae",), ("encoder", "vae")])
@pytest.mark.parametrize(
    ("autoencoder", "reason"),
    [
        (kl_of_flux, "512 numbers per head: FlashAttention forward only supports head dimension at most 256"),
        (lambda: kl_of_flux(torch.float32), "torch.float32, 512 numbers per head: FlashAttention only support fp16"),
        (lambda: on_meta(AutoencoderKLWan), "384 numbers per head: FlashAttention forward only supports"),
        (lambda: on_meta(AutoencoderKLWan, torch.float32), "FlashAttention only support fp16 and bf16"),
        (lambda: on_meta(AutoencoderKLQwenImage), "384 numbers per head: FlashAttention forward only supports"),
    ],
)
def test_an_autoencoder_that_the_kernel_refuses_keeps_native_and_the_line_says_which_modules_and_why(
    stages: Any, autoencoder: Callable[[], Any], reason: str, flash: Seen
) -> None:
    vae = autoencoder()
    before = {path: vars(module).copy() for path, module in vae.named_modules()}
    line = ATTENTION.install(StageModules(stages, {"vae": vae}, (), ("vae",), CPU), env(**FA))
    assert line.startswith("attention: vae: native in encoder.mid_block.attentions.0, decoder.mid_block.attentions.0, ")
    assert "since SGLANG_DIFFUSION_ATTENTION_BACKEND=fa: the attention backend flash of diffusers does not run" in line
    assert reason in line
    assert len(line.splitlines()) == 1
    assert {path: vars(module) for path, module in vae.named_modules()} == before


def test_an_autoencoder_whose_width_the_kernel_takes_is_given_it(flash: Seen) -> None:
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=4).to(BFLOAT16).eval()
    assert ATTENTION.install(vae_stage(vae), env(**FA)) == "attention: vae: flash in 2 modules"
    flash.clear()
    with torch.no_grad():
        vae.decode(torch.zeros(1, 4, 4, 4, dtype=BFLOAT16))
        assert flash == [(BFLOAT16, 32)]
        vae.to(torch.float32).decode(torch.zeros(1, 4, 4, 4))  # as a pipeline may cast it for a request
    assert len(flash) == 1


def test_a_denoiser_of_which_no_module_can_have_the_kernel_stops_the_replica(flash: Seen) -> None:
    transformer = on_meta(FluxTransformer2DModel, torch.float32, num_layers=1, num_single_layers=1)
    with pytest.raises(AccelerationError, match=r"ATTENTION_BACKEND=fa: .*with torch.float32, 128 numbers per head"):
        ATTENTION.install(denoiser_stage(transformer=transformer), env(**FA))


class TwoWidths(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.narrow = Attention(query_dim=64, heads=2, dim_head=32)
        self.wide = Attention(query_dim=64, heads=1, dim_head=320)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide: torch.Tensor = self.wide(self.narrow(x))
        return wide


def test_a_denoiser_has_the_kernel_in_the_modules_that_can_have_it(flash: Seen) -> None:
    model = TwoWidths().to(BFLOAT16)
    x = torch.randn(1, 4, 64).to(BFLOAT16)
    with torch.no_grad():
        expected = model(x)
        line = ATTENTION.install(denoiser_stage(transformer=model), env(**FA))
        flash.clear()
        torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)
    assert line.startswith("attention: transformer: flash in 1 modules, native in wide, since ")
    assert flash == [(BFLOAT16, 32)]


def test_a_rule_of_the_file_is_strict(flash: Seen, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rules: [{component: vae, backend: fa}]")
    config = env(DIFFUSION_ATTENTION_CONFIG=str(tmp_path / "a.yaml"), DIFFUSION_ATTENTION_BACKEND="fa")
    with pytest.raises(AccelerationError, match=r"rules\[0\].backend=fa: .*512 numbers per head"):
        ATTENTION.install(vae_stage(kl_of_flux()), config)


def test_a_missing_package_stops_only_the_denoiser(flash: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_FLASH_ATTN", False)
    line = ATTENTION.install(vae_stage(kl_of_flux()), env(**FA))
    assert "native in encoder.mid_block.attentions.0" in line
    assert "is not usable" in line
    with pytest.raises(AccelerationError, match="is not usable"):
        ATTENTION.install(denoiser_stage(transformer=TwoWidths().to(BFLOAT16)), env(**FA))


def test_calls_with_a_mask_are_torchs_own_where_the_kernel_takes_none(
    flash: Seen, caplog: pytest.LogCaptureFixture
) -> None:
    """PixArt's cross attention has a mask."""
    pipeline, arguments = TINY_MODELS["pixart"].build()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(BFLOAT16)
    expected = call(pipeline, arguments, seed=0)
    watcher = KernelWatcher()
    with caplog.at_level(logging.INFO):
        ATTENTION.install(denoiser_stage(transformer=pipeline.transformer, wrap_kernel=watcher), env(**FA))
        flash.clear()
        output = call(pipeline, arguments, seed=0)
    assert 0 < len(flash) < watcher.calls["attention.transformer.flash"]
    torch.testing.assert_close(output[0], expected[0], rtol=0.02, atol=0.02)
    told = [record.message for record in caplog.records if "for calls with" in record.message]
    assert len(told) == 1
    assert "attention.transformer.flash: torch's own for calls with" in told[0]
    assert "`attn_mask` is not supported for flash-attn 2" in told[0]


MASKS: dict[str, Any] = {
    "none": None,
    "of samples": torch.tensor([[True, True, True, False]] * 2),
    "of keys": torch.tensor([True, True, False, False])[None, None, None],
    "of pairs": torch.ones(4, 4, dtype=torch.bool).tril()[None, None],
    "added": torch.linspace(-3, 0, 16).reshape(1, 1, 4, 4),
}


@pytest.mark.parametrize("backend", ["flash", "_native_math"])
@pytest.mark.parametrize("mask", MASKS)
def test_every_kind_of_call_has_the_numbers_of_native(mask: str, backend: str, flash: Seen) -> None:
    kernel = function_where_it_can(Choice(backend), CPU, "test")
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 2, 8, generator=generator).to(BFLOAT16) for _ in range(3))
    given = MASKS[mask]
    given = given.to(BFLOAT16) if mask == "added" else given
    for causal in (False, True) if given is None else (False,):
        truth = function_for(NATIVE)(query, key, value, given, is_causal=causal)
        torch.testing.assert_close(kernel(query, key, value, given, is_causal=causal), truth, rtol=0.05, atol=0.05)
    truth = function_for(NATIVE)(query, key[:, :, :1], value[:, :, :1], given, enable_gqa=True)
    made = kernel(query, key[:, :, :1], value[:, :, :1], given, enable_gqa=True)
    torch.testing.assert_close(made, truth, rtol=0.05, atol=0.05)
