"""The denoiser stage: recorded encoder calls are replayed, denoisers run, decoder calls are handed over.

A decoder call is not made here. It is noted with its arguments for the VAE stage. With one decoder the
stage then ends; the complete hand-off answers it with a tensor of the right shape and no numbers and goes
on, so that several decoders and later rounds of denoising are noted too. If a tensor without numbers
flows back into a denoiser or an encoder, that is seen and refused: remote calls serve such a pipeline.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from deployments.errors import (
    FeedsBackError,
    HandOffError,
    NotNumbersError,
    NotSupportedError,
    PipelineFailedError,
    TriptychError,
)
from deployments.messages import StageName
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.encode import NO_STEP, EncoderCall
from deployments.stage_pipeline.sessions.session import PIPELINE, Session, StopStage
from deployments.stage_pipeline.shapes import output_description
from deployments.tensors.draws import draws_of_call, without_draws
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.tensors.promise import plain_tensors
from deployments.tensors.values import (
    copied,
    describe,
    fill_meta,
    has_gradients,
    has_nan,
    is_meta,
    same_description,
    with_nan,
)

RunDenoiser = Callable[[Any, str, tuple[Any, dict[str, Any]] | None, Any, Any], Any]
CallRemotely = Callable[["DenoiseSession", StageName, str, str, Any, Any], Any]
OnProgress = Callable[[int, int], None]


class StepFollower(Protocol):
    """Sees each scheduler step before and after it is made (previews)."""

    def clean_latents(self, session: DenoiseSession, scheduler: Any, args: Any, kwargs: Any) -> torch.Tensor | None: ...

    def show(self, session: DenoiseSession, latents: torch.Tensor, step_output: Any) -> None: ...


@dataclass(frozen=True)
class DecoderCall:
    """A call for the VAE stage to make; args None: they depend on an earlier decoder call and are made there."""

    component: str
    method: str
    args: Any
    kwargs: Any


@dataclass
class HandOff:
    """What the VAE stage needs to run the same `__call__` to its end."""

    encoder_calls: list[EncoderCall]  # outputs described, without numbers
    events: list[tuple[str, str, Any]] = field(
        default_factory=list
    )  # ("denoiser", name, i) | ("decoder", name, method)
    descriptions: list[Any] = field(default_factory=list)  # of denoiser outputs; events refer to them by index
    decoder_calls: list[DecoderCall] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """The pipeline's own output, where nothing is left to decode."""

    output: Any


