"""Calls to a component in the process that holds it, for pipelines that need it inside their loop.

The states of the generators travel along and come back, so the random draws are those of one process.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from deployments.errors import HandOffError
from deployments.messages import ComponentAnswer, ComponentCall
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.pipeline_errors import pipeline_errors
from deployments.stage_pipeline.sessions.component import function_of, is_routed
from deployments.stage_pipeline.sessions.session import ENCODING_METHODS, PIPELINE, PIPELINE_CODE
from deployments.tensors.packing import pack, unpack
from deployments.tensors.values import leaves, with_anything, without_opaque


def component_call(component: str, method: str, args: Any, kwargs: Any) -> ComponentCall:
    """The caller's side: the call as a message."""
    return ComponentCall(component, method, pack((args, kwargs, torch.get_rng_state())))


def apply_answer(answer: ComponentAnswer, args: Any, kwargs: Any, device: torch.device) -> Any:
    """The caller's side: the output, after the caller's generators were left as the call left its own."""
    output, states, global_state = unpack(answer.outcome, device)
    for generator, state in zip(_generators((args, kwargs)), states, strict=True):
        generator.set_state(state)
    torch.set_rng_state(global_state)
    return with_anything(output)


def answer_call(stage: StagePipeline, call: ComponentCall) -> ComponentAnswer:
    """The holder's side: makes the call with the real component.

    Raises PipelineFailedError, and DeviceFullError or TooLargeForDeviceError.
    """
    function = _function(stage, call)
    return stage.memory.run(lambda: _answer(stage, function, call))


@torch.no_grad()
def _answer(stage: StagePipeline, function: Any, call: ComponentCall) -> ComponentAnswer:
    args, kwargs, global_state = unpack(call.arguments, stage.device)
    with PIPELINE_CODE, pipeline_errors():
        torch.set_rng_state(global_state)
        output = function(*args, **kwargs)
        states = [generator.get_state() for generator in _generators((args, kwargs))]
        return ComponentAnswer(pack((without_opaque(output), states, torch.get_rng_state())))


def _function(stage: StagePipeline, call: ComponentCall) -> Any:
    if call.component.startswith(PIPELINE):
        if call.method not in ENCODING_METHODS:
            raise HandOffError(f"{call.component}.{call.method} cannot be called from another stage")
        owner: Any = stage.pipeline
        for name in call.component.split(".")[1:]:
            owner = getattr(owner, name)
        private = copy.copy(owner)
        device = property(lambda _: stage.device)
        members = {"_execution_device": device, "device": device, "__module__": type(owner).__module__}
        private.__class__ = type(type(owner).__name__, (type(owner),), members)
        return getattr(private, call.method)
    component = stage.components.get(call.component)
    if component is None or not is_routed(component, call.method):
        raise HandOffError(f"{call.component}.{call.method} cannot be called in this stage")
    return function_of(component, call.method)


def _generators(value: Any) -> list[torch.Generator]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Generator)]
