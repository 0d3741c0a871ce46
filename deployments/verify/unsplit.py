"""The truth: the pipeline's own call with nothing between it and its components, and the same call watched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.guiders import BaseGuidance

from deployments.messages import GenerationRequest
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.component import is_computing_method
from deployments.stage_pipeline.sessions.session import ENCODING_METHODS, PIPELINE, Session
from deployments.stages.encode import call_arguments
from deployments.tensors.values import map_values


@dataclass(frozen=True)
class WatchedCall:
    """A call from the pipeline's code, and copies of what it was given and returned; `after`: denoising had begun."""

    component: str
    method: str
    given: Any
    returned: Any
    after: bool


@dataclass
class Unsplit:
    """What the unsplit pipeline made, and the calls that it made on the way where they were watched."""

    output: Any
    calls: list[WatchedCall] = field(default_factory=list)

    def calls_of(self, component: str, method: str, after: bool) -> list[WatchedCall]:
        return [c for c in self.calls if (c.component, c.method, c.after) == (component, method, after)]


def call_unsplit(whole: StagePipeline, request: GenerationRequest) -> Unsplit:
    """Raises what the pipeline raises."""
    return Unsplit(_called(whole, request, fresh_pipeline(whole.pipeline, {})))


def watch_unsplit(whole: StagePipeline, request: GenerationRequest) -> Unsplit:
    """The same with the outermost calls of its components and encoding methods noted; they are told nothing of it."""
    watch, pipeline = _Watch(whole.layout.denoisers), fresh_pipeline(whole.pipeline, {})
    with ExitStack() as stack:
        for owner, component, method in _watched_methods(pipeline, whole.layout.models):
            stack.enter_context(_replaced(owner, method, functools.partial(watch.around, component, method)))
        output = _called(whole, request, pipeline)
    return Unsplit(output, watch.calls)


def fresh_pipeline(pipeline: Any, fresh: dict[int, Any]) -> Any:
    """As if it were loaded anew: schedulers and guiders, which keep state, and pipelines within are its own."""
    made = fresh[id(pipeline)] = copy.copy(pipeline)
    for name, value in list(vars(pipeline).items()):
        if isinstance(value, DiffusionPipeline) and id(value) not in fresh:
            fresh_pipeline(value, fresh)
        elif isinstance(value, SchedulerMixin | BaseGuidance) and id(value) not in fresh:
            fresh[id(value)] = copy.deepcopy(value)
        if id(value) in fresh:
            made.__dict__[name] = fresh[id(value)]
    return made


class _PlainCall(Session):
    """The call with a session's arguments, seeds and errors, but of a pipeline that nobody has put anything into."""

    def __init__(self, whole: StagePipeline, request: GenerationRequest, pipeline: Any) -> None:
        super().__init__(whole, call_arguments(whole, request), request.seed)
        self.pipeline = pipeline


def _called(whole: StagePipeline, request: GenerationRequest, pipeline: Any) -> Any:
    output = _PlainCall(whole, request, pipeline).call_pipeline()
    return map_values(_copied, dict(output) if hasattr(output, "keys") else output)


class _Watch:
    def __init__(self, denoisers: tuple[str, ...]) -> None:
        self.denoisers = denoisers
        self.calls: list[WatchedCall] = []
        self._depth = 0
        self._is_denoising = False

    def around(self, component: str, method: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        self._is_denoising |= component in self.denoisers and method == "forward"
        if self._depth:
            return function(*args, **kwargs)
        given, after = map_values(_copied, [list(args), kwargs]), self._is_denoising
        self._depth += 1
        try:
            output = function(*args, **kwargs)
        finally:
            self._depth -= 1
        self.calls.append(WatchedCall(component, method, given, map_values(_copied, output), after))
        return output


def _watched_methods(pipeline: Any, models: Iterable[str]) -> Iterator[tuple[Any, str, str]]:
    """Owner, the name of the component, the method."""
    for name in models:
        component: Any = getattr(pipeline, name, None)
        cls: Any = type(component)
        for method in dir(cls) if isinstance(component, torch.nn.Module) else ():
            if is_computing_method(cls, method) and callable(getattr(component, method, None)):
                yield component, name, method
    yield from _encoding_methods(pipeline, PIPELINE, set())


def _encoding_methods(pipeline: Any, path: str, seen: set[int]) -> Iterator[tuple[Any, str, str]]:
    """Those of the pipeline and of the pipelines that it holds."""
    seen.add(id(pipeline))
    yield from ((pipeline, path, method) for method in ENCODING_METHODS if hasattr(pipeline, method))
    for name, value in list(vars(pipeline).items()):
        if isinstance(value, DiffusionPipeline) and id(value) not in seen:
            yield from _encoding_methods(value, f"{path}.{name}", seen)


@contextmanager
def _replaced(owner: Any, method: str, around: Callable[..., Any]) -> Iterator[None]:
    """Only on this object: what it had there itself comes back."""
    function, own = getattr(owner, method), vars(owner).get(method)
    owner.__dict__[method] = functools.wraps(function)(functools.partial(around, function))
    try:
        yield
    finally:
        if own is None:
            del owner.__dict__[method]
        else:
            owner.__dict__[method] = own


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return torch.Generator("cpu").set_state(value.get_state())
    return value.clone() if isinstance(value, torch.Tensor) else value
