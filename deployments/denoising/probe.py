"""Learns the batch axes of each denoiser: the same request for one and for two samples, shapes compared."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

from deployments.engine.batching.axes import BatchAxes, axes_of_calls, has_batch_axis, num_batch_axes
from deployments.engine.forward import bind
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, RunDenoiser
from deployments.stage_pipeline.sessions.encode import EncoderCall
from deployments.stage_pipeline.sessions.session import StopStage

logger = logging.getLogger(__name__)

MAX_FORWARDS = 400  # a denoiser that was not called by then is not called for such a request

Arguments = dict[str, Any]
Encode = Callable[[Arguments], list[EncoderCall]]
FirstCalls = dict[str, tuple[Arguments, Any]]  # denoiser -> (bound arguments, output) of its first forward


def learn_batch_axes(
    stage: StagePipeline,
    arguments: Arguments,
    encode: Encode,
    decoded: Callable[[Arguments], Arguments],
    run_denoiser: RunDenoiser,
) -> dict[str, BatchAxes]:
    """The axes of each denoiser that such a request calls; empty where two samples cannot be made at once.

    `encode` runs the encoder stage, `decoded` turns the pictures among the arguments into what the pipeline takes,
    `run_denoiser` hands each forward to the engine, which owns the device.
    """
    one = _Probe(stage, decoded(arguments), encode(arguments), run_denoiser).first_calls()
    best: dict[str, BatchAxes] = {}
    for doubled in _two_samples(type(stage.pipeline), arguments):
        try:
            two = _Probe(stage, decoded(doubled), encode(doubled), run_denoiser).first_calls()
        except Exception as error:  # noqa: BLE001  (a way that this pipeline does not know)
            logger.info("%s makes no two samples so: %s", type(stage.pipeline).__name__, error)
            continue
        learned = {name: axes_of_calls(one[name], two[name]) for name in one if name in two}
        if all(map(has_batch_axis, learned.values())) and num_batch_axes(learned) > num_batch_axes(best):
            best = learned
    return best


class _Probe(DenoiseSession):
    """Stops as soon as every denoiser was called."""

    def __init__(
        self, stage: StagePipeline, arguments: Arguments, calls: list[EncoderCall], run_denoiser: RunDenoiser
    ) -> None:
        super().__init__(stage, arguments, 0, calls, run_denoiser)
        self.seen: FirstCalls = {}
        self.forwards = 0

    def first_calls(self) -> FirstCalls:
        with contextlib.suppress(StopStage):
            self.call_pipeline()
        return self.seen

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        output = self.forward(component, real, args, kwargs)
        self.forwards += 1
        self.seen.setdefault(component, (bind(real, args, kwargs), output))
        if len(self.seen) == len(self.stage.layout.denoisers) or self.forwards >= MAX_FORWARDS:
            raise StopStage
        return output

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if not self._inside and not self.to_replay:
            raise StopStage
        return super().on_component_call(component, method, function, args, kwargs)


def _two_samples(pipeline_class: type, arguments: Arguments) -> Iterator[Arguments]:
    """The same request for two samples, in the ways that pipelines know."""
    for name in inspect.signature(pipeline_class.__call__).parameters:
        if name.startswith("num_") and name.endswith("_per_prompt"):
            yield {**arguments, name: 2}
    prompts = {n: [arguments[n]] * 2 for n in ("prompt", "negative_prompt") if isinstance(arguments.get(n), str)}
    if prompts:
        yield {**arguments, **prompts}
