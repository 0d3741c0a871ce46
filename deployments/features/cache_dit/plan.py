"""What Cache-DiT is told for a request: the variables, the request's `cache_dit` field, and the step mask."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import cache_dit
from cache_dit import DBCacheConfig, TaylorSeerCalibratorConfig

from deployments.errors import InvalidRequestError
from env_config.closest import did_you_mean
from env_config.variables import CacheDiT, EnvConfig, SCMPolicy, SCMPreset

logger = logging.getLogger(__name__)

PARAM = "cache_dit"  # the field of a request's body


@dataclass(frozen=True)
class CacheKnobs:
    """How one transformer caches; the names are those of cache-dit and of a request's `cache_dit` field."""

    Fn_compute_blocks: int  # the first blocks, always computed
    Bn_compute_blocks: int  # the last blocks, always computed
    max_warmup_steps: int  # the first steps, always computed
    residual_diff_threshold: float  # relative L1 distance of the first blocks' residuals
    max_continuous_cached_steps: int  # -1: no limit, 0: never reuse
    enable_taylorseer: bool
    taylorseer_order: int
    scm_preset: str
    scm_policy: str  # static: steps left out by the mask are reused without asking the threshold
    scm_compute_bins: tuple[int, ...] | None
    scm_cache_bins: tuple[int, ...] | None


@dataclass(frozen=True)
class CachePlan:
    """How the steps of one transformer in one request are cached."""

    num_inference_steps: int  # of this transformer
    knobs: CacheKnobs
    steps_computation_mask: tuple[int, ...] | None = None  # 1: always computed

    def cache_config(self) -> DBCacheConfig:
        mask = self.steps_computation_mask
        return DBCacheConfig(
            Fn_compute_blocks=self.knobs.Fn_compute_blocks,
            Bn_compute_blocks=self.knobs.Bn_compute_blocks,
            max_warmup_steps=self.knobs.max_warmup_steps,
            residual_diff_threshold=self.knobs.residual_diff_threshold,
            max_continuous_cached_steps=self.knobs.max_continuous_cached_steps,
            enable_separate_cfg=False,  # each guidance pass has contexts of its own
            num_inference_steps=self.num_inference_steps,
            steps_computation_mask=list(mask) if mask is not None else None,
            steps_computation_policy=self.knobs.scm_policy,
        )

    def calibrator_config(self) -> TaylorSeerCalibratorConfig | None:
        if not self.knobs.enable_taylorseer:
            return None
        return TaylorSeerCalibratorConfig(taylorseer_order=self.knobs.taylorseer_order)


def cache_plans(
    env: EnvConfig, num_steps: Mapping[str, int], overrides: Mapping[str, Any] | None = None
) -> dict[str, CachePlan] | None:
    """The plan of each transformer; None: this request is not cached.

    `num_steps` holds the number of steps that each transformer runs in this request, the primary one first
    (see `expert_steps`); `overrides` is the `cache_dit` field of the request's body.
    Raises InvalidRequestError for a field that cannot be used.
    """
    if not is_wanted(env, overrides):
        return None
    plans = {}
    for position, (name, steps) in enumerate(num_steps.items()):
        plans[name] = cache_plan(env, steps, overrides, secondary=position > 0)
    return plans


def is_wanted(env: EnvConfig, overrides: Mapping[str, Any] | None) -> bool:
    """Whether a request is to be cached: its own `enable`, else SGLANG_CACHE_DIT_ENABLED."""
    enable = (overrides or {}).get("enable")
    if enable is None:
        return env.cache_dit.enabled
    _check("enable", enable, FLAG, PARAM)
    return bool(enable)


def cache_plan(
    env: EnvConfig, num_inference_steps: int, overrides: Mapping[str, Any] | None, secondary: bool = False
) -> CachePlan:
    """The plan of one transformer that runs `num_inference_steps` steps."""
    knobs = resolve_knobs(env, overrides, secondary)
    return CachePlan(num_inference_steps, knobs, computation_mask(knobs, num_inference_steps))


def resolve_knobs(env: EnvConfig, overrides: Mapping[str, Any] | None, secondary: bool) -> CacheKnobs:
    """The request's value, else the variable's; the second transformer's own of either before the primary's.

    Raises InvalidRequestError for an unknown key or a value out of bounds.
    """
    request = dict(overrides or {})
    of_second = request.pop("secondary", None)
    of_second = {} if of_second is None else of_second
    if not isinstance(of_second, Mapping):
        raise InvalidRequestError(f"{PARAM}.secondary must be an object, got {of_second!r}", param=PARAM)
    _check_overrides(request, (*KNOBS, "enable", "secondary"), PARAM)
    _check_overrides(of_second, SECONDARY_KNOBS, f"{PARAM}.secondary")
    section = env.cache_dit_secondary.resolve(env.cache_dit) if secondary else env.cache_dit
    return replace(_knobs_of(section), **_given(request), **(_given(of_second) if secondary else {}))


