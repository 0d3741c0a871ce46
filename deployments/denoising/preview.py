"""Previews: what the VAE stage would be handed if the loop ended at this step.

No code per model: the noise that is left is taken away by the request's own scheduler, and the way from the
latents to the decoder (unpacking, scaling) is the pipeline's own, run from the top with nothing computed.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from deployments.stage_pipeline.outputs import own_arguments
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, HandOff, Result
from deployments.tensors.values import copied, fill, map_values

logger = logging.getLogger(__name__)

OnPreview = Callable[[int, HandOff | Result], None]  # steps done, and what to decode


class Previews:
    """The previews of one request: `count` of them, evenly spread over its steps.

    They draw no random numbers of the request and change none of its tensors. What cannot be shown of a
    pipeline is logged and left out: a preview never fails a request.
    """

    def __init__(self, count: int, on_preview: OnPreview) -> None:
        self.count = count
        self.on_preview = on_preview

    def steps(self, num_steps: int) -> set[int]:
        """The steps after which one is due, never the last: after that comes the picture itself."""
        return {round(num_steps * (i + 1) / (self.count + 1)) for i in range(self.count)} - {0, num_steps}

    def clean_latents(self, session: DenoiseSession, scheduler: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
        """Before a step of the scheduler: the latents without noise, as foreseen from here; None: not due."""
        num_steps = max(session.all_steps(scheduler), session.steps_done + 1)
        if session.steps_done + 1 not in self.steps(num_steps) or len(session.schedulers) > 1:  # a loop before others
            return None
        states = session.random_states()
        try:
            return clean_latents(scheduler, args, kwargs)
        except Exception as error:  # noqa: BLE001
            logger.info("no preview with %s: %s", type(scheduler).__name__, error)
            return None
        finally:
            session.set_random_states(states)

    def show(self, session: DenoiseSession, latents: torch.Tensor, step_output: Any) -> None:
        """After that step: runs the pipeline's own way from the latents to the decoder."""
        states = session.random_states()
        try:
            self.on_preview(session.steps_done, _ToTheDecoder(session, latents, step_output).run())
        except Exception as error:  # noqa: BLE001
            logger.info("no preview of %s: %s", type(session.stage.pipeline).__name__, error)
        finally:
            session.set_random_states(states)


def first_frame(outcome: HandOff | Result) -> HandOff | Result:
    """What to decode for the first frame of a video alone, at a fraction of the cost of all.

    diffusers' video decoders take latents as [B, C, frames, H, W], and the first of the causal ones stands for itself.
    What is decoded frame by frame ([frames, C, H, W]) stays whole.
    """
    if isinstance(outcome, Result):
        return outcome

    def cut(value: Any) -> Any:
        return value[:, :, :1] if isinstance(value, torch.Tensor) and value.ndim == 5 else value

    calls = [
        dataclasses.replace(call, args=map_values(cut, call.args), kwargs=map_values(cut, call.kwargs))
        for call in outcome.decoder_calls
    ]
    return dataclasses.replace(outcome, decoder_calls=calls)


class _ToTheDecoder(DenoiseSession):
    """The pipeline's `__call__` with every forward left out and every scheduler step answered by `latents`.

    It runs inside a step of `followed`, which holds PIPELINE_CODE.
    """

    def __init__(self, followed: DenoiseSession, latents: torch.Tensor, step_output: Any) -> None:
        calls = [dataclasses.replace(call, output=copied(call.output)) for call in followed.replayed]
        super().__init__(followed.stage, followed.arguments, followed.seed, calls, hands_over=followed.hands_over)
        self.latents = latents
        self.step_output = step_output
        noted = followed.hand_off
        self.outputs = {name: noted.descriptions[index] for kind, name, index in noted.events if kind == "denoiser"}
        self.last_output = noted.descriptions[noted.events[-1][2]]  # of a transformer whose turn has not come yet

    @torch.no_grad()
    def call_pipeline(self) -> Any:
        return self.pipeline(**own_arguments(type(self.stage.pipeline), self.generator) | self.arguments)

    def forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        return fill(self.outputs.get(component, self.last_output), self.stage.device)

    def on_scheduler_step(self, scheduler: Any, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        sample = inspect.signature(step).bind(*args, **kwargs).arguments["sample"]
        if sample.shape == self.latents.shape:  # else those of the sound beside the picture: as they are
            sample = self.latents
        return map_values(lambda value: sample if isinstance(value, torch.Tensor) else value, self.step_output)


def clean_latents(scheduler: Any, args: Any, kwargs: Any) -> torch.Tensor:
    """The scheduler's prediction of the clean sample from one output of the model.

    Multistep solvers (UniPC, DPM-Solver++) have a method for it; the others answer with it beside their step, or
    are asked for a step straight to a noise level of zero.
    """
    ahead = copy.deepcopy(scheduler)
    ahead.__dict__.pop("_session", None)  # the copy's steps are nobody's
    asked = dict(inspect.signature(type(scheduler).step).bind(ahead, *args, **kwargs).arguments)
    config = scheduler.config
    if getattr(config, "predict_x0", False) or str(getattr(config, "algorithm_type", "")).endswith("++"):
        _begin(ahead, asked["timestep"])
        return ahead.convert_model_output(asked["model_output"], sample=asked["sample"])  # type: ignore[no-any-return]
    if isinstance(getattr(ahead, "sigmas", None), torch.Tensor):
        _begin(ahead, asked["timestep"])
        ahead.sigmas = ahead.sigmas.clone()
        ahead.sigmas[ahead.step_index + 1 :] = 0
    output = ahead.step(*args, **{**kwargs, "return_dict": True})
    clean = getattr(output, "pred_original_sample", None)
    clean = output.prev_sample if clean is None else clean
    if not bool(clean.isfinite().all()):
        raise ArithmeticError("it knows no step to a noise level of zero")
    return clean  # type: ignore[no-any-return]


def _begin(scheduler: Any, timestep: Any) -> None:
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
