"""The VAE stage: the pipeline runs to its end on NaN, with the true arguments injected at the decoder calls.

Whatever is computed from missing numbers is NaN. The session checks that the events come in the recorded
order, that every handed-over argument is used, and that nothing decoded or returned contains NaN, so a
pipeline that does not fit raises an error and never returns a wrong picture: one that decides by numbers or samples
with them, or that returns them. Remote calls serve it.
"""

from __future__ import annotations

from typing import Any

import torch

from deployments.errors import (
    HandOffError,
    HandOffIncompleteError,
    NotNumbersError,
    PipelineFailedError,
    TriptychError,
)
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.pipeline_errors import told
from deployments.stage_pipeline.sessions.denoise import HandOff, stage_of_call
from deployments.stage_pipeline.sessions.session import Session
from deployments.tensors.global_generators import global_states, moved_states
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.tensors.values import fill, has_nan, leaves, map_values


class DecodeSession(Session):
    """One request's decoding."""

    def __init__(self, stage: StagePipeline, arguments: dict[str, Any], seed: int, hand_off: HandOff) -> None:
        super().__init__(stage, arguments, seed)
        self.to_replay = list(hand_off.encoder_calls)
        self.events = list(hand_off.events)
        self.decoder_calls = list(hand_off.decoder_calls)
        self.descriptions = hand_off.descriptions
        self._failed_inside = False  # a component's own call, on true numbers

    def run(self) -> Any:
        """The pipeline's output.

        Raises HandOffError or HandOffIncompleteError where it would not be true, NotNumbersError where it is none.
        """
        output = self._called_on_missing_numbers()
        if self.to_replay or self.events or self.decoder_calls:
            raise HandOffError(f"the hand-off was not used up: {len(self.events)} events are left")
        if has_nan(dict(output) if hasattr(output, "keys") else output):
            raise HandOffIncompleteError("the result depends on numbers that were not handed over")
        return output

    def _called_on_missing_numbers(self) -> Any:
        """What its code raises on them says nothing of the request: remote calls show whether it fails on true ones."""
        try:
            return self.call_pipeline()
        except torch.AcceleratorError:
            raise
        except Exception as error:
            is_on_purpose = isinstance(error, TriptychError) and not isinstance(error, PipelineFailedError)
            says_nothing = isinstance(error, NotNumbersError) or is_out_of_memory(error)
            if self._failed_inside or is_on_purpose or says_nothing:
                raise
            raise HandOffError(f"its code fails on numbers that were not handed over: {told(error)}") from error

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        if not self.events or self.events[0][:2] != ("denoiser", component):
            raise HandOffIncompleteError(f"{component} is called again after the hand-off")
        return fill(self.descriptions[self.events.pop(0)[2]], self.stage.device)

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        return self.on_denoiser_forward(f"{component}.{method}", None, args, kwargs)

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if self._inside:
            return self.call_inside(component, function, args, kwargs)
        if self.to_replay:
            return self._replay(component, method)
        if self.events:
            args, kwargs = self._injected(component, method, args, kwargs)
        if has_nan((args, kwargs)):
            raise HandOffIncompleteError(f"{component}.{method} was not handed over and depends on missing numbers")
        if stage_of_call(self.stage, component, method) != "vae":
            raise HandOffError(f"{component}.{method} is needed after the hand-off")
        output = self._call_truly(component, method, function, args, kwargs)
        if has_nan(output):
            raise NotNumbersError
        return output

    def _call_truly(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        """Beside the code of other requests, once such a call has shown that it leaves their random numbers alone."""
        call = component, method
        try:
            if call in self.stage.quiet_calls:
                return self.call_beside(component, function, args, kwargs)
            before = global_states(self.device)
            output = self.call_inside(component, function, args, kwargs)
        except Exception:
            self._failed_inside = True
            raise
        if not moved_states(before, global_states(self.device)):
            self.stage.quiet_calls.add(call)
        return output

    def _replay(self, component: str, method: str) -> Any:
        call = self.to_replay.pop(0)
        if (call.component, call.method) != (component, method):
            raise HandOffError(f"{call.component}.{call.method} was recorded, but {component}.{method} is called")
        if call.random_states:
            self.set_random_states(call.random_states)
        self.hooks.tell_again(fill(call.hooks, self.stage.device), self.stage.pipeline)
        return fill(call.output, self.stage.device)

    def _injected(self, component: str, method: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
        event = self.events.pop(0)
        if event != ("decoder", component, method):
            raise HandOffError(f"expected {event}, but {component}.{method} is called")
        call = self.decoder_calls.pop(0)
        if call.args is None:
            return args, kwargs
        for leaf in leaves((call.args, call.kwargs)):
            if isinstance(leaf, torch.Generator):
                self.generator.set_state(leaf.get_state())
        return map_values(self._own_generator, call.args), map_values(self._own_generator, call.kwargs)

    def _own_generator(self, value: Any) -> Any:
        return self.generator if isinstance(value, torch.Generator) else value
