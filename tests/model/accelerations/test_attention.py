import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxTransformer2DModel, SanaTransformer2DModel
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from deployments.accelerations.attention import ATTENTION
from deployments.accelerations.attention_kernels import refusal_of
from deployments.accelerations.attention_rules import (
    BACKENDS,
    DIFFUSERS_BACKENDS,
    block_of,
    diffusers_backend,
    read_rules,
)
from deployments.modules import AccelerationError, StageModules
from env_config.variables import EnvConfig
from tests.support.further import all_but, further
from tests.support.stage_modules import CPU, KernelWatcher, denoiser_stage, env, vae_stage
from tests.support.tiny_models import TINY_MODELS, tiny_patches
from tests.support.tiny_models.checkpoints import call
from tests.support.tiny_models.flux import TRANSFORMER
from tests.support.tiny_models.random_weights import diffusers_model
from tests.support.tiny_models.text_encoders import clip_text_encoder

# DPM-Solver of diffusers hands tensors to numpy in a way that numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BACKEND = "DIFFUSION_ATTENTION_BACKEND"
CONFIG = "DIFFUSION_ATTENTION_CONFIG"


class Calls:
    """Counts what reaches a backend of the dispatcher; calls made at start to check it are left out."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size] = []

    def __len__(self) -> int:
        return len(self.shapes)


@pytest.fixture
def math_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The calls of diffusers' `_native_math`: a real backend on the CPU that nothing uses unless asked."""
    calls = Calls()
    backend = _AttentionBackendRegistry._backends[AttentionBackendName._NATIVE_MATH]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.shapes.append(kwargs["query"].shape)
        return backend(*args, **kwargs)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, counted)
    yield calls
    refusal_of.cache_clear()


def flux_transformer() -> FluxTransformer2DModel:
    return diffusers_model(FluxTransformer2DModel, **TRANSFORMER)


@torch.no_grad()
def run_flux(transformer: FluxTransformer2DModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return transformer(
        hidden_states=torch.randn(1, 16, 16, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(1, 8, 32, generator=generator).to(dtype),
        pooled_projections=torch.randn(1, 32, generator=generator).to(dtype),
        timestep=torch.tensor([0.7], dtype=dtype),
        guidance=torch.tensor([3.5], dtype=dtype),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]


def install(modules: StageModules, config: EnvConfig) -> str:
    assert ATTENTION.is_on(config)
    return ATTENTION.install(modules, config)


# --- SGLANG_DIFFUSION_ATTENTION_BACKEND ---


def test_attention_backend_is_off_unless_a_variable_asks_for_it() -> None:
    assert not ATTENTION.is_on(env())
    assert ATTENTION.is_on(env(**{BACKEND: "torch_sdpa"}))
    assert ATTENTION.is_on(env(**{CONFIG: "attention.yaml"}))
    assert ATTENTION.is_on(env(KERNEL_API_LOGLEVEL="1"))


# Every way in which models attend: through the dispatcher (flux, qwenimage, wan22, cosmos2_t2i), in processors of their
# own (sd3, pixart, cogvideox, lumina2), in a UNet (sd15).
ATTENDING = ("flux", "qwenimage", "wan22", "cosmos2_t2i", "sd3", "pixart", "cogvideox", "lumina2", "sd15")


@pytest.mark.parametrize("model", all_but(["flux", "sd3", "sd15"], ATTENDING))
def test_attention_backend_reaches_every_attention_of_the_denoisers_of(model: str, math_calls: Calls) -> None:
    tiny_patches()
    pipeline, arguments = TINY_MODELS[model].build()
    pipeline.set_progress_bar_config(disable=True)
    expected = call(pipeline, arguments, seed=0)
    assert len(math_calls) == 0
    names = [name for name in ("transformer", "transformer_2", "unet") if name in pipeline.components]
    denoisers = {name: pipeline.components[name] for name in names}
    num_attentions = count_attention_calls(denoisers, lambda: call(pipeline, arguments, seed=0))
    line = install(denoiser_stage(**denoisers), env(**{BACKEND: "_NATIVE_MATH"}))
    math_calls.shapes.clear()
    tried = refusal_of.cache_info().misses
    output = call(pipeline, arguments, seed=0)
    num_trials = refusal_of.cache_info().misses - tried  # of calls with a mask, when the first came
    assert len(math_calls) - num_trials == num_attentions > 0
    assert "UNAFFECTED" not in line
    for actual, truth in zip(output, expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-3, atol=5e-3)  # one level of 8 bits


def count_attention_calls(denoisers: dict[str, torch.nn.Module], run: Any) -> int:
    """How often torch's attention runs while one of these modules does, as torch's own dispatcher sees it."""
    counter = AttentionCounter()
    hooks = []
    for module in denoisers.values():
        hooks.append(module.register_forward_pre_hook(counter.start))
        hooks.append(module.register_forward_hook(counter.stop))
    run()
    for hook in hooks:
        hook.remove()
    return counter.count


class AttentionCounter(torch.overrides.TorchFunctionMode):
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))

    def start(self, *_: Any) -> None:
        self.__enter__()

    def stop(self, *_: Any) -> None:
        self.__exit__(None, None, None)