class DenoiseSession(Session):
    """One request's denoising loop.

    Parameters
    ----------
    calls: the encoder stage's record; None where encoders are called as needed (in this process or remotely).
    run_denoiser: (module, name, cache context, args, kwargs) -> output, called without holding PIPELINE_CODE; the
        output may be promises (deployments.tensors.promise), which no component is given. None: call the module.
    call_remotely: makes a call in the stage that holds the component; None: decoder calls are handed over.
    hands_over: decoder calls are left to another thread also where the decoders are in this process.
    complete: note every decoder call instead of ending at the first.
    on_progress: told (steps done, steps that the request makes) after each scheduler step.
    num_steps: how many it makes, where that was counted; else it is told by the pipeline and its scheduler.
    previews: shows some of the steps.
    """

    def __init__(
        self,
        stage: StagePipeline,
        arguments: dict[str, Any],
        seed: int,
        calls: list[EncoderCall] | None,
        run_denoiser: RunDenoiser | None = None,
        call_remotely: CallRemotely | None = None,
        hands_over: bool = False,
        complete: bool = False,
        on_progress: OnProgress | None = None,
        previews: StepFollower | None = None,
        num_steps: int | None = None,
    ) -> None:
        super().__init__(stage, arguments, seed)
        self.replayed = list(calls or [])
        self.to_replay = list(calls or [])
        self.run_denoiser = run_denoiser
        self.call_remotely = call_remotely
        self.hands_over = call_remotely is None and (hands_over or "vae" not in stage.stages)
        self.ends_at_first = not complete and len(stage.layout.decoders) == 1
        self.on_progress = on_progress
        self.previews = previews
        self.num_steps = num_steps
        self.hand_off = HandOff([])

    def run(self) -> HandOff | Result:
        """Raises HandOffError where the pipeline does not fit, PipelineFailedError for what its arguments may cause."""
        outcome = self._outcome()
        if self.stage.layout.denoisers and not any(kind == "denoiser" for kind, *_ in self.hand_off.events):
            raise PipelineFailedError(NO_STEP)
        return outcome

    def _outcome(self) -> HandOff | Result:
        try:
            output = self.call_pipeline()
        except StopStage:
            return self._finished_hand_off()
        except (HandOffError, NotNumbersError):
            raise
        except Exception as error:
            is_on_purpose = isinstance(error, TriptychError) and not isinstance(error, PipelineFailedError)
            if is_on_purpose or isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
                raise  # of the engine or the device, in a later round
            # After a deferred decoder call the rest is post-processing of a tensor without numbers, which
            # may fail. The VAE stage checks that nothing was cut off.
            if not self.hand_off.decoder_calls:
                raise
            return self._finished_hand_off()
        return self._finished_hand_off() if self.hand_off.decoder_calls else Result(plain_tensors(output))

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = plain_tensors((args, kwargs))  # of another denoiser's output: `forward` may answer promises
        self._refuse_feedback(component, args, kwargs)
        output = self.forward(component, real, args, kwargs)
        self.note_denoiser_output(component, output)
        return output

    def forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        """The denoiser's output, computed by `run_denoiser` or here."""
        context = self.contexts.get(component)
        if self.run_denoiser is None:
            with self.rewired(component), without_draws():
                return call_directly(real, component, context, args, kwargs)
        with self.waiting():
            return self.run_denoiser(real, component, context, args, kwargs)

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = plain_tensors((args, kwargs))
        with self.rewired(component):
            output = function(*args, **kwargs)
        self.note_denoiser_output(f"{component}.{method}", output)
        return output

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if self._inside:
            return self.call_inside(component, function, args, kwargs)
        args, kwargs = plain_tensors((args, kwargs))
        if self.to_replay:
            return self._replay(component, method)
        stage = stage_of_call(self.stage, component, method)
        is_left_to_others = stage == "vae" and self.hands_over
        if stage in self.stage.stages and not is_left_to_others:
            return self.call_inside(component, function, args, kwargs)
        if self.hooks.are_on(component):
            raise self._not_to_be_left(stage, f"{component}.{method} has a hook, and is called where it is not")
        if has_gradients((args, kwargs)):
            raise self._not_to_be_left(
                stage,
                f"{type(self.pipeline).__name__} differentiates through {component}.{method}, which another process "
                "makes: it can only be served in one process (placement: one_stage)",
            )
        if self.call_remotely:
            return self.call_remotely(self, stage, component, method, args, kwargs)
        if stage == "encoder":
            self._refuse_feedback(f"{component}.{method}", args, kwargs)
            raise FeedsBackError(f"{component}.{method} is called after the denoising has begun")
        if not self.hand_off.events:
            raise FeedsBackError(f"{component}.{method} is called before the denoising has begun")
        return self._defer(component, method, args, kwargs)

    def _not_to_be_left(self, stage: StageName, why: str) -> Exception:
        """A call that nobody else can make: this process, where it can."""
        return FeedsBackError(why) if stage in self.stage.stages else NotSupportedError(why)

    def on_scheduler_step(self, scheduler: Any, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        args, kwargs = plain_tensors((args, kwargs))
        latents = self.previews.clean_latents(self, scheduler, args, kwargs) if self.previews else None
        output = super().on_scheduler_step(scheduler, step, args, kwargs)
        if self.previews and latents is not None:
            self.previews.show(self, latents, output)
        if self.on_progress:
            self.on_progress(self.steps_done, self.all_steps(scheduler))
        return output

    def all_steps(self, scheduler: Any) -> int:
        """Scheduler steps that this request makes, those that are done among them."""
        return max(self.num_steps or steps_of_loop(self.pipeline, scheduler), self.steps_done)

    def note_denoiser_output(self, name: str, output: Any) -> None:
        description = describe(output)
        known = self.hand_off.descriptions
        index = next((i for i, d in enumerate(known) if same_description(d, description)), len(known))
        if index == len(known):
            known.append(description)
        self.hand_off.events.append(("denoiser", name, index))

    def _replay(self, component: str, method: str) -> Any:
        index = len(self.replayed) - len(self.to_replay)
        call = self.to_replay.pop(0)
        if (call.component, call.method) != (component, method):
            raise HandOffError(
                f"the encoder stage recorded {call.component}.{call.method}, but {component}.{method} is called"
            )
        if call.random_states:
            self.set_random_states(call.random_states)
        self.hooks.tell_again(copied(call.hooks), self.stage.pipeline)
        if self.previews is not None:  # they play it back again, and the pipeline may change it
            return with_nan(copied(call.output), self.stage.device)
        self.replayed[index] = described_call(call)  # before the pipeline has it; the tape keeps no numbers for nobody
        return with_nan(call.output, self.stage.device)

    def _refuse_feedback(self, name: str, args: Any, kwargs: Any) -> None:
        if self.hand_off.decoder_calls and is_meta((args, kwargs)):
            first = self.hand_off.decoder_calls[0]
            raise FeedsBackError(f"the output of {first.component}.{first.method} feeds back into {name}")

    def _defer(self, component: str, method: str, args: Any, kwargs: Any) -> Any:
        depends = is_meta((args, kwargs))
        # No copy where the pipeline ends here and changes nothing any more: it may be a long video's latents.
        noted = (None, None) if depends else (args, kwargs) if self.ends_at_first else copied((args, kwargs))
        self.hand_off.events.append(("decoder", component, method))
        self.hand_off.decoder_calls.append(DecoderCall(component, method, *noted))
        if self.ends_at_first:
            raise StopStage
        skeleton, own = getattr(self.stage.pipeline, component), self.own_component(component)
        return fill_meta(output_description(self.stage, skeleton, component, method, args, kwargs, own))

    def _finished_hand_off(self) -> HandOff:
        self.hand_off.encoder_calls = [described_call(call) for call in self.replayed]
        return self.hand_off


def check_numbers(hand_off: HandOff) -> None:
    """Raises NotNumbersError. Seen before the VAE stage, where NaN stands for what was not handed over."""
    if has_nan([[call.args, call.kwargs] for call in hand_off.decoder_calls]):
        raise NotNumbersError


def described_call(call: EncoderCall) -> EncoderCall:
    """Without the numbers that only a real stage has."""
    return EncoderCall(call.component, call.method, describe(call.output), call.random_states, describe(call.hooks))


def steps_of_loop(pipeline: Any, scheduler: Any) -> int:
    """Steps of the loop that runs: with `strength` the pipeline makes only the later ones of the schedule."""
    counted = getattr(pipeline, "_num_timesteps", None)
    if isinstance(counted, int) and counted > 0:
        return counted
    return max(0, len(getattr(scheduler, "timesteps", ())) - (getattr(scheduler, "_begin_index", None) or 0))


def stage_of_call(stage: StagePipeline, component: str, method: str) -> StageName:
    """Which stage makes this call of an encoder or a decoder."""
    encodes = component.startswith(PIPELINE) or method.startswith("encode")
    return "encoder" if encodes or "vae" not in stage.layout.stages_of[component] else "vae"


def call_directly(real: Any, name: str, context: tuple[Any, dict[str, Any]] | None, args: Any, kwargs: Any) -> Any:
    """The denoiser's forward in the cache context that the pipeline entered."""
    entered = (
        real.cache_context(context[0], **context[1])
        if context and hasattr(real, "cache_context")
        else contextlib.nullcontext()
    )
    with entered, draws_of_call(args, kwargs):
        return real(*args, **kwargs)
