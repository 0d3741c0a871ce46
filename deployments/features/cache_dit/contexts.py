"""Cache-DiT: if the first blocks barely changed since the last step, the output of the remaining blocks is reused.

The library is made for one request at a time: its own refresh between requests starts one step late, so
that the first step of a request can be served from the previous one. Here every request owns its contexts
(what is remembered of its earlier steps), and `activate` puts them into the transformer before each of its
forwards, so that requests may take turns at any step. Without contexts a forward runs uncached.

In the life of a request: `cache_plans` (plan.py) says how it is cached; `new_contexts` once for each of
its transformers; `activate` before each forward; `snapshot` and `restore` around a checkpoint; `summary` at
the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import cache_dit
import torch
from cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern
from cache_dit.caching.cache_contexts.cache_context import CachedContext

from deployments.errors import InvalidRequestError
from deployments.features.cache_dit.forward import CachedForward, Contexts, Patch
from deployments.features.cache_dit.plan import PARAM, CacheKnobs, CachePlan, resolve_knobs
from deployments.modules import AccelerationError, StageModules
from env_config.variables import EnvConfig

# Transformers that cache-dit only knows by the name of their pipeline: their lists of blocks.
BLOCKS_BY_CLASS = {"SD3Transformer2DModel": ("transformer_blocks", ForwardPattern.Pattern_1)}


def install(modules: StageModules, env: EnvConfig) -> str:
    """Prepare every denoiser of the stage for cached forwards, where the variables ask for caching."""
    if not env.cache_dit.enabled:
        return ""
    if not modules.denoisers:
        return "cache_dit: inert, this stage holds no denoiser"
    lines = []
    for position, (name, module) in enumerate(modules.parts(cached_denoisers(modules.denoisers)).items()):
        prepare(module)
        knobs = resolve_knobs(env, None, secondary=position > 0)
        obstacle = misfit(module, knobs)
        if obstacle is not None:
            variables = "SGLANG_CACHE_DIT_FN and SGLANG_CACHE_DIT_BN"
            raise AccelerationError(f"{variables} (or their SECONDARY_ forms) do not fit {name}: {obstacle}")
        blocks = "+".join(map(str, prepared(module).num_blocks))
        lines.append(f"{name} ({type(module).__name__}, {blocks} blocks) with {_described(knobs)}")
    return "cache_dit: " + "; ".join(lines)


def cached_denoisers(names: tuple[str, ...]) -> tuple[str, ...]:
    """Which denoisers of a pipeline are cached, the primary one first: transformers, not their ControlNets."""
    transformers = tuple(name for name in names if name.startswith("transformer"))
    return transformers or tuple(name for name in names if not name.startswith("controlnet"))


def prepare(module: torch.nn.Module) -> None:
    """Give a transformer its cached forward; it runs uncached until `activate` says otherwise.

    Raises AccelerationError for a class that Cache-DiT does not know. A second call changes nothing.
    """
    if isinstance(getattr(module, "cached_forward", None), CachedForward):
        return
    before = {part: vars(part).get("forward") for part in module.modules()}
    original = module.forward
    adapter = _block_adapter(module)
    blocks = adapter.blocks if isinstance(adapter.blocks, list) else [adapter.blocks]
    num_blocks = [len(block_list) for block_list in blocks]
    cache_dit.enable_cache(adapter, cache_config=DBCacheConfig(Fn_compute_blocks=1, enable_separate_cfg=False))
    patches = [
        Patch(part, former, vars(part)["forward"])
        for part, former in before.items()
        if part is not module and vars(part).get("forward") is not former
    ]
    patched: Any = module  # with the attributes that cache-dit left on it
    patched.cached_forward = CachedForward(
        original, patched.forward, patches, patched._context_manager, patched._context_names, num_blocks
    )
    patched.forward = patched.cached_forward
    patched.cached_forward.deactivate()


def prepared(module: torch.nn.Module) -> CachedForward:
    """What `prepare` left on a transformer."""
    forward = module.cached_forward
    assert isinstance(forward, CachedForward)
    return forward


def misfit(module: torch.nn.Module, knobs: CacheKnobs) -> str | None:
    """Why these numbers of blocks cannot be used on a prepared transformer; None: they can."""
    first, last, shortest = knobs.Fn_compute_blocks, knobs.Bn_compute_blocks, min(prepared(module).num_blocks)
    if first + last <= shortest:
        return None
    return f"the first {first} and the last {last} are more than the {shortest} blocks of its shortest list"


def _block_adapter(module: torch.nn.Module) -> BlockAdapter:
    class_name = type(module).__name__
    if class_name in BLOCKS_BY_CLASS:
        attribute, pattern = BLOCKS_BY_CLASS[class_name]
        return BlockAdapter(transformer=module, blocks=getattr(module, attribute), forward_pattern=pattern)
    try:
        adapter = cache_dit.get_adapter(module)
    except AssertionError as error:  # a class whose name only begins like a known one
        raise _unsupported(module) from error
    if adapter is None:
        raise _unsupported(module)
    return adapter


def _unsupported(module: torch.nn.Module) -> AccelerationError:
    return AccelerationError(
        f"SGLANG_CACHE_DIT_ENABLED: Cache-DiT does not know the transformer class {type(module).__name__}; "
        f"it knows those whose name begins with {', '.join(cache_dit.supported_pipelines()[1])} "
        f"and {', '.join(BLOCKS_BY_CLASS)}"
    )


def _described(knobs: CacheKnobs) -> str:
    return ", ".join(f"{name}={value}" for name, value in asdict(knobs).items() if value is not None)


# --- the contexts of a request ---


def new_contexts(module: torch.nn.Module, plan: CachePlan) -> Contexts:
    """Empty contexts for a request that begins; prepares the transformer if nobody has.

    Raises InvalidRequestError when the transformer has fewer blocks than the plan always computes,
    or when its class cannot be cached.
    """
    try:
        prepare(module)
    except AccelerationError as error:
        raise InvalidRequestError(str(error), param=PARAM, code="not_supported") from error
    obstacle = misfit(module, plan.knobs)
    if obstacle is not None:
        names = f"{PARAM}.Fn_compute_blocks and {PARAM}.Bn_compute_blocks"
        raise InvalidRequestError(f"{names} do not fit the transformer: {obstacle}", param=PARAM)
    return Contexts(plan)


def activate(module: torch.nn.Module, contexts: Contexts | None, guidance_pass: int = 0) -> None:
    """Let the next forward of a transformer use these contexts; None: let it run uncached.

    `guidance_pass` counts the forwards of the request on this transformer since its last scheduler step.
    """
    forward = getattr(module, "cached_forward", None)
    if not isinstance(forward, CachedForward):
        assert contexts is None, "contexts are made by new_contexts, which prepares the transformer"
    elif contexts is None:
        forward.deactivate()
    else:
        forward.contexts, forward.guidance_pass = contexts, guidance_pass


def let_go_of_finished(contexts: Contexts) -> None:
    """Of a pass that has made all steps of its plan nothing is read again but the counts: an expert's turn is over."""
    for in_pass in contexts.passes.values():
        if all(context.executed_steps >= contexts.plan.num_inference_steps for context in in_pass):
            for context in in_pass:
                context.clear_buffers()
                for name in CALIBRATORS:
                    if (calibrator := getattr(context, name)) is not None:
                        calibrator.states.clear()


