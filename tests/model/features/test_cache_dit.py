import copy
import logging
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cache_dit
import pytest
import torch
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)

from deployments.errors import InvalidRequestError
from deployments.features.cache_dit.contexts import (
    activate,
    let_go_of_finished,
    new_contexts,
    prepare,
    restore,
    snapshot,
    summary,
)
from deployments.features.cache_dit.forward import Contexts
from deployments.features.cache_dit.plan import CachePlan, cache_plan
from deployments.features.cache_dit.request import CACHE_DIT
from deployments.modules import AccelerationError
from deployments.tensors.packing import pack, unpack
from deployments.tensors.values import tensors
from env_config.variables import EnvConfig
from tests.support.further import further
from tests.support.stage_modules import denoiser_stage, env, vae_stage
from tests.support.tiny_models.flux import TRANSFORMER
from tests.support.tiny_models.random_weights import diffusers_model

# Random weights change a lot from step to step: a high threshold, or a static mask, makes steps be reused.
DYNAMIC = {"residual_diff_threshold": 0.9, "max_warmup_steps": 2, "max_continuous_cached_steps": 2}
STATIC = {"scm_preset": "fast", "scm_policy": "static"}
TAYLOR = {**DYNAMIC, "enable_taylorseer": True}


@pytest.fixture(autouse=True)
def quiet_cache_dit() -> None:
    logging.getLogger("cache_dit").setLevel(logging.ERROR)


def flux_transformer(num_layers: int = 4, num_single_layers: int = 4) -> FluxTransformer2DModel:
    config = {**TRANSFORMER, "num_layers": num_layers, "num_single_layers": num_single_layers}
    return diffusers_model(FluxTransformer2DModel, **config)


def wan_transformer(seed: int = 0) -> WanTransformer3DModel:
    return diffusers_model(
        WanTransformer3DModel,
        seed=seed,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=6,
        rope_max_seq_len=32,
    )


def plan(overrides: dict[str, Any], steps: int) -> CachePlan:
    return cache_plan(EnvConfig.from_environ({}), steps, overrides)


