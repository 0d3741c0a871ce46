"""The encoder stage: the pipeline runs with real encoders, and the outcome of each of their calls is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.errors import PipelineFailedError
from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.hooks import Told
from deployments.stage_pipeline.sessions.reading import TextsRead
from deployments.stage_pipeline.sessions.session import PIPELINE, RandomStates, Session, StopStage
from deployments.stage_pipeline.shapes import output_description
from deployments.tensors.global_generators import GlobalStates, moved_states
from deployments.tensors.values import copied, fill, has_nan

NO_STEP = "it makes no step: num_inference_steps x strength, or a list of steps, leaves none"


MovedStates = tuple[torch.Tensor | None, GlobalStates]  # None, or not among them: left alone


@dataclass(frozen=True)
class EncoderCall:
    """A recorded call: which component, what it returned, the generators it moved (None: left alone), hooks told."""

    component: str
    method: str
    output: Any
    random_states: MovedStates | None
    hooks: list[Told] = field(default_factory=list)


class EncodeSession(Session):
    """Runs until the first forward of a denoiser, or without one until the first decoding.

    It ends sooner where a component is called whose weights are elsewhere, or that needs numbers of a denoiser: the
    denoiser stage then asks for this call and those that follow it. `texts` knows afterwards what was not read.
    """

    def __init__(self, stage: StagePipeline, arguments: dict[str, Any], seed: int) -> None:
        parameters, _ = call_parameters(type(stage.pipeline))
        length = arguments.get("max_sequence_length", parameters.get("max_sequence_length"))
        self.texts = TextsRead(arguments, length if isinstance(length, int) else None)
        super().__init__(stage, arguments, seed)
        self._has_missing = False  # numbers of a denoiser

    def on_text(self, text: str, tokens: int, limit: int | None, count: Callable[[str], int]) -> None:
        self.texts.note(text, tokens, limit, count)

    def run(self) -> list[EncoderCall]:
        """Raises PipelineFailedError where the pipeline never comes to its denoiser: there is no step to make."""
        self.calls: list[EncoderCall] = []
        try:
            self.call_pipeline()
        except StopStage:
            return self.calls
        if not self.stage.layout.denoisers:
            return self.calls
        raise PipelineFailedError(NO_STEP)

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        raise StopStage

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if self.stage.is_here(component):
            return function(*args, **kwargs)
        real = getattr(self.stage.pipeline, component)
        self._has_missing = True
        return fill(output_description(self.stage, real, component, method, args, kwargs), self.stage.device)

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if self._inside:
            return self.call_inside(component, function, args, kwargs)
        layout = self.stage.layout
        decodes = not layout.denoisers and component in layout.decoders and not method.startswith("encode")
        if decodes or not self._is_here(component, method) or (self._has_missing and has_nan((args, kwargs))):
            raise StopStage
        before = self.random_states()
        output = self.call_inside(component, function, args, kwargs)
        moved = _moved(before, self.random_states())
        # A copy: the pipeline may go on with it in place, and what the call returned is played back.
        self.calls.append(EncoderCall(component, method, copied(output), moved, self.hooks.take_told()))
        return output

    def _is_here(self, component: str, method: str) -> bool:
        if component.startswith(PIPELINE):
            return True
        has_no_decoder = self.stage.stages == ("encoder",) and component in self.stage.layout.autoencoders
        return self.stage.is_here(component) and not (has_no_decoder and method.startswith("decode"))


def _moved(before: RandomStates, after: RandomStates) -> MovedStates | None:
    # Some encoders sample (a caption, a posterior): the replay must leave the generators as the real call did.
    moved = None if torch.equal(before[0], after[0]) else after[0], moved_states(before[1], after[1])
    return None if moved == (None, {}) else moved
