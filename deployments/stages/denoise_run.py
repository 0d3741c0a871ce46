"""One request's way through the denoiser stage: its fiber, its session, and what its follower is told."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from deployments.accelerations.compiled_forwards import CompiledForwards
from deployments.denoising.checkpoint import ResumableSession, Snapshot, make_checkpoint
from deployments.denoising.measurements import CheckpointMade, Measure, Resumed
from deployments.denoising.pace import StepPace
from deployments.denoising.passes import GuidancePassesOfRequest, places_of
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
    NotNumbersError,
    PassesApartError,
    PipelineFailedError,
    ReplicaUnfitError,
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
    RequestWarning,
)
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.hand_off import pack_outcome
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.denoise import CallRemotely, HandOff, Result
from deployments.stage_pipeline.sessions.encode import EncoderCall
from deployments.stages.adapters import adapters_around, brought, uses_of
from deployments.stages.encode import call_arguments, unpack_conditioning
from deployments.tensors.copies import Moment, beside_forwards, queued_so_far
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.tensors.values import copied

logger = logging.getLogger(__name__)

PASSES = "guidance_passes"  # among what features keep in a checkpoint
# Raised on the way to a checkpoint's step, these say nothing of the checkpoint.
NOT_OF_A_RESUME = (
    InvalidRequestError,
    FeedsBackError,
    GenerationFailedError,
    PassesApartError,
    ReplicaUnfitError,
    torch.AcceleratorError,
)


@dataclass(frozen=True)
class DenoisingFollower:
    """What the caller of one request is told while it runs.

    Its beginning and progress in the engine's thread, checkpoints and previews in others, but before the end. They are
    made only for a follower that takes them.
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
    senders: Executor  # threads that fetch and pack what leaves the device while the loop goes on
    forwards_a_step: dict[tuple[str, ...], float] = field(default_factory=dict)  # of requests with such arguments


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
        self.passes: GuidancePassesOfRequest | None = None  # None: each as the pipeline asks for it
        self.passes_apart = denoiser.args.guidance_passes == "apart"
        self.num_steps = 0
        self.measured: list[object] = []  # by its features, at its end
        self.kind = tuple(sorted(request.arguments))
        self.forwards_a_step = denoiser.forwards_a_step.get(self.kind, 1.0)
        self.started = time.monotonic()
        self._pace = StepPace()
        self.fiber = Fiber(
            request.request_id,
            deterministic=request.deterministic or denoiser.args.deterministic,
            remaining_forwards=self.remaining_forwards,
        )
        if request.deadline_s is not None:
            self.fiber.deadline = self.fiber.expires = self.started + request.deadline_s
        self._checked: set[str] = set()
        self._leaving: list[Future[None]] = []  # checkpoints and previews on their way
        self._last_checkpoint: Future[None] | None = None

    @property
    def warnings(self) -> tuple[RequestWarning, ...]:
        """What the caller should know of how the loop was run."""
        return self.features.warnings

    def run(self, call_remotely: CallRemotely | None, resume_from: Packed | None) -> DecodeInputs:
        """In the engine's thread, by turns with other requests; the caller's waits."""
        engine, self.features = self.denoiser.engine, FeaturesInUse({})
        self._leaving, self._last_checkpoint = [], None  # of a first go, which ended
        self.fiber.forwards = 0
        engine.begin(self.fiber)
        try:
            # In this thread: what was sent may be large pictures, and to decode one can take a second.
            arguments = call_arguments(self.denoiser.stage, self.request)
            calls = unpack_conditioning(self.conditioning, self.denoiser.stage)
            outcome, moment = engine.call(self.fiber, lambda: self._run(arguments, calls, call_remotely, resume_from))
        except BaseException:
            for sending in self._leaving:
                sending.cancel()
            raise
        finally:
            engine.end(self.fiber)
            for name, summary in self.features.summaries().items():
                self._note_summary(name, summary)
        inputs = self._last_packed(outcome, moment, is_resumed=resume_from is not None)
        for sending in self._leaving:
            sending.result()
        return inputs

    def _run(
        self,
        arguments: dict[str, Any],
        calls: list[EncoderCall],
        call_remotely: CallRemotely | None,
        resume_from: Packed | None,
    ) -> tuple[HandOff | Result, Moment]:
        """What came out, and when the device will have made it."""
        self.session = ResumableSession(
            self.denoiser.stage,
            arguments,
            self.request.seed,
            calls,
            run_denoiser=self._forward,
            call_remotely=call_remotely,
            hands_over=True,
            complete=self.envelope.complete_hand_off,
            on_progress=self._note_progress,
            on_checkpoint=self._note_checkpoint if self.follower.checkpoint else None,
            every=self.denoiser.args.checkpoint_every,
            resume_from=resume_from,
            feature_states=self._feature_states,
            previews=self._previews() if call_remotely is None else None,
            num_steps=self.request.num_steps,
        )
        found = brought(self.denoiser.stage, uses_of(self.request))
        self.session.around_component = adapters_around(self.denoiser.stage, found)
        self.features = begin_features(self.wanted, self.session)
        self.passes = self._guidance_passes()
        try:
            return self._run_with_features(resume_from)
        finally:
            self.features.end()
            if self.passes is not None:
                self.passes.end()

    def _guidance_passes(self) -> GuidancePassesOfRequest | None:
        session = self.session
        if self.passes_apart or self.fiber.deterministic:
            return None
        return GuidancePassesOfRequest(
            self.denoiser.engine,
            self.fiber,
            self.denoiser.stage.device,
            lambda: session.steps_done,
            session.waiting,
            places_of(session.saved_features.get(PASSES)),
        )

    def _run_with_features(self, resume_from: Packed | None) -> tuple[HandOff | Result, Moment]:
        if resume_from is not None:
            self.denoiser.measure(Resumed(self.session.resumed_at))
        if self.follower.started:
            self.follower.started(self)
        try:
            with self.denoiser.stage.memory.steady(self.fiber.deterministic):
                return self.session.run(), queued_so_far(self.denoiser.stage.device)
        except Exception as error:
            says_nothing = isinstance(error, NOT_OF_A_RESUME) or is_out_of_memory(error)
            is_of_the_resume = isinstance(error, PipelineFailedError) or not says_nothing
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
        settings = enter, merge_key, around.by_position, around.per_sample
        if self.passes is None or self.session.is_skipping:
            return self.denoiser.engine.run(self.fiber, module, component, context, args, kwargs, *settings)
        return self.passes.forward(module, component, context, args, kwargs, settings)

    def remaining_forwards(self) -> int:
        """By the forwards that a step has taken so far; 0 after the last."""
        steps = self._all_steps() - self.session.resumed_at
        return max(0, round(steps * self.forwards_a_step) - self.fiber.forwards)

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
        device = self.denoiser.stage.device

        def send(step: int, outcome: HandOff | Result, moment: Moment) -> None:
            try:
                preview(step, self._packed(outcome, step, moment))
            except Exception as error:  # noqa: BLE001  (a preview never fails a request)
                logger.info("no preview of step %d: %s", step, error)

        def show(step: int, outcome: HandOff | Result) -> None:
            shown = _copied(first_frame(outcome) if is_video else outcome)
            self._leaving.append(self.denoiser.senders.submit(send, step, shown, queued_so_far(device)))

        return Previews(self.envelope.previews, show)

    def _last_packed(self, outcome: HandOff | Result, moment: Moment, is_resumed: bool) -> DecodeInputs:
        stage = self.denoiser.stage
        try:
            return self._packed(outcome, self.session.steps_done, moment, stage if "vae" in stage.stages else None)
        except NotNumbersError as error:
            if not is_resumed:
                raise
            raise CannotResumeError("after the skipped steps it made values that are not numbers") from error

    def _packed(
        self, outcome: HandOff | Result, num_steps: int, moment: Moment, here: StagePipeline | None = None
    ) -> DecodeInputs:
        """Beside the forwards of other requests, which are queued by now."""
        device, warnings = self.denoiser.stage.device, (*self.conditioning.warnings, *self.warnings)
        with beside_forwards(device, moment):
            return pack_outcome(outcome, device, num_steps, warnings, here)

    def _feature_states(self) -> dict[str, Any] | None:
        limit = self.denoiser.args.max_checkpoint_cache_bytes
        states = self.features.snapshot(limit, must_be_whole=self.fiber.deterministic)
        if states is None or self.passes is None:
            return states
        return {**states, PASSES: self.passes.snapshot()}

    def _note_progress(self, step: int, num_steps: int) -> None:
        if self.passes is not None:
            self.passes.end_step()
        self.num_steps = num_steps
        done = step - self.session.resumed_at
        if done > 0:
            self.forwards_a_step = self.fiber.forwards / done
            self.denoiser.forwards_a_step[self.kind] = self.forwards_a_step
        if self.follower.progress:
            self._pace.end_step(time.monotonic())
            self.follower.progress(DenoisingProgress(step, num_steps, self._pace.seconds_left(num_steps - step)))

    def _note_checkpoint(self, snapshot: Snapshot) -> None:
        last = self._last_checkpoint
        if last is not None and not last.done():  # one at a time is on its way: they may be large
            with self.session.waiting():
                self.denoiser.engine.elsewhere(last.result)
        self._last_checkpoint = self.denoiser.senders.submit(self._send_checkpoint, self.session, snapshot)
        self._leaving = [sending for sending in self._leaving if not sending.done() or sending.exception()]
        self._leaving.append(self._last_checkpoint)

    def _send_checkpoint(self, session: ResumableSession, snapshot: Snapshot) -> None:
        assert self.follower.checkpoint is not None
        snapshot.wait()
        started = time.perf_counter()
        content = snapshot.packed()
        self.follower.checkpoint(make_checkpoint(self.request, self.fingerprint, snapshot.step, content))
        seconds = snapshot.seconds + time.perf_counter() - started
        session.interval.note(seconds, snapshot.step - session.resumed_at)
        self.denoiser.measure(CheckpointMade(content.num_bytes, seconds))

    def _note_summary(self, feature: str, summary: Summary) -> None:
        self.denoiser.recent_summaries[feature].append({"request_id": self.request.request_id, **summary.values})
        self.measured += summary.measurements
        for measurement in summary.measurements:
            self.denoiser.measure(measurement)


def _copied(outcome: HandOff | Result) -> HandOff | Result:
    """What is packed while the loop goes on."""
    if isinstance(outcome, Result):
        return Result(copied(outcome.output))
    calls = [replace(call, args=copied(call.args), kwargs=copied(call.kwargs)) for call in outcome.decoder_calls]
    return replace(outcome, decoder_calls=calls)
