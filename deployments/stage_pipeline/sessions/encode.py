"""The encoder stage: the pipeline runs with real encoders, and the outcome of each of their calls is recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deployments.errors import PipelineFailedError
from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.reading import TextsRead
from deployments.stage_pipeline.sessions.session import RandomStates, Session, StopStage
from deployments.stage_pipeline.shapes import output_description
from deployments.tensors.values import fill


@dataclass(frozen=True)
class EncoderCall:
    """A recorded call: which component, what it returned, and the generators it moved (None: left alone)."""

    component: str
    method: str
    output: Any
    random_states: tuple[torch.Tensor | None, torch.Tensor | None] | None


class EncodeSession(Session):
    """Runs until the first forward of a denoiser, or without one until the first decoding.

    `texts` knows afterwards what was not read.
    """

    def __init__(self, stage: StagePipeline, arguments: dict[str, Any], seed: int) -> None:
        parameters, _ = call_parameters(type(stage.pipeline))
        length = arguments.get("max_sequence_length", parameters.get("max_sequence_length"))
        self.texts = TextsRead(arguments, length if isinstance(length, int) else None)
        super().__init__(stage, arguments, seed)

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
        raise PipelineFailedError("it makes no step: num_inference_steps x strength, or a list of steps, leaves none")

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        raise StopStage

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if self.stage.is_here(component):
            return function(*args, **kwargs)
        real = getattr(self.stage.pipeline, component)
        return fill(output_description(self.stage, real, component, method, args, kwargs), self.stage.device)

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if self._inside:
            return function(*args, **kwargs)
        layout = self.stage.layout
        if not layout.denoisers and component in layout.decoders and not method.startswith("encode"):
            raise StopStage
        before = self.random_states()
        output = self.call_inside(function, args, kwargs)
        self.calls.append(EncoderCall(component, method, output, _moved(before, self.random_states())))
        return output


def _moved(before: RandomStates, after: RandomStates) -> tuple[torch.Tensor | None, torch.Tensor | None] | None:
    # Some encoders sample (a caption, a posterior): the replay must leave the generators as the real call did.
    moved = (
        None if torch.equal(before[0], after[0]) else after[0],
        None if torch.equal(before[1], after[1]) else after[1],
    )
    return None if moved == (None, None) else moved
