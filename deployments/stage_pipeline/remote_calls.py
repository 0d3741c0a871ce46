"""Calls to a component in the process that holds it, for pipelines that need it inside their loop.

The states of the generators travel along and come back, so the random draws are those of one process. What the request
has switched in the components (dtypes, tiling) travels along too, and is there for this call alone.
"""

from __future__ import annotations

from typing import Any

import torch

from deployments.errors import HandOffError
from deployments.messages import ComponentAnswer, ComponentCall
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.pipeline_errors import pipeline_errors
from deployments.stage_pipeline.sessions.component import function_of, is_routed
from deployments.stage_pipeline.sessions.pipeline_code import PIPELINE_CODE
from deployments.stage_pipeline.sessions.session import (
    ENCODING_METHODS,
    PIPELINE,
    AroundComponent,
    Session,
    nothing_around,
)
from deployments.stage_pipeline.sessions.switches import set_switches
from deployments.tensors.global_generators import global_states, set_global_states
from deployments.tensors.packing import made_on, pack, unpack
from deployments.tensors.values import leaves, with_anything, without_opaque


def component_call(session: Session, component: str, method: str, args: Any, kwargs: Any) -> ComponentCall:
    """The caller's side: the call as a message. Raises NotSupportedError for what the request has changed otherwise."""
    given = made_on(session.device, args), made_on(session.device, kwargs)
    arguments = *given, global_states(session.device), session.switches(component)
    return ComponentCall(component, method, pack(arguments), is_steady=session.stage.memory.is_steady)


def apply_answer(answer: ComponentAnswer, args: Any, kwargs: Any, device: torch.device) -> Any:
    """The caller's side: the output, after the caller's generators were left as the call left its own."""
    output, states, of_torch = unpack(answer.outcome, device)
    for generator, state in zip(_generators((args, kwargs)), states, strict=True):
        generator.set_state(state)
    set_global_states(of_torch, device)
    return with_anything(output)


def answer_call(
    stage: StagePipeline, call: ComponentCall, around_component: AroundComponent = nothing_around
) -> ComponentAnswer:
    """The holder's side: makes the call with the real component, in what the request adds to it.

    Raises PipelineFailedError, and DeviceFullError or TooLargeForDeviceError.
    """
    return stage.memory.run(lambda: _answer(stage, call, around_component), is_steady=call.is_steady)


@torch.no_grad()
def _answer(stage: StagePipeline, call: ComponentCall, around_component: AroundComponent) -> ComponentAnswer:
    args, kwargs, of_torch, switches = unpack(call.arguments, stage.device)
    with PIPELINE_CODE, pipeline_errors():
        session = AnsweringSession(stage)
        session.around_component = around_component
        function = _function(stage, session, call)
        for component, changed in switches.items():
            if component in stage.components:
                set_switches(session.own_modules_of(component), changed)
        set_global_states(of_torch, stage.device)
        output = session.call_inside(call.component, function, args, kwargs)
        states = [generator.get_state() for generator in _generators((args, kwargs))]
        given = made_on(stage.device, without_opaque(output))
        return ComponentAnswer(pack((given, states, global_states(stage.device))))


class AnsweringSession(Session):
    """Makes one call in the stage that holds the component; what it changes of components lasts as long."""

    def __init__(self, stage: StagePipeline) -> None:
        super().__init__(stage, {}, seed=0)

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        return self.call_inside(component, function, args, kwargs)


def _function(stage: StagePipeline, session: Session, call: ComponentCall) -> Any:
    if call.component.startswith(PIPELINE):
        if call.method not in ENCODING_METHODS:
            raise HandOffError(f"{call.component}.{call.method} cannot be called from another stage")
        owner: Any = session.pipeline
        for name in call.component.split(".")[1:]:
            owner = getattr(owner, name)
        return getattr(owner, call.method)
    component = stage.components.get(call.component)
    if component is None or not is_routed(component, call.method):
        raise HandOffError(f"{call.component}.{call.method} cannot be called in this stage")
    return function_of(component, call.method)


def _generators(value: Any) -> list[torch.Generator]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Generator)]
