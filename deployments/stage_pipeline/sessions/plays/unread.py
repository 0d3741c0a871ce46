"""Recorded outputs whose numbers nobody needs: they only feed encoder calls that were recorded after them.

A prompt encoder may return every layer of a language model for a small connector behind it, and both are on the tape.
Such an output travels without its numbers. Whether it is one is told by a play of the pipeline: with NaN in its place,
it must end as with the numbers, and no NaN may come to a model, a scheduler or the output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.encode import EncoderCall
from deployments.stage_pipeline.sessions.plays.play import PlaySession
from deployments.tensors.values import PLAIN, copied, describe, has_nan, tensors, with_nan

FEW_STEPS = 8  # of the play: none of them computes a forward
SIZES_OF_A_KIND = 1000  # kinds of requests that are remembered

Arguments = dict[str, Any]


class ReadError(Exception):
    """The numbers are needed."""


def without_unread(stage: StagePipeline, arguments: Arguments, calls: Sequence[EncoderCall]) -> list[EncoderCall]:
    """The calls, those outputs described whose numbers nobody needs. `arguments`: the request's, decoded."""
    unread = unread_outputs(stage, arguments, calls)
    return [_described(call) if index in unread else call for index, call in enumerate(calls)]


def unread_outputs(stage: StagePipeline, arguments: Arguments, calls: Sequence[EncoderCall]) -> frozenset[int]:
    """Which calls' outputs nobody needs; played once for each kind of request and its settings."""
    kind = (tuple((call.component, call.method) for call in calls), tuple(sorted(arguments)))
    read = stage.read_outputs.setdefault(kind, set())
    candidates = [
        index
        for index, call in enumerate(calls[:-1])
        if index not in read and not call.hooks and any(each.is_floating_point() for each in tensors(call.output))
    ]
    if not candidates:
        return frozenset()
    key = (kind, tuple((name, _setting(arguments[name])) for name in sorted(arguments)))
    if key not in stage.unread_outputs:
        if len(stage.unread_outputs) >= SIZES_OF_A_KIND:
            stage.unread_outputs.clear()
        found = [index for index in candidates if _is_unread(stage, arguments, calls, frozenset({index}))]
        read.update(set(candidates) - set(found))
        together = frozenset(found)
        is_unread = len(found) < 2 or _is_unread(stage, arguments, calls, together)
        stage.unread_outputs[key] = together if is_unread else frozenset()
    return stage.unread_outputs[key]


def _setting(value: Any) -> Any:
    """What decides the way of a request through its pipeline's code; texts and pictures do not."""
    if isinstance(value, str) or not isinstance(value, PLAIN):
        return type(value).__name__
    return value


def _is_unread(
    stage: StagePipeline, arguments: Arguments, calls: Sequence[EncoderCall], missing: frozenset[int]
) -> bool:
    steps = {
        name: min(n, FEW_STEPS) for name, n in arguments.items() if "inference_steps" in name and isinstance(n, int)
    }
    few = arguments | steps
    try:
        return _Replay(stage, few, calls, missing).run() == _Replay(stage, few, calls, frozenset()).run()
    except Exception:  # noqa: BLE001  (ReadError, or whatever NaN make the pipeline raise: then all is sent)
        return False


class _Replay(PlaySession):
    """A play in which the recorded calls are played back; ends in ReadError where missing numbers are needed."""

    def __init__(
        self, stage: StagePipeline, arguments: Arguments, calls: Sequence[EncoderCall], missing: frozenset[int]
    ) -> None:
        super().__init__(stage, arguments, {})
        self.calls = calls
        self.missing = missing
        self.position = 0

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        _refuse_nan((args, kwargs))
        return super().on_denoiser_forward(component, real, args, kwargs)

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        _refuse_nan((args, kwargs))
        return super().on_denoiser_method(component, method, function, args, kwargs)

    def on_scheduler_step(self, scheduler: Any, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        _refuse_nan((args, kwargs))
        return super().on_scheduler_step(scheduler, step, args, kwargs)

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if self._inside:
            return function(*args, **kwargs)
        if self.position < len(self.calls):
            return self._played_back(component, method)
        _refuse_nan((args, kwargs))
        if self._is_real(component, method):
            raise ReadError  # by a call that was not recorded
        return self._played(component, method, args, kwargs)

    def _played_back(self, component: str, method: str) -> Any:
        index, call = self.position, self.calls[self.position]
        if (call.component, call.method) != (component, method):
            raise ReadError
        self.position += 1
        if call.random_states:
            self.set_random_states(call.random_states)
        if index in self.missing:
            return with_nan(describe(call.output), self.stage.device)
        return copied(call.output)

    def _is_real(self, component: str, method: str) -> bool:
        return component not in self.stage.layout.models or super()._is_real(component, method)

    @torch.no_grad()
    def call_pipeline(self) -> Any:
        output = super().call_pipeline()
        _refuse_nan(dict(output) if hasattr(output, "keys") else output)
        return output


def _refuse_nan(value: Any) -> None:
    if has_nan(value):
        raise ReadError


def _described(call: EncoderCall) -> EncoderCall:
    return EncoderCall(call.component, call.method, describe(call.output), call.random_states, call.hooks)
