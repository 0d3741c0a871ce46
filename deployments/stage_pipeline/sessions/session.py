"""One request in one stage: a private copy of the pipeline whose component calls are routed to a stage's policy.

The pipeline's own `__call__` runs unchanged. Weights are shared by all requests; schedulers and guiders,
which keep state, are copied. Hooks sit in private subclasses, so nothing that other requests share is patched.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines import ModularPipelineBlocks

from deployments.errors import InvalidRequestError
from deployments.stage_pipeline.argument_types import as_taken
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.modular.blocks import leaves, private_blocks
from deployments.stage_pipeline.outputs import own_arguments
from deployments.stage_pipeline.pipeline_errors import pipeline_errors
from deployments.stage_pipeline.sessions.component import routed_part
from deployments.stage_pipeline.sessions.hooks import Hook, Hooks
from deployments.stage_pipeline.sessions.own_modules import OwnModules, rewired
from deployments.stage_pipeline.sessions.pipeline_code import COMPONENT_CALL, PIPELINE_CODE
from deployments.stage_pipeline.sessions.reading import reading_copy
from deployments.stage_pipeline.sessions.switches import Switch, switches_of
from deployments.tensors.draws import draws_for, draws_of_call, without_draws
from deployments.tensors.global_generators import (
    GlobalStates,
    global_states,
    seed_global_generators,
    set_global_states,
)

# Recorded as one call each: what they return is small, while the text encoder inside may return every layer.
ENCODING_METHODS = ("encode_prompt", "encode_image", "encode_block")
# The method of a scheduler that makes a step: that of predictor-corrector schedulers (ScoreSdeVe) corrects in others.
STEPS = ("step", "step_pred")
PIPELINE = "pipeline"  # the name of the pipeline itself among the components, with ".name" for nested ones

AroundComponent = Callable[[str], contextlib.AbstractContextManager[object]]
RandomStates = tuple[torch.Tensor, GlobalStates]  # of the request's generator and of torch's global ones


def nothing_around(component: str) -> contextlib.AbstractContextManager[object]:
    """What is entered around the calls of a component where a request adds nothing to them."""
    return contextlib.nullcontext()


class StopStage(BaseException):
    """Ends the pipeline's `__call__` when this stage's part is done (pipelines may catch Exception)."""


class Session:
    """The parts common to all stages; a subclass decides what happens at each component call."""

    def __init__(self, stage: StagePipeline, arguments: dict[str, Any], seed: int) -> None:
        self.stage = stage
        self.arguments = as_taken(type(stage.pipeline), arguments)
        self.seed = seed
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.schedulers: list[Any] = []
        self.guiders: list[Any] = []
        self.steps_done = 0
        self.contexts: dict[str, tuple[Any, dict[str, Any]]] = {}  # denoiser -> its cache_context now
        self.hooks = Hooks()
        self.around_component: AroundComponent = nothing_around  # each call that is made here, but of denoisers
        self.own_modules: dict[str, OwnModules] = {}  # of the components that the pipeline has asked for something
        self._rewired_now: set[str] = set()
        self._inside = 0  # depth of component calls; only the outermost is routed
        self._has_component = False  # it holds COMPONENT_CALL
        self._copies: dict[int, Any] = {}
        self.pipeline = self._private_copy(stage.pipeline, PIPELINE)

    @property
    def device(self) -> torch.device:
        return self.stage.device

    # -- what a subclass decides ---------------------------------------------------------------------------

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        raise AssertionError("every stage decides what a denoiser's forward does")

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        """For example the post-processing of latents by a prior."""
        return function(*args, **kwargs)

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        raise AssertionError("every stage decides what a call of an encoder or decoder does")

    def on_text(self, text: str, tokens: int, limit: int | None, count: Callable[[str], int]) -> None:
        """A text was tokenized: see `reading_copy`."""

    def on_round(self, scheduler: Any) -> None:
        """A scheduler got its time steps: a denoising loop begins."""

    def on_scheduler_step(self, scheduler: Any, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.steps_done += 1
        return step(*args, **kwargs)

    # -- running ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def call_pipeline(self) -> Any:
        """Runs the pipeline's own `__call__`; tensors come out as tensors where it can give them.

        Raises PipelineFailedError where its code fails as it does on arguments that it cannot use.
        """
        with PIPELINE_CODE, pipeline_errors(), draws_for(self.device):
            seed_global_generators(self.seed, self.device)  # some pipelines sample from them
            return self.pipeline(**own_arguments(type(self.stage.pipeline), self.generator) | self.arguments)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Lets the code of other requests run meanwhile; the states of the global generators stay this request's."""
        states, has_component = global_states(self.device), self._has_component
        with without_draws():
            if has_component:
                COMPONENT_CALL.release()
            PIPELINE_CODE.release()
            try:
                yield
            finally:
                if has_component:
                    COMPONENT_CALL.acquire()
                PIPELINE_CODE.acquire()
                set_global_states(states, self.device)

    def call_inside(self, component: str, function: Any, args: Any, kwargs: Any) -> Any:
        """Calls a real component, on which the pipeline's hooks and switches are; its own calls are not routed."""
        if self._has_component:
            return self._called(component, function, args, kwargs)
        if not COMPONENT_CALL.acquire(blocking=False):
            with self.waiting():
                COMPONENT_CALL.acquire()
        try:
            return self._called_with_lock(component, function, args, kwargs)
        finally:
            COMPONENT_CALL.release()

    def call_beside(self, component: str, function: Any, args: Any, kwargs: Any) -> Any:
        """The same while the code of other requests runs, for what draws no random numbers but from a generator.

        Not of a component that the request has changed: others would read its dtypes and switches meanwhile.
        """
        own = self.own_modules.get(component)
        if own is not None and own.changes():
            return self.call_inside(component, function, args, kwargs)
        with self.waiting(), COMPONENT_CALL:
            return self._called_with_lock(component, function, args, kwargs)

    def _called_with_lock(self, component: str, function: Any, args: Any, kwargs: Any) -> Any:
        self._has_component = True
        try:
            return self._called(component, function, args, kwargs)
        finally:
            self._has_component = False

    def _called(self, component: str, function: Any, args: Any, kwargs: Any) -> Any:
        hooks = self.hooks.on_modules(self.stage.pipeline) if not self._inside else contextlib.nullcontext()
        self._inside += 1
        try:
            # First: what it puts into the shared modules stays there after the request's own changes are taken back.
            with (
                self.around_component(component),
                self.rewired(component),
                hooks,
                without_draws(),
                draws_of_call(args, kwargs),
            ):
                return function(*args, **kwargs)
        finally:
            self._inside -= 1

    def on_hook(self, component: str, path: str, register: str, function: Any, options: dict[str, Any]) -> Any:
        """The pipeline sets a forward hook; its handle takes it away."""
        if self._inside:  # a hook for calls that are not routed themselves
            module = getattr(self.stage.pipeline, component).get_submodule(path)
            return getattr(module, register)(function, **options)
        return self.hooks.add(Hook(component, path, register, function, options))

    def random_states(self) -> RandomStates:
        return self.generator.get_state(), global_states(self.device)

    def set_random_states(self, states: tuple[torch.Tensor | None, GlobalStates]) -> None:
        """Those that are not among `states` stay as they are."""
        if states[0] is not None:
            self.generator.set_state(states[0])
        set_global_states(states[1], self.device)

    @contextlib.contextmanager
    def cache_context(self, component: str, name: Any = None, **kwargs: Any) -> Iterator[None]:
        """What pipelines enter round a denoiser's forward to name the pass ("cond", "uncond")."""
        self.contexts[component] = (name, kwargs)
        try:
            yield
        finally:
            self.contexts.pop(component, None)

    def own_modules_of(self, component: str) -> OwnModules:
        """Where the pipeline finds the modules of a component, and may change them for this request."""
        own = self.own_modules.get(component)
        if own is None:
            is_denoiser = "denoiser" in self.stage.layout.stages_of[component]
            own = self.own_modules[component] = OwnModules(getattr(self.stage.pipeline, component), is_denoiser)
        return own

    def own_component(self, component: str) -> torch.nn.Module | None:
        """The request's own object of a component that it has changed."""
        own = self.own_modules.get(component)
        shared = getattr(self.stage.pipeline, component)
        return None if own is None or own.seen(shared) is shared else own.seen(shared)

    @contextlib.contextmanager
    def rewired(self, component: str) -> Iterator[None]:
        """The component as the pipeline has changed it; a denoiser only in the thread that makes forwards."""
        own = self.own_modules.get(component)
        changes = own.changes() if own is not None and component not in self._rewired_now else []
        if own is None or not changes:
            yield
            return
        self._rewired_now.add(component)
        try:
            with rewired(own, changes):
                yield
        finally:
            self._rewired_now.remove(component)

    def switches(self, component: str) -> dict[str, list[Switch]]:
        """What the request has changed of the component; of all but the denoisers for a call of the pipeline's own.

        Raises NotSupportedError for what cannot be told to another process.
        """
        is_pipelines = component.startswith(PIPELINE)
        asked = {name: own for name, own in self.own_modules.items() if name == component or is_pipelines}
        found = {name: switches_of(name, own) for name, own in asked.items() if not own.in_parts}
        return {name: switches for name, switches in found.items() if switches}

    # -- the private copy --------------------------------------------------------------------------------------

    def _private_copy(self, pipeline: Any, path: str) -> Any:
        private = copy.copy(pipeline)
        device = self.stage.device
        members = {
            "_execution_device": property(lambda _: device),
            "device": property(lambda _: device),
            "__module__": type(pipeline).__module__,
        }
        private.__class__ = type(type(pipeline).__name__, (type(pipeline),), members)
        self._copies[id(pipeline)] = private
        for attribute, value in list(pipeline.__dict__.items()):
            replacement = self._copies.get(id(value))
            if replacement is None:
                replacement = self._replacement(value, f"{path}.{attribute}")
            if replacement is not None:
                self._copies[id(value)] = replacement
                private.__dict__[attribute] = replacement
        self._route_encoding_methods(private, type(pipeline), path)
        self._name_the_callers_fault(private)
        return private

    def _replacement(self, value: Any, path: str) -> Any:
        if isinstance(value, DiffusionPipeline):
            return self._private_copy(value, path)
        if isinstance(value, SchedulerMixin):
            return self._private_scheduler(value)
        if isinstance(value, BaseGuidance):
            self.guiders.append(copy.deepcopy(value))
            return self.guiders[-1]
        if isinstance(value, ModularPipelineBlocks):
            return self._private_blocks(value)
        if (reading := reading_copy(value, self.on_text)) is not None:
            return reading
        if isinstance(value, torch.nn.Module):
            return self._routed(value)
        if type(value) in (list, tuple, dict, set):
            return self._own_container(value, path)
        return None

    def _routed(self, module: torch.nn.Module) -> Any:
        """None for a module of no component."""
        components = {name: getattr(self.stage.pipeline, name, None) for name in self.stage.layout.stages_of}
        found = [(name, "") for name, component in components.items() if component is module]
        if not found:
            found = [
                (name, part)
                for name, component in components.items()
                if isinstance(component, torch.nn.Module)
                for part, each in component.named_modules()
                if each is module
            ]
        if not found:
            return None
        name, path = found[0]
        is_denoiser = "denoiser" in self.stage.layout.stages_of[name]
        own = is_denoiser and path != ""
        return routed_part(self.own_modules_of(name).of(module) if own else module, name, self, is_denoiser, path)

    def _own_container(self, values: Any, path: str) -> Any:
        """A copy for this request, with its own parts in place of those that requests share."""

        def own(value: Any, name: Any) -> Any:
            replacement = self._copies.get(id(value))
            if replacement is None:
                replacement = self._replacement(value, f"{path}.{name}")
            return value if replacement is None else replacement

        if isinstance(values, dict):
            return {name: own(value, name) for name, value in values.items()}
        return type(values)(own(value, index) for index, value in enumerate(values))

    def _private_blocks(self, blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
        private = private_blocks(blocks, self.stage.layout.stages_of)
        for _, block in leaves(private):
            self._name_the_callers_fault(block)
        return private

    def _route_encoding_methods(self, private: Any, cls: type, path: str) -> None:
        for method in ENCODING_METHODS:
            if callable(getattr(cls, method, None)):
                function = getattr(private, method)
                routed = functools.partial(self._on_encoding_method, path, method, function)
                private.__dict__[method] = functools.wraps(function)(routed)

    def _on_encoding_method(self, path: str, method: str, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self.on_component_call(path, method, function, args, kwargs)

    def _name_the_callers_fault(self, private: Any) -> None:
        """What `check_inputs` refuses is the caller's fault, and is told apart from a failure of ours."""
        if not callable(getattr(type(private), "check_inputs", None)):
            return
        check = private.check_inputs

        @functools.wraps(check)
        def check_inputs(*args: Any, **kwargs: Any) -> Any:
            try:
                return check(*args, **kwargs)
            except (ValueError, TypeError) as error:
                raise InvalidRequestError(str(error)) from error

        private.__dict__["check_inputs"] = check_inputs

    def _private_scheduler(self, scheduler: Any) -> Any:
        cls: Any = type(scheduler)
        private = copy.deepcopy(scheduler)
        private.__class__ = _reporting_class(cls)
        private.__dict__["_session"] = _SessionReference(self)
        self.schedulers.append(private)
        return private


class _SessionReference:
    """Survives the deep copies that pipelines make of schedulers without copying the session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __copy__(self) -> _SessionReference:
        return self

    def __deepcopy__(self, memo: Any) -> _SessionReference:
        return self


@functools.cache
def _reporting_class(cls: Any) -> Any:
    """A subclass of a scheduler's class, under the same name, whose instances report their steps to their session.

    Instances say that they are of `cls`, because pipelines compare. The signatures are kept, because
    pipelines inspect them to decide what to pass (the generator, for one).
    """

    members: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__class__": property(lambda self: cls),
    }
    if (name := next((name for name in STEPS if hasattr(cls, name)), None)) is not None:
        own_step = getattr(cls, name)

        @functools.wraps(own_step)
        def step(self: Any, *args: Any, **kwargs: Any) -> Any:
            reference = self.__dict__.get("_session")
            if reference is None:
                return own_step(self, *args, **kwargs)
            return reference.session.on_scheduler_step(self, functools.partial(own_step, self), args, kwargs)

        members[name] = step
    if hasattr(cls, "set_timesteps"):

        @functools.wraps(cls.set_timesteps)
        def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
            reference = self.__dict__.get("_session")
            if reference is not None:
                reference.session.on_round(self)
            return cls.set_timesteps(self, *args, **kwargs)

        members["set_timesteps"] = set_timesteps
    if not hasattr(cls, "scale_model_input"):  # a pipeline that asks for type() takes the subclass for one that scales
        members["scale_model_input"] = lambda self, sample, *args, **kwargs: sample
    return type(cls.__name__, (cls,), members)
