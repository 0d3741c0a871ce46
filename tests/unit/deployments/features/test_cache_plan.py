import logging
from typing import Any

import pytest

from deployments.errors import InvalidRequestError
from deployments.features.cache_dit.plan import (
    KNOBS,
    SECONDARY_KNOBS,
    CachePlan,
    cache_plan,
    cache_plans,
    expert_steps,
    has_preset,
)
from env_config.variables import EnvConfig
from tests.support.stage_modules import env

ON = {"CACHE_DIT_ENABLED": "1"}


def plan(
    overrides: dict[str, Any] | None = None, steps: int = 28, secondary: bool = False, **variables: str
) -> CachePlan:
    return cache_plan(env(**ON, **variables), steps, overrides, secondary)


def text(mask: tuple[int, ...] | None) -> str:
    assert mask is not None
    return "".join(map(str, mask))


# --- the variables ---


def test_cache_dit_defaults_are_those_of_the_document() -> None:
    config = plan().cache_config()
    assert config.Fn_compute_blocks == 1
    assert config.Bn_compute_blocks == 0
    assert config.max_warmup_steps == 4
    assert config.residual_diff_threshold == 0.24
    assert config.max_continuous_cached_steps == 3
    assert config.num_inference_steps == 28
    assert config.steps_computation_mask is None
    assert config.steps_computation_policy == "dynamic"
    assert plan().calibrator_config() is None


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("CACHE_DIT_FN", "4", "Fn_compute_blocks", 4),
        ("CACHE_DIT_BN", "2", "Bn_compute_blocks", 2),
        ("CACHE_DIT_WARMUP", "8", "max_warmup_steps", 8),
        ("CACHE_DIT_RDT", "0.08", "residual_diff_threshold", 0.08),
        ("CACHE_DIT_MC", "-1", "max_continuous_cached_steps", -1),
        ("CACHE_DIT_SCM_POLICY", "static", "steps_computation_policy", "static"),
    ],
)
def test_cache_dit_variable_reaches_the_library(variable: str, value: str, field: str, expected: Any) -> None:
    assert getattr(plan(**{variable: value}).cache_config(), field) == expected


def test_cache_dit_taylorseer_and_its_order_reach_the_library() -> None:
    calibrator = plan(CACHE_DIT_TAYLORSEER="true", CACHE_DIT_TS_ORDER="2").calibrator_config()
    assert calibrator is not None
    assert calibrator.taylorseer_order == 2
    assert calibrator.enable_calibrator


def test_cache_dit_enabled_decides_unless_the_request_does() -> None:
    steps = {"transformer": 28}
    off = EnvConfig.from_environ({})
    on = env(**ON)
    assert cache_plans(off, steps) is None
    assert list(cache_plans(on, steps) or {}) == ["transformer"]
    assert cache_plans(on, steps, {"enable": False}) is None
    assert list(cache_plans(off, steps, {"enable": True}) or {}) == ["transformer"]


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("CACHE_DIT_SECONDARY_FN", "3", "Fn_compute_blocks", 3),
        ("CACHE_DIT_SECONDARY_BN", "1", "Bn_compute_blocks", 1),
        ("CACHE_DIT_SECONDARY_WARMUP", "2", "max_warmup_steps", 2),
        ("CACHE_DIT_SECONDARY_RDT", "0.5", "residual_diff_threshold", 0.5),
        ("CACHE_DIT_SECONDARY_MC", "1", "max_continuous_cached_steps", 1),
        ("CACHE_DIT_SECONDARY_TAYLORSEER", "1", "enable_taylorseer", True),
        ("CACHE_DIT_SECONDARY_TS_ORDER", "2", "taylorseer_order", 2),
    ],
)
def test_cache_dit_secondary_variable_is_the_second_transformers_only(
    variable: str, value: str, field: str, expected: Any
) -> None:
    changed = env(**ON, **{variable: value})
    first, second = (cache_plan(changed, 20, None, secondary).knobs for secondary in (False, True))
    assert getattr(second, field) == expected
    assert getattr(first, field) != expected


def test_cache_dit_secondary_falls_back_to_the_primary_and_then_to_the_default() -> None:
    config = env(**ON, CACHE_DIT_FN="2", CACHE_DIT_RDT="0.1", CACHE_DIT_SECONDARY_RDT="0.4")
    second = cache_plan(config, 20, None, secondary=True).knobs
    assert (second.Fn_compute_blocks, second.residual_diff_threshold, second.max_warmup_steps) == (2, 0.4, 4)


# --- the step mask (golden values: executions of cache-dit's own function, written down beforehand) ---

