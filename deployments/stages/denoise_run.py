"""One request's way through the denoiser stage: its fiber, its session, and what its follower is told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deployments.accelerations.compiled_forwards import CompiledForwards
from deployments.denoising.checkpoint import ResumableSession, make_checkpoint
from deployments.denoising.measurements import CheckpointMade, Measure, Resumed
from deployments.denoising.preview import Previews, first_frame
from deployments.denoising.wiring import SharedWiring
from deployments.engine.engine import Engine
from deployments.engine.fiber import Fiber
from deployments.engine.forward import bind
from deployments.errors import (
    CannotResumeError,
    FeedsBackError,
    GenerationFailedError,
    InvalidRequestError,
    PipelineFailedError,
)
from deployments.features.feature import Summary
from deployments.features.in_use import FeaturesInUse, Wanted, begin_features
from deployments.messages import (
    Checkpoint,
    Conditioning,
    DecodeInputs,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    Packed,
)
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.hand_off import pack_outcome
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.denoise import CallRemotely, HandOff, Result
from deployments.stage_pipeline.sessions.encode import EncoderCall
from deployments.stages.encode import call_arguments, unpack_conditioning

# Raised on the way to a checkpoint's step, these say nothing of the checkpoint.
NOT_OF_A_RESUME = (
    InvalidRequestError,
    FeedsBackError,
    GenerationFailedError,
    torch.OutOfMemoryError,
    torch.AcceleratorError,
)
DEFAULT_SLACK = 3.0  # times its own predicted duration that a request without a deadline is given


@dataclass(frozen=True)
class DenoisingFollower:
    """What the caller of one request is told while it runs, in the engine's thread.

    Checkpoints and previews are made only for a follower that takes them.
    """

    started: Callable[[DenoiseRun], None] | None = None
    progress: Callable[[DenoisingProgress], None] | None = None  # after each scheduler step
    checkpoint: Callable[[Checkpoint], None] | None = None
    preview: Callable[[int, DecodeInputs], None] | None = None  # steps done, and what to decode


NO_FOLLOWER = DenoisingFollower()


@dataclass(frozen=True)
class SharedByRuns:
    """What all requests of a denoiser stage share."""

    stage: StagePipeline
    args: DenoisingArgs
    engine: Engine
    wiring: SharedWiring
    measure: Measure
    recent_summaries: dict[str, deque[dict[str, Any]]]  # of each feature, what it did for the latest requests
    compiled: CompiledForwards


class DenoiseRun:
    """One request's way through the stage; `fiber` and `session` show where it stands."""

    session: ResumableSession

    def __init__(
        self,
        denoiser: SharedByRuns,
        request: GenerationRequest,
        conditioning: Conditioning,
        wanted: Wanted,
        fingerprint: str,
        envelope: Envelope,
        follower: DenoisingFollower,
    ) -> None:
        self.denoiser = denoiser
        self.request = request
        self.conditioning = conditioning
        self.wanted = wanted
        self.fingerprint = fingerprint
        self.envelope = envelope
        self.follower = follower
        self.features = FeaturesInUse({})
        self.num_steps = 0
        self.forwards_a_step = 1.0
        self.started = time.monotonic()
        self.fiber = Fiber(
            request.request_id,
            deterministic=request.deterministic or denoiser.args.deterministic,
            remaining_forwards=self.remaining_forwards,
        )
        if request.deadline_s is not None:
            self.fiber.deadline = self.fiber.expires = self.started + request.deadline_s
        self._checked: set[str] = set()

    def run(self, call_remotely: CallRemotely | None, resume_from: Packed | None) -> DecodeInputs:
        """In the engine's thread, by turns with other requests; the caller's waits."""
        engine, self.features = self.denoiser.engine, FeaturesInUse({})
        engine.begin(self.fiber)
        try:
            # In this thread: what was sent may be large pictures, and to decode one can take a second.
            arguments = call_arguments(self.denoiser.stage, self.request)
            calls = unpack_conditioning(self.conditioning, self.denoiser.stage)
            outcome = engine.call(self.fiber, lambda: self._run(arguments, calls, call_remotely, resume_from))
        finally:
            engine.end(self.fiber)
            for name, summary in self.features.summaries().items():
                self._note_summary(name, summary)
        return self._packed(outcome, self.session.steps_done)

    def _run(
        self,
        arguments: dict[str, Any],
        calls: list[EncoderCall],
        call_remotely: CallRemotely | None,
        resume_from: Packed | None,
    ) -> HandOff | Result:
        self.session = ResumableSession(
            self.denoiser.stage,
            arguments,
            self.request.seed,
            calls,
            run_denoiser=self._forward,
            call_remotely=call_remotely,
            complete=self.envelope.complete_hand_off,
            on_progress=self._note_progress,
            on_checkpoint=self._note_checkpoint if self.follower.checkpoint else None,
            every=self.denoiser.args.checkpoint_every,
            resume_from=resume_from,
            feature_states=lambda: self.features.snapshot(),
            previews=self._previews() if call_remotely is None else None,
            num_steps=self.request.num_steps,
        )
        self.features = begin_features(self.wanted, self.session)
        if resume_from is not None:
            self.denoiser.measure(Resumed(self.session.resumed_at))
        if self.follower.started:
            self.follower.started(self)
        try:
            return self.session.run()
        except Exception as error:
            is_of_the_resume = isinstance(error, PipelineFailedError) or not isinstance(error, NOT_OF_A_RESUME)
            if self.session.is_resuming and is_of_the_resume:
                raise CannotResumeError(f"the steps before {self.session.resumed_at} cannot be skipped") from error
            raise

    def _forward(self, module: Any, component: str, context: Any, args: Any, kwargs: Any) -> Any:
        if component not in self._checked:
            self._checked.add(component)
            self.denoiser.wiring.check(component)
        around = self.features.surround(component, module)
        enter, merge_key = around.enter, around.merge_key
        if self.fiber.deterministic:
            enter, merge_key = self.denoiser.compiled.as_they_are(enter, merge_key)
        elif self.denoiser.compiled.compiles(component):
            self.denoiser.compiled.note(self.request.request_id, component, bind(module, args, kwargs))
        output = self.denoiser.engine.run(
            self.fiber, module, component, context, args, kwargs, enter, merge_key, around.by_position
        )
        if self.fiber.deadline is None:
            self._set_default_deadline()
        return output

    def remaining_forwards(self) -> int:
        """By the forwards that a step has taken so far; 0 after the last."""
        steps = self._all_steps() - self.session.resumed_at
        return max(0, round(steps * self.forwards_a_step) - self.fiber.forwards)

    def _set_default_deadline(self) -> None:
        # A deadline that grows with the request's own work lets short ones pass long ones, and as time goes on
        # the slack of a long one shrinks below theirs: nobody starves. Not by the first forward itself, which a
        # warm-up or a full machine may have made slow: among equals it would go last.
        self.fiber.deadline = self.fiber.arrived + DEFAULT_SLACK * self.fiber.step_s * self._all_steps()

    def _all_steps(self) -> int:
        """As counted at the door; else as the request says before its scheduler does."""
        steps = self.num_steps or self.request.num_steps
        return steps or int(self.request.arguments.get("num_inference_steps") or 1)

    def _previews(self) -> Previews | None:
        """Of pipelines that need other stages in their loop there are none."""
        preview = self.follower.preview
        if preview is None or not self.envelope.previews:
            return None
        is_video = self.request.output.kind == "video"
        return Previews(
            self.envelope.previews,
            lambda step, outcome: preview(step, self._packed(first_frame(outcome) if is_video else outcome, step)),
        )

    def _packed(self, outcome: HandOff | Result, num_steps: int) -> DecodeInputs:
        return pack_outcome(outcome, num_steps, self.conditioning.warnings)

    def _note_progress(self, step: int, num_steps: int) -> None:
        self.num_steps = num_steps
        done = step - self.session.resumed_at
        if done > 0:
            self.forwards_a_step = self.fiber.forwards / done
        if self.follower.progress:
            left = num_steps - step
            eta = (time.monotonic() - self.started) / done * left if done > 0 else None
            self.follower.progress(DenoisingProgress(step, num_steps, eta))

    def _note_checkpoint(self, step: int, content: Packed) -> None:
        assert self.follower.checkpoint is not None
        started = time.perf_counter()
        self.follower.checkpoint(make_checkpoint(self.request, self.fingerprint, step, content))
        self.denoiser.measure(CheckpointMade(content.num_bytes, time.perf_counter() - started))

    def _note_summary(self, feature: str, summary: Summary) -> None:
        self.denoiser.recent_summaries[feature].append({"request_id": self.request.request_id, **summary.values})
        for measurement in summary.measurements:
            self.denoiser.measure(measurement)