def test_attention_backend_does_not_leak_into_other_modules_of_the_process(math_calls: Calls) -> None:
    inside, outside, vae = flux_transformer(), flux_transformer(), AutoencoderKL(norm_num_groups=4)
    before = _AttentionBackendRegistry.get_active_backend()
    install(denoiser_stage(transformer=inside), env(**{BACKEND: "_native_math"}))
    assert _AttentionBackendRegistry.get_active_backend() == before
    math_calls.shapes.clear()
    run_flux(outside)
    vae.decode(torch.zeros(1, 4, 8, 8))
    assert len(math_calls) == 0
    run_flux(inside)
    assert len(math_calls) == 5


def test_attention_backend_of_a_module_does_not_leak_into_another_thread(math_calls: Calls) -> None:
    vae = AutoencoderKL(norm_num_groups=4)
    install(vae_stage(vae), env(**{BACKEND: "_native_math"}))
    math_calls.shapes.clear()
    query = torch.randn(1, 2, 4, 8)
    attention = vae.decoder.mid_block.attentions[0]

    def attend_elsewhere(*_: Any) -> None:
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=(query, query, query))
        thread.start()
        thread.join()

    attention.to_q.register_forward_pre_hook(attend_elsewhere)  # runs while the redirection is on
    vae.decode(torch.zeros(1, 4, 8, 8))
    assert math_calls.shapes == [torch.Size([1, 64, 1, 64])]


def test_attention_backend_changes_the_vae_too(math_calls: Calls) -> None:
    vae = AutoencoderKL(norm_num_groups=4).eval()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents).sample
        line = install(vae_stage(vae), env(**{BACKEND: "_native_math"}))
        math_calls.shapes.clear()
        torch.testing.assert_close(vae.decode(latents).sample, expected)
    assert len(math_calls) == 1
    assert line == "attention: vae: _native_math in 2 modules"


@pytest.mark.parametrize("name", ["torch_sdpa", "TORCH_SDPA", " Torch_SDPA "])
def test_attention_backend_names_are_taken_in_any_case(name: str) -> None:
    transformer = flux_transformer()
    expected = run_flux(transformer)
    line = install(denoiser_stage(transformer=transformer), env(**{BACKEND: name}))
    assert line == "attention: transformer: native in 5 modules"
    assert torch.equal(run_flux(transformer), expected)


def test_attention_backend_names_of_sglang_all_have_an_answer() -> None:
    for name, backend in BACKENDS.items():
        if backend is None:
            with pytest.raises(AccelerationError, match=f"no equivalent of SGLang's {name}; available are torch_sdpa"):
                diffusers_backend(name, "X")
        else:
            assert diffusers_backend(name.upper(), "X") == backend
            assert backend in DIFFUSERS_BACKENDS