COMPUTED_STEPS = {
    "slow": (3, 4, 7, 8, 9, 10, 11, 13, 15, 18, 18, 22, 22, 24, 27, 38, 43),
    "medium": (3, 4, 6, 7, 8, 8, 9, 10, 12, 15, 15, 18, 18, 20, 22, 29, 35),
    "fast": (3, 4, 5, 6, 6, 7, 7, 6, 8, 11, 11, 14, 14, 16, 18, 20, 27),
    "ultra": (3, 4, 4, 5, 5, 6, 6, 3, 5, 8, 8, 10, 11, 11, 12, 14, 20),
}
STEP_COUNTS = (4, 6, 8, 9, 10, 12, 15, 16, 20, 25, 28, 30, 32, 35, 40, 50, 60)

GOLDEN_MASKS = {
    ("slow", 28): "1111111101110011100110010001",
    ("medium", 28): "1111110110001100011000110001",
    ("fast", 28): "1111110100010000100000100001",
    ("ultra", 28): "1111001000001000000100000001",
    ("slow", 50): "11111111111111111111110011111000111110001110001101",
    ("medium", 50): "11111111111111110011100000111000001110000011100001",
    ("fast", 50): "11111111111001100000110000000110000000001100000001",
    ("ultra", 50): "11111110001100000000011000000000001100000000000001",
    ("fast", 20): "11111101000000000001",
    ("ultra", 16): "1100000000000001",
    ("slow", 6): "111001",
    ("ultra", 4): "1101",
}


@pytest.mark.parametrize("preset", COMPUTED_STEPS)
def test_cache_dit_scm_preset_computes_as_many_steps_as_the_table_says(preset: str) -> None:
    masks = [plan(steps=n, CACHE_DIT_SCM_PRESET=preset).steps_computation_mask for n in STEP_COUNTS]
    assert tuple(sum(mask or ()) for mask in masks) == COMPUTED_STEPS[preset]
    assert [len(mask or ()) for mask in masks] == list(STEP_COUNTS)
    assert all(mask is not None and mask[-1] == 1 for mask in masks)


@pytest.mark.parametrize(("preset", "steps"), GOLDEN_MASKS)
def test_cache_dit_scm_preset_gives_the_golden_mask(preset: str, steps: int) -> None:
    assert text(plan(steps=steps, CACHE_DIT_SCM_PRESET=preset).steps_computation_mask) == GOLDEN_MASKS[preset, steps]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 7])