@dataclass(frozen=True)
class CacheSummary:
    """What one transformer computed and reused in one request so far."""

    computed_steps: int  # steps of which at least one list of blocks was computed in at least one pass
    reused_steps: int  # all others
    blocks_computed: int  # over all steps, passes and lists of blocks
    blocks_total: int  # the same without caching
    reused: tuple[tuple[int, ...], ...]  # the reused steps of each list of blocks, pass after pass
    obstacle: str | None  # why the rest of the request ran uncached; those steps are not counted


def summary(module: torch.nn.Module, contexts: Contexts) -> CacheSummary:
    """Count what a request has computed and reused on this transformer."""
    always = contexts.plan.knobs.Fn_compute_blocks + contexts.plan.knobs.Bn_compute_blocks
    num_blocks = prepared(module).num_blocks
    lists = [(c, n) for in_pass in contexts.passes.values() for c, n in zip(in_pass, num_blocks, strict=True)]
    num_steps = max((context.executed_steps for context, _ in lists), default=0)
    reused = [tuple(context.cached_steps) for context, _ in lists]
    reused_everywhere = set.intersection(*map(set, reused)) if reused else set()
    blocks_total = sum(context.executed_steps * n for context, n in lists)
    blocks_saved = sum(len(context.cached_steps) * (n - always) for context, n in lists)
    return CacheSummary(
        computed_steps=num_steps - len(reused_everywhere),
        reused_steps=len(reused_everywhere),
        blocks_computed=blocks_total - blocks_saved,
        blocks_total=blocks_total,
        reused=tuple(reused),
        obstacle=contexts.obstacle,
    )


# --- checkpoints ---

CALIBRATORS = ("calibrator", "encoder_calibrator")
KEPT_FIELDS = tuple(
    name
    for name in (declared.name for declared in fields(CachedContext))
    if name not in ("name", "cache_config", "extra_cache_config", "calibrator_config")
    and not name.endswith("calibrator")
)


def snapshot(contexts: Contexts) -> dict[str, Any]:
    """The contexts as plain values and tensors, which `restore` reads in another process."""
    return {
        "passes": [
            (guidance_pass, contexts.shapes.get(guidance_pass), [_state_of(context) for context in in_pass])
            for guidance_pass, in_pass in contexts.passes.items()
        ],
        "obstacle": contexts.obstacle,
    }


def restore(module: torch.nn.Module, plan: CachePlan, saved: Mapping[str, Any]) -> Contexts:
    """The contexts of which `saved` is the snapshot, for this transformer."""
    contexts = new_contexts(module, plan)
    contexts.obstacle = saved["obstacle"]
    for guidance_pass, shapes, states in saved["passes"]:
        in_pass = prepared(module).empty_contexts(plan)
        for context, state in zip(in_pass, states, strict=True):
            _set_state(context, state)
        contexts.passes[guidance_pass] = in_pass
        if shapes is not None:
            contexts.shapes[guidance_pass] = shapes
    return contexts


def _state_of(context: CachedContext) -> dict[str, Any]:
    state = {name: _copied(getattr(context, name)) for name in KEPT_FIELDS}
    for name in CALIBRATORS:
        calibrator = getattr(context, name)
        streams = calibrator.states if calibrator is not None else {}
        state[name] = {stream: _copied(vars(taylor)) for stream, taylor in streams.items()}
    return state


def _set_state(context: CachedContext, state: Mapping[str, Any]) -> None:
    for name in KEPT_FIELDS:
        kept = getattr(context, name)
        if isinstance(kept, dict):
            kept.update(state[name])
        else:
            setattr(context, name, _copied(state[name]))
    for name in CALIBRATORS:
        for stream, values in state[name].items():
            calibrator = getattr(context, name)
            calibrator.maybe_init_state(stream)
            vars(calibrator.states[stream]).update(_copied(values))


def _copied(value: Any) -> Any:
    """The containers copied, their tensors shared: cache-dit replaces tensors and never writes into them."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value