def test_attention_backend_of_an_unknown_name_is_refused_with_the_list_and_the_closest() -> None:
    with pytest.raises(AccelerationError) as refusal:
        install(denoiser_stage(transformer=flux_transformer()), env(**{BACKEND: "sage_atn"}))
    sentence = str(refusal.value)
    assert "SGLANG_DIFFUSION_ATTENTION_BACKEND: 'sage_atn'" in sentence
    assert "did you mean 'sage_attn'?" in sentence
    assert "torch_sdpa, torch_cudnn_sdpa" in sentence


@pytest.mark.parametrize(
    ("name", "install_line"),
    [
        ("fa", "pip install flash-attn --no-build-isolation"),
        ("fa3", "FlashAttention 3"),
        ("fa4", "pip install kernels"),
        ("sage_attn", "sageattention>=2.1.1"),
        ("aiter", "pip install kernels"),
        ("xformers", "pip install xformers"),
    ],
)
def test_attention_backend_of_a_missing_package_is_refused_with_the_install_line(
    name: str, install_line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for flag in (
        "_CAN_USE_FLASH_ATTN",
        "_CAN_USE_FLASH_ATTN_3",
        "_CAN_USE_SAGE_ATTN",
        "_CAN_USE_XFORMERS_ATTN",
    ):
        monkeypatch.setattr(attention_dispatch, flag, False)
    monkeypatch.setattr(attention_dispatch, "is_kernels_available", lambda: False)
    with pytest.raises(AccelerationError) as refusal:
        install(denoiser_stage(transformer=flux_transformer()), env(**{BACKEND: name}))
    assert f"SGLANG_DIFFUSION_ATTENTION_BACKEND={name}" in str(refusal.value)
    assert install_line in str(refusal.value)


def test_attention_backend_that_does_not_run_on_this_device_is_refused_at_start() -> None:
    with pytest.raises(AccelerationError, match="does not run on cpu"):
        install(denoiser_stage(transformer=flux_transformer()), env(**{BACKEND: "torch_cudnn_sdpa"}))


def test_attention_backend_that_gives_wrong_numbers_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def value_of_the_first_token(**kwargs: torch.Tensor) -> torch.Tensor:
        return kwargs["value"][:, :1].expand_as(kwargs["query"])

    name = AttentionBackendName._NATIVE_MATH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, value_of_the_first_token)
    refusal_of.cache_clear()
    with pytest.raises(AccelerationError, match="gives wrong numbers on cpu: off by"):
        install(denoiser_stage(transformer=flux_transformer()), env(**{BACKEND: "_native_math"}))