def test_cache_dit_scm_preset_without_a_table_gives_no_mask_and_a_warning(
    steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert not has_preset(steps)
    with caplog.at_level(logging.WARNING):
        assert plan(steps=steps, CACHE_DIT_SCM_PRESET="fast").steps_computation_mask is None
    assert f"preset fast has no table for {steps} steps" in caplog.text


def test_cache_dit_scm_preset_none_gives_no_mask() -> None:
    assert plan(CACHE_DIT_SCM_PRESET="none").steps_computation_mask is None


def test_cache_dit_scm_compute_bins_and_cache_bins_alternate_and_win_over_the_preset() -> None:
    bins = {"CACHE_DIT_SCM_COMPUTE_BINS": "8,3,3,2,2", "CACHE_DIT_SCM_CACHE_BINS": "1,2,2,2,3"}
    planned = plan(steps=28, CACHE_DIT_SCM_PRESET="ultra", **bins)
    assert text(planned.steps_computation_mask) == "1111111101110011100110011000"
    assert text(plan(steps=20, **bins).steps_computation_mask) == "11111111011100111001"


def test_cache_dit_scm_bins_that_do_not_cover_the_steps_are_a_400_that_says_why() -> None:
    bins = {"CACHE_DIT_SCM_COMPUTE_BINS": "8,3,3,2,2", "CACHE_DIT_SCM_CACHE_BINS": "1,2,2,2,3"}
    with pytest.raises(InvalidRequestError) as refusal:
        plan(steps=50, **bins)
    assert "cover 28 steps (compute 8,3,3,2,2, cache 1,2,2,2,3)" in str(refusal.value)
    assert "runs 50" in str(refusal.value)
    assert refusal.value.param == "cache_dit"


def test_cache_dit_scm_is_built_for_each_transformers_own_steps() -> None:
    plans = cache_plans(env(**ON, CACHE_DIT_SCM_PRESET="slow"), {"transformer": 32, "transformer_2": 18})
    assert plans is not None
    masks = [plan.steps_computation_mask for plan in plans.values()]
    assert [len(mask or ()) for mask in masks] == [32, 18]


# Wan2.2 T2V (shift 12, boundary 0.875) and I2V (shift 5, boundary 0.9): arithmetic of the reference, by hand.
@pytest.mark.parametrize(
    ("steps", "shift", "boundary", "expected"),
    [
        (50, 12.0, 875, (32, 18)),
        (40, 12.0, 875, (26, 14)),
        (20, 12.0, 875, (13, 7)),
        (8, 12.0, 875, (6, 2)),
        (4, 12.0, 875, (3, 1)),
        (40, 5.0, 900, (15, 25)),
    ],
)
def test_each_expert_of_wan22_gets_its_own_share_of_the_steps(
    steps: int, shift: float, boundary: float, expected: tuple[int, int]
) -> None:
    sigmas = [1 - i / steps for i in range(steps)]
    timesteps = [1000 * shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]
    assert expert_steps(timesteps, boundary) == expected
    assert expert_steps(timesteps, None) == (steps, 0)


# --- the request's own values ---


def test_a_request_changes_every_knob() -> None:
    values: dict[str, Any] = {
        "Fn_compute_blocks": 3,
        "Bn_compute_blocks": 1,
        "max_warmup_steps": 0,
        "residual_diff_threshold": 0.5,
        "max_continuous_cached_steps": -1,
        "enable_taylorseer": True,
        "taylorseer_order": 2,
        "scm_preset": "fast",
        "scm_policy": "static",
        "scm_compute_bins": [6, 4],
        "scm_cache_bins": [10, 10],
    }
    assert values.keys() == KNOBS.keys()
    knobs = plan(values).knobs
    before = plan().knobs
    for name, value in values.items():
        assert getattr(knobs, name) == (tuple(value) if isinstance(value, list) else value)
        assert getattr(knobs, name) != getattr(before, name)


def test_a_request_that_leaves_a_knob_out_or_null_keeps_the_variables_value() -> None:
    assert plan({"Fn_compute_blocks": None}, CACHE_DIT_FN="5").knobs.Fn_compute_blocks == 5


def test_a_requests_secondary_object_is_for_the_second_transformer() -> None:
    overrides = {"Fn_compute_blocks": 2, "secondary": {"max_warmup_steps": 1}}
    first = plan(overrides).knobs
    second = plan(overrides, secondary=True, CACHE_DIT_SECONDARY_WARMUP="9").knobs
    assert (first.Fn_compute_blocks, first.max_warmup_steps) == (2, 4)
    assert (second.Fn_compute_blocks, second.max_warmup_steps) == (2, 1)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"Fn": 1}, r"cache_dit: unknown key 'Fn'.*known are Fn_compute_blocks"),
        ({"max_warmup_step": 1}, r"did you mean 'max_warmup_steps'"),
        ({"Fn_compute_blocks": 0}, r"cache_dit\.Fn_compute_blocks must be an integer of at least 1, got 0"),
        ({"Fn_compute_blocks": True}, r"Fn_compute_blocks must be an integer"),
        ({"max_continuous_cached_steps": -2}, r"at least -1, got -2"),
        ({"residual_diff_threshold": 0}, r"must be a finite number above 0"),
        ({"residual_diff_threshold": float("nan")}, r"must be a finite number above 0"),
        ({"taylorseer_order": 3}, r"must be an integer from 1 to 2, got 3"),
        ({"enable_taylorseer": "yes"}, r"must be true or false"),
        ({"scm_preset": "Fast"}, r"must be one of none, slow, medium, fast, ultra, got 'Fast'"),
        ({"scm_policy": "lazy"}, r"must be one of dynamic, static"),
        ({"scm_compute_bins": [3, 0], "scm_cache_bins": [1]}, r"must be a list of integers of at least 1"),
        ({"scm_compute_bins": [28]}, r"cache_dit\.scm_compute_bins needs cache_dit\.scm_cache_bins"),
        ({"scm_cache_bins": [28]}, r"cache_dit\.scm_cache_bins needs cache_dit\.scm_compute_bins"),
        ({"scm_compute_bins": [4], "scm_cache_bins": [4]}, r"cover 8 steps .* runs 28"),
        ({"secondary": 3}, r"cache_dit\.secondary must be an object"),
        ({"secondary": {"scm_preset": "fast"}}, r"cache_dit\.secondary: unknown key 'scm_preset'"),
        ({"secondary": {"Bn_compute_blocks": -1}}, r"cache_dit\.secondary\.Bn_compute_blocks must be"),
        ({"enable": 1}, r"cache_dit\.enable must be true or false"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_with_its_key(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequestError, match=sentence):
        cache_plans(env(**ON), {"transformer": 28}, overrides)


def test_the_second_transformer_has_the_seven_knobs_of_its_variables() -> None:
    assert len(SECONDARY_KNOBS) == 7
