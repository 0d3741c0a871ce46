"""The LoRAs of requests in a stage: the library of its process, and what surrounds the calls of encoders.

A denoiser's forwards are surrounded by the feature `deployments.features.lora`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deployments.adapters.forward import applied
from deployments.adapters.library import AdapterLibrary, FetchedAdapter
from deployments.adapters.use import FEATURE, AdapterUse, use_of
from deployments.errors import CheckpointError, NotSupportedError, TriptychError
from deployments.messages import ComponentAnswer, ComponentCall, GenerationRequest
from deployments.model import ModelArgs
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stage_pipeline.sessions.pipeline_code import COMPONENT_CALL
from deployments.stage_pipeline.sessions.session import AroundComponent, nothing_around
from deployments.stages.ranks.beside import loras_problem

MAX_WAIT_S = 1.0  # for the encoders, where memory is lacking: their thread may be the one that waits

Brought = list[tuple[AdapterUse, FetchedAdapter]]


def with_adapters(stage: StagePipeline, model: ModelArgs, cache_root: Path) -> StagePipeline:
    """The stage with its library. Raises CheckpointError for adapters of a configuration whose model takes none, or has
    no component that they name."""
    library = AdapterLibrary(stage, model.adapter_cache, cache_root, obstacle=loras_problem(model))
    if model.adapters and (why := library.why_none()):
        raise CheckpointError(f"adapters: {why}: leave `adapters` out")
    for name, args in model.adapters.items():
        scales = {f"scale.{each}": each for each in args.scale} if isinstance(args.scale, Mapping) else {}
        for field, component in {"component": args.component, **scales}.items():
            if component not in (None, *library.loadable):
                allowed = " and ".join(library.loadable)
                raise CheckpointError(f"adapters.{name}.{field}: {component!r} can have no LoRA, but {allowed} can")
    stage = replace(stage, adapters=library)
    stage.memory.when_lacking(partial(evict_idle_of_encoders, stage))
    return stage


def configured_uses(model: ModelArgs, is_preloaded: bool = False) -> list[AdapterUse]:
    """The adapters of the configuration, or those of them that are loaded at the start."""
    return [
        AdapterUse(name, args.path, args.weight_name, args.scale, component=args.component)
        for name, args in model.adapters.items()
        if args.preload or not is_preloaded
    ]


def preload(stage: StagePipeline, model: ModelArgs) -> list[str]:
    """Loads what the configuration says is loaded at the start, before any request; the lines for the log.

    Raises CheckpointError that names the adapter.
    """
    lines = []
    for use in configured_uses(model, is_preloaded=True):
        try:
            with stage.adapters.holding([use], stage.adapters.loadable) as [held]:
                lines.append(f"adapters: {use.name} is in {' and '.join(sorted(held.components)) or 'no model here'}")
        except TriptychError as error:
            raise CheckpointError(f"adapters.{use.name}: {error}") from error
    return lines


def uses_of(request: GenerationRequest) -> tuple[AdapterUse, ...]:
    """The adapters that a request names."""
    return tuple(use_of(plain) for plain in request.features.get(FEATURE) or ())


def brought(stage: StagePipeline, uses: Sequence[AdapterUse]) -> Brought:
    """The adapters on this host, for the encoders of this process; none where it has no such encoder.

    They stay there as long as the result does. In any thread, for as long as a download takes. Raises as
    `AdapterLibrary.fetched`.
    """
    library: AdapterLibrary | None = stage.adapters
    if not uses or library is None:
        return []
    if not library.loadable:
        raise NotSupportedError(f"{type(stage.pipeline).__name__} takes no LoRA", FEATURE)
    if not encoders_with_adapters(stage):
        return []
    on_host = [library.fetched(use) for use in uses]
    return [(replace(use, digest=each.digest), each) for use, each in zip(uses, on_host, strict=True)]


def encoders_with_adapters(stage: StagePipeline) -> frozenset[str]:
    """Of this process, those that can have some."""
    return (frozenset(stage.adapters.loadable) & stage.components.keys()) - frozenset(stage.layout.denoisers)


def adapters_around(stage: StagePipeline, found: Brought) -> AroundComponent:
    """Around each call of an encoder of this process: the adapters of its request, at their scales.

    They were brought at once: all encoders get the same, and none waits for a file. A component is called by one thread
    at a time (COMPONENT_CALL), in which its layers are also put in.
    """
    if not found:
        return nothing_around
    encoders, library = encoders_with_adapters(stage), stage.adapters

    @contextmanager
    def around(component: str) -> Iterator[None]:
        if component not in encoders:
            yield
            return
        with library.holding([use for use, _ in found], [component]) as held:
            scales: dict[str, float] = {}
            for each in held:
                if component in each.components:
                    scales[each.peft_name] = scales.get(each.peft_name, 0.0) + each.use.scale_in(component)
            with applied(stage.components[component], [(1, scales)]):
                yield

    return around


def with_contents(request: GenerationRequest, found: Brought) -> GenerationRequest:
    """The request that says which contents its adapters have."""
    if not found:
        return request
    return replace(request, features=request.features | {FEATURE: [use.plain() for use, _ in found]})


def with_digests(request: GenerationRequest, digests: Mapping[str, str]) -> GenerationRequest:
    """The request whose LoRAs are those that its encoders have used, where it did not say which contents it means."""
    asked = request.features.get(FEATURE)
    if not (asked and digests):
        return request
    told = [use.plain() | {"digest": use.digest or digests.get(use.name, "")} for use in uses_of(request)]
    return replace(request, features=request.features | {FEATURE: told})


def answer_with_adapters(stage: StagePipeline, call: ComponentCall) -> ComponentAnswer:
    """Makes the call of another stage, with the adapters of its request. Raises as `answer_call` and `brought`."""
    found = brought(stage, [use_of(plain) for plain in call.adapters])
    return answer_call(stage, call, adapters_around(stage, found))


def described(stage: StagePipeline, use: AdapterUse) -> dict[str, Any]:
    """What an adapter is, as plain values. Raises as `AdapterLibrary.fetched`."""
    if why := stage.adapters.why_none():
        raise NotSupportedError(why, FEATURE)
    plain: dict[str, Any] = stage.adapters.fetched(use).describe()
    return plain


def give_back_of_encoders(stage: StagePipeline) -> None:
    """What was forgotten leaves the encoders; in the thread that calls them."""
    with COMPONENT_CALL:
        stage.adapters.give_back(stage.components.keys() - set(stage.layout.denoisers))


def evict_idle_of_encoders(stage: StagePipeline, wait_s: float = MAX_WAIT_S) -> None:
    """Adapters that no request uses leave the encoders, unless these are called all the time."""
    if stage.adapters is not None and COMPONENT_CALL.acquire(timeout=wait_s):
        try:
            stage.adapters.evict_idle(encoders_with_adapters(stage))
        finally:
            COMPONENT_CALL.release()