def test_attention_backend_names_the_modules_that_it_cannot_change() -> None:
    sana = diffusers_model(
        SanaTransformer2DModel,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    line = install(denoiser_stage(transformer=sana), env(**{BACKEND: "_native_math"}))
    assert "_native_math in 2 modules" in line
    assert "UNAFFECTED: 2 x Attention with SanaLinearAttnProcessor2_0" in line


def test_attention_backend_without_any_effect_on_the_denoisers_is_refused() -> None:
    block = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(AccelerationError, match="SGLANG_DIFFUSION_ATTENTION_BACKEND=_native_math cannot be had"):
        install(denoiser_stage(transformer=block), env(**{BACKEND: "_native_math"}))
    assert "no attention module" in install(denoiser_stage(transformer=block), env(**{BACKEND: "torch_sdpa"}))


def test_attention_backend_of_text_encoders_is_transformers_own(tmp_path: Path) -> None:
    encoder = clip_text_encoder()
    modules = StageModules(("encoder",), {"text_encoder": encoder}, (), (), CPU)
    encoder.set_attn_implementation("eager")
    line = install(modules, env(**{BACKEND: "torch_sdpa"}))
    assert line == "attention: text_encoder: transformers' sdpa"
    assert encoder.config._attn_implementation == "sdpa"
    assert "UNAFFECTED: flash_attention_2 does not take its float32" in install(modules, env(**{BACKEND: "fa"}))
    encoder.half()
    assert "text_encoder: keeps transformers' sdpa (UNAFFECTED: " in install(modules, env(**{BACKEND: "fa"}))
    rules = [{"component": "text_encoder", "backend": "fa"}]
    with pytest.raises(AccelerationError, match=r"rules\[0\].backend=fa, text_encoder"):
        install(modules, env(**{CONFIG: str(write(tmp_path, "a.json", rules))}))


def flash_attn_func(
    q: torch.Tensor,  # [B, S, H, D]
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor:
    """A stand-in with flash-attn's signature and layout, computed in torch."""
    positions = torch.arange(q.shape[1])
    distance = positions[None, :] - positions[:, None]
    left, right = window_size
    mask = (distance >= -left if left >= 0 else distance == distance) & (
        distance <= right if right >= 0 else distance == distance
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    flash_calls.append((q.dtype, window_size))
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


flash_calls: list[tuple[torch.dtype, tuple[int, int]]] = []


@pytest.fixture
def stand_in_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_attn_func)
    flash_calls.clear()
    yield
    refusal_of.cache_clear()


@pytest.mark.parametrize("model", ["flux", further("sd3")])
@pytest.mark.usefixtures("stand_in_flash")
def test_attention_backend_fa_calls_flash_attn_in_its_own_layout(model: str) -> None:
    pipeline, arguments = TINY_MODELS[model].build()
    pipeline.set_progress_bar_config(disable=True)
    expected = call(pipeline, arguments, seed=0)
    install(denoiser_stage(transformer=pipeline.transformer), env(**{BACKEND: "fa"}))
    flash_calls.clear()
    output = call(pipeline, arguments, seed=0)
    assert len(flash_calls) > 0
    torch.testing.assert_close(output[0], expected[0], rtol=1e-3, atol=1e-3)


# --- SGLANG_DIFFUSION_ATTENTION_CONFIG ---


def write(folder: Path, name: str, rules: Any) -> Path:
    file = folder / name
    file.write_text(json.dumps({"rules": rules}))  # JSON is YAML
    return file


@pytest.mark.parametrize("name", ["attention.json", "attention.yaml", "attention.yml"])
def test_attention_config_sets_backends_per_block_range(name: str, tmp_path: Path, math_calls: Calls) -> None:
    rules = [{"component": "transformer", "blocks": [1, "2-7"], "backend": "_native_math"}]
    config = env(**{CONFIG: str(write(tmp_path, name, rules))})
    transformer = flux_transformer()
    line = install(denoiser_stage(transformer=transformer), config)
    math_calls.shapes.clear()
    run_flux(transformer)
    assert len(math_calls) == 3  # block 1 of the two double blocks, 1 and 2 of the three single ones
    assert line == "attention: transformer: _native_math in 3 modules"


def test_attention_config_is_looked_up_under_the_config_root(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", [{"backend": "_native_math"}])
    rules = read_rules(env(DIFFUSION_CONFIG_ROOT=str(tmp_path), **{CONFIG: "mine.yaml"}))
    assert [rule.choice.backend for rule in rules] == ["_native_math"]
    with pytest.raises(AccelerationError, match=r"SGLANG_DIFFUSION_ATTENTION_CONFIG=.*nowhere\.yaml: .*No such file"):
        read_rules(env(DIFFUSION_CONFIG_ROOT=str(tmp_path), **{CONFIG: "nowhere.yaml"}))


def test_attention_config_differs_from_the_variable_where_a_rule_matches_and_the_last_wins(
    tmp_path: Path, math_calls: Calls
) -> None:
    rules = [
        {"modules": "single_*", "backend": "torch_sdpa"},
        {"modules": "single_transformer_blocks.1.*", "backend": "_native_math"},
    ]
    config = env(**{CONFIG: str(write(tmp_path, "a.json", rules)), BACKEND: "_native_math"})
    transformer = flux_transformer()
    line = install(denoiser_stage(transformer=transformer), config)
    math_calls.shapes.clear()
    run_flux(transformer)
    assert line == "attention: transformer: _native_math in 3 modules, native in 2 modules"
    assert len(math_calls) == 3


def test_attention_config_rules_of_another_component_are_left_to_its_stage(tmp_path: Path) -> None:
    rules = [{"component": "vae", "backend": "_native_math"}]
    config = env(**{CONFIG: str(write(tmp_path, "a.json", rules)), BACKEND: "torch_sdpa"})
    line = install(denoiser_stage(transformer=flux_transformer()), config)
    assert line == "attention: transformer: native in 5 modules"


def test_attention_config_without_a_rule_for_the_denoisers_leaves_them_alone(tmp_path: Path) -> None:
    rules = [{"component": "vae", "backend": "_native_math"}]
    line = install(
        denoiser_stage(transformer=flux_transformer()),
        env(**{CONFIG: str(write(tmp_path, "a.json", rules))}),
    )
    assert line == "attention: transformer: no attention module that can be given a backend"


def test_attention_config_rule_that_matches_no_module_is_refused(tmp_path: Path) -> None:
    rules = [{"component": "transformer", "blocks": "40-50", "backend": "_native_math"}]
    config = env(**{CONFIG: str(write(tmp_path, "a.json", rules))})
    with pytest.raises(AccelerationError, match=r"rules\[0\].*: no attention module of transformer matches"):
        install(denoiser_stage(transformer=flux_transformer()), config)


def test_attention_config_option_compute_dtype_casts_around_the_kernel(tmp_path: Path) -> None:
    rules = [{"backend": "_native_math", "options": {"compute_dtype": "bfloat16"}}]
    transformer, plain = flux_transformer(), flux_transformer()
    seen = []
    install(denoiser_stage(transformer=transformer), env(**{CONFIG: str(write(tmp_path, "a.json", rules))}))
    name = AttentionBackendName._NATIVE_MATH
    backend = _AttentionBackendRegistry._backends[name]

    def recorded(**kwargs: Any) -> torch.Tensor:
        seen.append(kwargs["query"].dtype)
        return backend(**kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_AttentionBackendRegistry._backends, name, recorded)
        output = run_flux(transformer)
    assert seen == [torch.bfloat16] * 5
    assert output.dtype == torch.float32
    assert not torch.equal(output, run_flux(plain))
    torch.testing.assert_close(output, run_flux(plain), rtol=0.05, atol=0.05)


@pytest.mark.usefixtures("stand_in_flash")
def test_attention_config_passes_the_options_of_a_backend_to_its_kernel(tmp_path: Path) -> None:
    rules = [
        {"component": "transformer", "backend": "fa"},
        {"component": "transformer", "blocks": 0, "backend": "fa", "options": {"window_size": [4, 4]}},
    ]
    transformer = flux_transformer()
    expected = run_flux(transformer)
    install(denoiser_stage(transformer=transformer), env(**{CONFIG: str(write(tmp_path, "a.json", rules))}))
    flash_calls.clear()
    output = run_flux(transformer)
    assert [window for _, window in flash_calls] == [(4, 4), (-1, -1), (4, 4), (-1, -1), (-1, -1)]
    assert not torch.allclose(output, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("stand_in_flash")
def test_attention_config_option_when_masked_serves_calls_that_a_kernel_refuses(
    tmp_path: Path, math_calls: Calls
) -> None:
    """PixArt's cross attention has a mask, which flash-attn does not take."""
    pipeline, arguments = TINY_MODELS["pixart"].build()
    pipeline.set_progress_bar_config(disable=True)
    expected = call(pipeline, arguments, seed=0)
    strict = env(**{CONFIG: str(write(tmp_path, "b.json", [{"backend": "fa"}]))})
    install(denoiser_stage(transformer=pipeline.transformer), strict)
    with pytest.raises(ValueError, match="attn_mask"):
        call(pipeline, arguments, seed=0)
    pipeline, arguments = TINY_MODELS["pixart"].build()
    pipeline.set_progress_bar_config(disable=True)
    rules = [{"backend": "fa", "options": {"when_masked": "_native_math"}}]
    config = env(**{CONFIG: str(write(tmp_path, "a.json", rules))})
    install(denoiser_stage(transformer=pipeline.transformer), config)
    flash_calls.clear()
    math_calls.shapes.clear()
    output = call(pipeline, arguments, seed=0)
    assert len(flash_calls) == len(math_calls) > 0
    torch.testing.assert_close(output[0], expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("rules", "sentence"),
    [
        (
            [{"backnd": "fa"}],
            r"rules\[0\]: unknown key 'backnd' \(did you mean 'backend'\?\); known are component",
        ),
        ([{"backend": "torch_spda"}], r"rules\[0\]\.backend: 'torch_spda'.*did you mean 'torch_sdpa'"),
        ([{"backend": "video_sparse_attn"}], r"rules\[0\]\.backend: diffusers has no equivalent"),
        (
            [{"blocks": 3}],
            r"rules\[0\]\.backend: is missing, and SGLANG_DIFFUSION_ATTENTION_BACKEND is not set",
        ),
        ([{"backend": "torch_sdpa", "blocks": "1-x"}], r"rules\[0\]\.blocks: must be block numbers"),
        ([{"backend": "torch_sdpa", "component": 3}], r"rules\[0\]\.component: must be text, got 3"),
        (
            [{"backend": "fa", "options": {"window": [1, 1]}}],
            r"options of flash: unknown key 'window' \(did you mean 'window_size'\?\); "
            r"known are compute_dtype, when_masked, window_size",
        ),
        (
            [{"backend": "torch_sdpa", "options": {"compute_dtype": "int8"}}],
            r"compute_dtype: must be one of float32, bfloat16, float16, got 'int8'",
        ),
        (["fa"], r"rules\[0\]: must be a mapping with the keys component, blocks"),
        ([], r"`rules` must be a list with at least one rule"),
    ],
)
def test_attention_config_errors_name_the_key_and_what_is_known(rules: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(AccelerationError, match=sentence):
        read_rules(env(**{CONFIG: str(write(tmp_path, "a.json", rules))}))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.toml", "", r"must be a file named \*.json, \*.yaml or \*.yml"),
        ("a.json", "{", "Expecting property name"),
        ("a.yaml", "rules: [", "while parsing"),
        ("a.yaml", "rule: []", r"unknown key 'rule' \(did you mean 'rules'\?\)"),
        ("a.yaml", "", "must be a mapping with the keys rules"),
    ],
)
def test_attention_config_file_that_cannot_be_read_is_refused(
    name: str, text: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AccelerationError, match=sentence):
        read_rules(env(**{CONFIG: str(tmp_path / name)}))


def test_attention_config_example_of_the_documentation_is_valid(tmp_path: Path) -> None:
    document = (Path(__file__).parents[3] / "docs" / "attention.md").read_text()
    example = document.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "attention.yaml").write_text(example)
    rules = read_rules(env(**{CONFIG: str(tmp_path / "attention.yaml")}))
    assert len(rules) >= 3
    assert rules[0].matches("transformer", "transformer_blocks.0.attn")
    for name, backend in BACKENDS.items():
        assert f"`{name}`" in document
        assert backend is None or f"`{backend}`" in document


def test_the_block_of_a_module_is_the_first_number_of_its_path() -> None:
    assert block_of("transformer_blocks.12.attn") == 12
    assert block_of("down_blocks.1.attentions.0.transformer_blocks.2.attn1") == 1
    assert block_of("context_refiner.attn") is None


# --- the kernel API log ---


@pytest.mark.parametrize("backend", [None, "_native_math"])
def test_the_kernel_log_sees_every_attention_call_with_its_backend(backend: str | None) -> None:
    transformer, plain = flux_transformer(), flux_transformer()
    watcher = KernelWatcher()
    config = env(KERNEL_API_LOGLEVEL="1", **({BACKEND: backend} if backend else {}))
    install(denoiser_stage(transformer=transformer, wrap_kernel=watcher), config)
    output = run_flux(transformer)
    assert watcher.calls == {f"attention.transformer.{backend or 'native'}": 5}
    torch.testing.assert_close(output, run_flux(plain))