def computation_mask(knobs: CacheKnobs, num_inference_steps: int) -> tuple[int, ...] | None:
    """Which steps are always computed: the bins' pattern, else the preset's; None: no mask.

    Raises InvalidRequestError for bins that do not cover the steps. A preset that has no table for this
    number of steps gives no mask and a warning.
    """
    compute_bins, cache_bins = knobs.scm_compute_bins, knobs.scm_cache_bins
    if (compute_bins is None) != (cache_bins is None):
        given, missing = ("scm_compute_bins", "scm_cache_bins")[:: 1 if compute_bins else -1]
        raise InvalidRequestError(f"{PARAM}.{given} needs {PARAM}.{missing} beside it", param=PARAM)
    if compute_bins is not None and cache_bins is not None:
        covered = sum(compute_bins) + sum(cache_bins)
        if covered < num_inference_steps:
            raise InvalidRequestError(
                f"the bins of Cache-DiT's step mask cover {covered} steps (compute "
                f"{_listed(compute_bins)}, cache {_listed(cache_bins)}), but a transformer of this request "
                f"runs {num_inference_steps}: give bins that add up to at least that, or a preset",
                param=PARAM,
            )
        mask = cache_dit.steps_mask(
            compute_bins=list(compute_bins), cache_bins=list(cache_bins), total_steps=num_inference_steps
        )
        return tuple(mask)
    if knobs.scm_preset == "none":
        return None
    if not has_preset(num_inference_steps):
        logger.warning(
            "Cache-DiT's preset %s has no table for %d steps (it has for 4, 6, and 8 or more): no step mask",
            knobs.scm_preset,
            num_inference_steps,
        )
        return None
    return tuple(cache_dit.steps_mask(mask_policy=knobs.scm_preset, total_steps=num_inference_steps))


def has_preset(num_inference_steps: int) -> bool:
    """Whether cache-dit's presets have a table for this number of steps."""
    return num_inference_steps in (4, 6) or num_inference_steps >= 8


def expert_steps(timesteps: Sequence[float], boundary_timestep: float | None) -> tuple[int, int]:
    """How many steps two boundary experts run (Wan2.2): high noise down to the boundary, then low noise."""
    if boundary_timestep is None:
        return len(timesteps), 0
    high = sum(1 for timestep in timesteps if timestep >= boundary_timestep)
    return high, len(timesteps) - high


# --- the fields of a request ---


@dataclass(frozen=True)
class _Rule:
    allowed: str
    accepts: Callable[[Any], bool]


def _whole(at_least: int, at_most: int | None = None) -> _Rule:
    def accepts(value: Any) -> bool:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole and at_least <= value and (at_most is None or value <= at_most)

    bounds = f"of at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    return _Rule(f"an integer {bounds}", accepts)


def _one_of(choices: tuple[str, ...]) -> _Rule:
    return _Rule(f"one of {', '.join(choices)}", lambda value: value in choices)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _are_bins(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(_whole(1).accepts(item) for item in value)


FLAG = _Rule("true or false", lambda value: isinstance(value, bool))
KNOBS: dict[str, _Rule] = {
    "Fn_compute_blocks": _whole(1),
    "Bn_compute_blocks": _whole(0),
    "max_warmup_steps": _whole(0),
    "residual_diff_threshold": _Rule("a finite number above 0", _is_positive),
    "max_continuous_cached_steps": _whole(-1),
    "enable_taylorseer": FLAG,
    "taylorseer_order": _whole(1, 2),
    "scm_preset": _one_of(get_args(SCMPreset)),
    "scm_policy": _one_of(get_args(SCMPolicy)),
    "scm_compute_bins": _Rule("a list of integers of at least 1", _are_bins),
    "scm_cache_bins": _Rule("a list of integers of at least 1", _are_bins),
}
SECONDARY_KNOBS = tuple(name for name in KNOBS if not name.startswith("scm_"))  # both experts share the mask


def _knobs_of(section: CacheDiT) -> CacheKnobs:
    return CacheKnobs(
        Fn_compute_blocks=section.fn,
        Bn_compute_blocks=section.bn,
        max_warmup_steps=section.warmup,
        residual_diff_threshold=section.rdt,
        max_continuous_cached_steps=section.mc,
        enable_taylorseer=section.taylorseer,
        taylorseer_order=section.ts_order,
        scm_preset=section.scm_preset,
        scm_policy=section.scm_policy,
        scm_compute_bins=section.scm_compute_bins,
        scm_cache_bins=section.scm_cache_bins,
    )


def _given(overrides: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in overrides.items() if name in KNOBS and value is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def _check_overrides(overrides: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name, value in overrides.items():
        if name not in known:
            hint = did_you_mean(name, known)
            hint = hint and f" ({hint})"
            raise InvalidRequestError(f"{where}: unknown key {name!r}{hint}; known are {', '.join(known)}", param=PARAM)
        if value is not None and name in KNOBS:
            _check(name, value, KNOBS[name], where)


def _check(name: str, value: Any, rule: _Rule, where: str) -> None:
    if not rule.accepts(value):
        raise InvalidRequestError(f"{where}.{name} must be {rule.allowed}, got {value!r}", param=PARAM)


def _listed(bins: tuple[int, ...]) -> str:
    return ",".join(map(str, bins))