Velocity = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass
class Request:
    """A denoising loop that is run step by step: its own latents, scheduler, contexts and prompt."""

    module: torch.nn.Module
    seed: int
    num_steps: int
    contexts: Contexts | None = None
    num_passes: int = 1  # forwards per step: 2 for guidance in two passes
    step_index: int = 0
    latents: torch.Tensor = field(init=False)
    scheduler: FlowMatchEulerDiscreteScheduler = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        is_wan = isinstance(self.module, WanTransformer3DModel)
        shape, text = ((1, 4, 1, 8, 8), (2, 6, 16)) if is_wan else ((1, 16, 16), (2, 6, 32))
        self.latents = torch.randn(shape, generator=generator)
        self.text = torch.randn(text, generator=generator)
        self.pooled = torch.randn(1, 32, generator=generator)
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        self.scheduler.set_timesteps(self.num_steps)

    @property
    def is_done(self) -> bool:
        return self.step_index >= self.num_steps

    @torch.no_grad()
    def step(self) -> None:
        timestep = self.scheduler.timesteps[self.step_index]
        passes = [self.forward(timestep, guidance_pass) for guidance_pass in range(self.num_passes)]
        velocity = passes[0] if len(passes) == 1 else passes[1] + 4.0 * (passes[0] - passes[1])
        self.latents = self.scheduler.step(velocity, timestep, self.latents, return_dict=False)[0]
        self.step_index += 1

    def forward(self, timestep: torch.Tensor, guidance_pass: int) -> torch.Tensor:
        if hasattr(self.module, "cached_forward"):
            activate(self.module, self.contexts, guidance_pass)
        text = self.text[guidance_pass : guidance_pass + 1]
        if isinstance(self.module, WanTransformer3DModel):
            return self.module(
                hidden_states=self.latents,
                timestep=timestep.expand(1),
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
        return self.module(
            hidden_states=self.latents,
            encoder_hidden_states=text,
            pooled_projections=self.pooled,
            timestep=timestep.expand(1) / 1000,
            guidance=torch.tensor([3.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(6, 3),
            return_dict=False,
        )[0]

    def finish(self) -> torch.Tensor:
        while not self.is_done:
            self.step()
        return self.latents


def begin(
    module: torch.nn.Module, seed: int, steps: int, overrides: dict[str, Any] | None, num_passes: int = 1
) -> Request:
    contexts = None if overrides is None else new_contexts(module, plan(overrides, steps))
    return Request(module, seed, steps, contexts, num_passes)


# --- what cache-dit itself does with a fresh transformer is the truth ---


SETTINGS = pytest.mark.parametrize(
    "overrides",
    [
        pytest.param(DYNAMIC, id="dynamic"),
        pytest.param(STATIC, id="static", marks=pytest.mark.rest),
        pytest.param(TAYLOR, id="taylorseer"),
    ],
)


@pytest.mark.parametrize("overrides", [DYNAMIC, STATIC, TAYLOR], ids=["dynamic", "static", "taylorseer"])
def test_a_request_equals_cache_dits_own_result_on_a_fresh_transformer_bit_for_bit(
    overrides: dict[str, Any],
) -> None:
    truth_module = flux_transformer()
    planned = plan(overrides, 12)
    cache_dit.enable_cache(
        truth_module, cache_config=planned.cache_config(), calibrator_config=planned.calibrator_config()
    )
    truth = Request(truth_module, seed=0, num_steps=12).finish()
    uncached = Request(flux_transformer(), seed=0, num_steps=12).finish()
    ours = flux_transformer()
    assert torch.equal(begin(ours, 0, 12, overrides).finish(), truth)
    assert not torch.equal(truth, uncached)


@pytest.mark.parametrize("taylorseer", [False, True])
def test_two_guidance_passes_equal_cache_dits_own_separate_guidance_bit_for_bit(taylorseer: bool) -> None:
    truth_module = wan_transformer()
    cache_dit.enable_cache(
        truth_module,
        cache_config=DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=2,
            residual_diff_threshold=0.9,
            max_continuous_cached_steps=2,
            num_inference_steps=12,
            enable_separate_cfg=True,
        ),
        calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1) if taylorseer else None,
    )
    truth = Request(truth_module, seed=0, num_steps=12, num_passes=2).finish()
    request = begin(wan_transformer(), 0, 12, TAYLOR if taylorseer else DYNAMIC, num_passes=2)
    assert torch.equal(request.finish(), truth)
    assert request.contexts is not None
    assert len(request.contexts.passes) == 2
    assert summary(request.module, request.contexts).reused_steps > 0


# --- requests take turns ---


@SETTINGS
@pytest.mark.parametrize(("build", "num_passes"), [(flux_transformer, 1), further(wan_transformer, 2)])
def test_interleaved_requests_equal_running_alone_bit_for_bit(
    build: Callable[[], torch.nn.Module], num_passes: int, overrides: dict[str, Any]
) -> None:
    """Two cached requests with different numbers of steps and an uncached one, whoever is next."""
    settings = [(0, 12, overrides), (1, 9, overrides), (2, 10, None)]
    alone = []
    for seed, steps, wanted in settings:
        alone.append(begin(build(), seed, steps, wanted, num_passes).finish())
    module = build()
    requests = [begin(module, seed, steps, wanted, num_passes) for seed, steps, wanted in settings]
    while not all(request.is_done for request in requests):
        for request in requests:
            if not request.is_done:
                request.step()
    for request, truth in zip(requests, alone, strict=True):
        assert torch.equal(request.latents, truth)
    assert all(r.contexts is None or summary(module, r.contexts).reused_steps > 0 for r in requests)


def test_the_first_step_of_a_request_is_never_served_from_the_request_before() -> None:
    """cache-dit's own refresh does exactly that with a static mask."""
    module = flux_transformer()
    first = begin(module, 0, 8, STATIC)
    first.finish()
    second = begin(module, 1, 8, STATIC)
    second.step()
    assert second.contexts is not None
    assert summary(module, second.contexts).reused_steps == 0
    assert torch.equal(second.finish(), begin(flux_transformer(), 1, 8, STATIC).finish())


def test_the_same_request_twice_gives_the_same_bytes() -> None:
    module = flux_transformer()
    results = [begin(module, 0, 10, TAYLOR).finish() for _ in range(2)]
    assert torch.equal(*results)


def test_a_request_without_contexts_runs_as_if_nothing_were_installed() -> None:
    truth = Request(flux_transformer(), 0, 5).finish()
    module = flux_transformer()
    prepare(module)
    assert torch.equal(begin(module, 0, 5, None).finish(), truth)
    begin(module, 1, 8, DYNAMIC).finish()
    assert torch.equal(begin(module, 0, 5, None).finish(), truth)


def test_an_uncached_forward_lets_go_of_the_last_requests_memory() -> None:
    module = flux_transformer()
    request = begin(module, 0, 8, DYNAMIC)
    request.step()
    manager = module.cached_forward.manager
    assert manager._cached_context_manager
    activate(module, None)
    assert not manager._cached_context_manager
    assert manager.current_context is None


def test_more_steps_than_planned_are_computed(caplog: pytest.LogCaptureFixture) -> None:
    module = flux_transformer()
    request = begin(module, 0, 10, None)
    request.contexts = new_contexts(module, plan(STATIC, 8))
    with caplog.at_level(logging.WARNING):
        request.finish()
    counted = summary(module, request.contexts)
    assert counted.computed_steps + counted.reused_steps == 8
    assert "more than the 8 steps of its plan" in caplog.text


# --- what was saved ---


@pytest.mark.parametrize(("preset", "computed"), [("slow", 10), ("medium", 8), ("fast", 7), ("ultra", 6)])
@pytest.mark.parametrize("build", [flux_transformer, further(wan_transformer)])
def test_a_static_mask_computes_exactly_the_steps_that_it_marks(
    build: Callable[[], torch.nn.Module], preset: str, computed: int
) -> None:
    """The numbers of the golden table for 12 steps."""
    module = build()
    begin(module, 1, 12, STATIC).step()  # the first call of a model is compared with an uncached one
    num_blocks, blocks_run = count_block_calls(module)
    request = begin(module, 0, 12, {"scm_preset": preset, "scm_policy": "static"})
    request.finish()
    assert request.contexts is not None
    mask = request.contexts.plan.steps_computation_mask
    assert mask is not None
    counted = summary(module, request.contexts)
    assert (counted.computed_steps, counted.reused_steps) == (computed, 12 - computed)
    assert counted.reused == (tuple(i for i, bit in enumerate(mask) if not bit),)
    assert counted.blocks_total == 12 * num_blocks
    assert counted.blocks_computed == computed * num_blocks + (12 - computed) == blocks_run[0]


def count_block_calls(module: torch.nn.Module) -> tuple[int, list[int]]:
    """The number of blocks, and a counter of how often they run."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    lists = [child for child in module.children() if isinstance(child, torch.nn.ModuleList)]
    blocks = [block for block_list in lists for block in block_list]
    for block in blocks:
        block.register_forward_hook(count)
    return len(blocks), calls


def test_first_and_last_blocks_are_always_computed() -> None:
    module = flux_transformer()
    begin(module, 1, 12, STATIC).step()
    _, blocks_run = count_block_calls(module)
    request = begin(module, 0, 12, {**STATIC, "Fn_compute_blocks": 2, "Bn_compute_blocks": 1})
    request.finish()
    assert request.contexts is not None
    counted = summary(module, request.contexts)
    assert counted.blocks_computed == blocks_run[0] == 7 * 8 + 5 * 3


# --- checkpoints ---


@SETTINGS
@pytest.mark.parametrize(("build", "num_passes"), [(flux_transformer, 1), further(wan_transformer, 2)])
def test_a_snapshot_continues_on_another_transformer_with_the_same_bytes(
    build: Callable[[], torch.nn.Module], num_passes: int, overrides: dict[str, Any]
) -> None:
    truth = begin(build(), 0, 12, overrides, num_passes).finish()
    request = begin(build(), 0, 12, overrides, num_passes)
    for _ in range(7):
        request.step()
    assert request.contexts is not None
    message = pickle.dumps(pack(snapshot(request.contexts)))  # as it crosses to another replica
    saved = unpack(pickle.loads(message), torch.device("cpu"))
    resumed = copy.copy(request)
    resumed.module = build()
    prepare(resumed.module)
    resumed.contexts = restore(resumed.module, request.contexts.plan, saved)
    counted = summary(resumed.module, resumed.contexts)
    assert counted == summary(request.module, request.contexts)
    assert torch.equal(resumed.finish(), truth)


@pytest.mark.parametrize("overrides", [DYNAMIC, TAYLOR], ids=["dynamic", "taylorseer"])
def test_a_transformer_that_has_made_its_steps_keeps_no_tensors_of_the_request(overrides: dict[str, Any]) -> None:
    request = begin(flux_transformer(), 0, 6, overrides)
    assert request.contexts is not None
    while request.step_index < 5:
        request.step()
        let_go_of_finished(request.contexts)
        assert tensors(snapshot(request.contexts))
    before = summary(request.module, request.contexts)
    request.step()
    let_go_of_finished(request.contexts)
    assert not tensors(snapshot(request.contexts))
    after = summary(request.module, request.contexts)
    assert after.computed_steps + after.reused_steps == 6 > before.computed_steps + before.reused_steps


# --- the start of a replica ---


def test_cache_dit_enabled_prepares_the_denoisers_and_says_so() -> None:
    config = env(CACHE_DIT_ENABLED="true", CACHE_DIT_SECONDARY_FN="2")
    assert CACHE_DIT.install(denoiser_stage(transformer=flux_transformer()), env()) == ""
    line = CACHE_DIT.install(denoiser_stage(transformer=flux_transformer(), transformer_2=wan_transformer()), config)
    assert "transformer (FluxTransformer2DModel, 8 blocks) with Fn_compute_blocks=1" in line
    assert "transformer_2 (WanTransformer3DModel, 6 blocks) with Fn_compute_blocks=2" in line


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")
def test_a_controlnet_beside_the_transformer_is_left_as_it_is() -> None:
    """cache-dit takes any class whose name begins with Flux for a FLUX transformer."""
    controlnet = diffusers_model(FluxControlNetModel, **{**TRANSFORMER, "num_layers": 1, "num_single_layers": 1})
    stage = denoiser_stage(controlnet=controlnet, transformer=flux_transformer())
    line = CACHE_DIT.install(stage, env(CACHE_DIT_ENABLED="1"))
    assert line.startswith("cache_dit: transformer (FluxTransformer2DModel")
    assert "controlnet" not in line
    assert not hasattr(controlnet, "cached_forward")


def test_cache_dit_is_inert_in_a_stage_without_denoiser() -> None:
    line = CACHE_DIT.install(vae_stage(torch.nn.Identity()), env(CACHE_DIT_ENABLED="1"))
    assert line == "cache_dit: inert, this stage holds no denoiser"


def test_a_class_that_cache_dit_does_not_know_is_refused_by_name() -> None:
    unet = diffusers_model(
        UNet2DConditionModel,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    with pytest.raises(AccelerationError, match=r"SGLANG_CACHE_DIT_ENABLED: .* class UNet2DConditionModel; .*Flux"):
        CACHE_DIT.install(denoiser_stage(unet=unet), env(CACHE_DIT_ENABLED="1"))
    with pytest.raises(InvalidRequestError, match="class UNet2DConditionModel"):
        new_contexts(unet, plan({}, 8))


def test_more_always_computed_blocks_than_there_are_is_refused() -> None:
    config = env(CACHE_DIT_ENABLED="1", CACHE_DIT_FN="5", CACHE_DIT_BN="2")
    with pytest.raises(AccelerationError, match=r"SGLANG_CACHE_DIT_FN .* first 5 and the last 2 .* 6 blocks"):
        CACHE_DIT.install(denoiser_stage(transformer=wan_transformer()), config)
    with pytest.raises(InvalidRequestError, match=r"cache_dit\.Fn_compute_blocks .* first 7 .* 6 blocks"):
        new_contexts(wan_transformer(), plan({"Fn_compute_blocks": 7}, 8))


def test_a_request_may_enable_caching_where_the_variable_does_not() -> None:
    module = flux_transformer()
    request = begin(module, 0, 12, {"enable": True, **STATIC})
    request.finish()
    assert request.contexts is not None
    assert summary(module, request.contexts).reused_steps == 5


def test_sd3_is_cached_although_cache_dit_knows_it_by_its_pipeline_only() -> None:
    module = diffusers_model(
        SD3Transformer2DModel,
        sample_size=32,
        patch_size=1,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 4, 4),
        "encoder_hidden_states": torch.randn(1, 3, 16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([500.0]),
    }
    with torch.no_grad():
        expected = module(**inputs).sample
        contexts = new_contexts(module, plan(STATIC, 8))
        for _ in range(8):
            activate(module, contexts)
            output = module(**inputs).sample
        assert summary(module, contexts).reused_steps == 3
        torch.testing.assert_close(output, expected)
        activate(module, None)
        assert torch.equal(module(**inputs).sample, expected)


def test_a_call_that_cache_dit_does_not_foresee_is_computed_in_full(caplog: pytest.LogCaptureFixture) -> None:
    """cache-dit's version of FLUX leaves out the residuals of a ControlNet."""
    inputs = {
        "hidden_states": torch.randn(1, 16, 16),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
        "controlnet_block_samples": [torch.randn(1, 16, 32)],
    }
    module = flux_transformer()
    with torch.no_grad():
        expected = module(**inputs).sample
        contexts = new_contexts(module, plan(STATIC, 8))
        for _ in range(8):
            activate(module, contexts)
            assert torch.equal(module(**inputs).sample, expected)
    assert summary(module, contexts).obstacle == (
        "cache-dit does not give this call's result even when it computes everything"
    )
    assert caplog.text.count("runs uncached") == 1
    request = begin(module, 0, 12, STATIC)  # the same model without a ControlNet is cached
    request.finish()
    assert request.contexts is not None
    assert summary(module, request.contexts).reused_steps == 5


def test_a_request_whose_shapes_change_between_steps_is_computed_from_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    module, plain = wan_transformer(), wan_transformer()
    contexts = new_contexts(module, plan({**STATIC, "scm_compute_bins": [1], "scm_cache_bins": [9]}, 10))
    text = torch.randn(1, 6, 16)
    for size in (8, 4):
        inputs = (torch.randn(1, 4, 1, size, size), torch.tensor([500]), text)
        activate(module, contexts)
        with torch.no_grad():
            assert torch.equal(module(*inputs).sample, plain(*inputs).sample)
    assert "changed between two of its steps" in caplog.text


def test_a_model_that_cache_dit_patches_is_unchanged_when_uncached() -> None:
    module = diffusers_model(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        norm_num_groups=8,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.tensor([7]))
    with torch.no_grad():
        expected = module(*inputs).sample
        prepare(module)
        assert torch.equal(module(*inputs).sample, expected)
