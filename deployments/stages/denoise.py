"""The denoiser stage without Ray: conditioning in, the inputs of the decoders out.

Each request runs its own session, all of them by turns in the engine's thread, where their forwards meet.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from deployments.denoising.checkpoint import (
    ResumableSession,
    check_checkpoint,
    make_checkpoint,
    model_fingerprint,
    request_fingerprint,
)
from deployments.denoising.preview import Previews, first_frame
from deployments.denoising.probe import learn_batch_axes
from deployments.denoising.wiring import Wiring, read_wiring, restore_wiring
from deployments.engine.engine import Engine
from deployments.engine.forward import Job
from deployments.engine.measurements import CachedSteps, CheckpointMade, Measure, Resumed, ignore
from deployments.errors import FeedsBackError, NotSupportedError
from deployments.features.cache_dit.request import RequestCaches
from deployments.messages import (
    UNFOLLOWED,
    Checkpoint,
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    DenoisingProgress,
    Envelope,
    GenerationRequest,
    Packed,
    StageName,
)
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.description import size_multiple
from deployments.stage_pipeline.hand_off import pack_outcome
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.remote_calls import apply_answer, component_call
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, HandOff, Result
from deployments.stage_pipeline.sessions.encode import EncoderCall
from deployments.stages.encode import call_arguments, decode_arguments, unpack_conditioning
from env_config.variables import EnvConfig

logger = logging.getLogger(__name__)

AskStage = Callable[[StageName, ComponentCall], ComponentAnswer]
Encode = Callable[[GenerationRequest], Conditioning]
RECENT = 100
DEFAULT_SLACK = 3.0  # times its own predicted duration that a request without a deadline is given


@dataclass(frozen=True)
class Denoising:
    """One request as the caller of `denoise` sees it while it runs."""

    job: Job
    session: ResumableSession


class DenoiserStage:
    """Runs the denoising loops of a pipeline, any number at a time.

    `ask_stage` makes a component call in the stage that holds the component. It serves pipelines whose
    decoded or encoded data flows back into the loop, which show themselves at their first request.
    `encode` runs the encoder stage; with it the batch axes are learned, without it they are guessed.
    """

    def __init__(
        self,
        stage: StagePipeline,
        args: DenoisingArgs | None = None,
        ask_stage: AskStage | None = None,
        encode: Encode | None = None,
        synchronize: Callable[[], None] = lambda: None,
        env: EnvConfig | None = None,
        measure: Measure = ignore,
    ) -> None:
        self.args = args or DenoisingArgs()
        self.env = env or EnvConfig()
        self.stage = stage
        self.ask_stage = ask_stage
        self.encode = encode
        self.needs_remote_calls = False
        self.engine = Engine(
            self.args.max_batch_size,
            self.args.max_batch_tokens,
            self.args.max_wait_s,
            self.args.order,
            synchronize,
            measure,
        )
        self.measure = measure
        self.fingerprint = model_fingerprint(stage, settings=repr((self.env.cache_dit, self.env.cache_dit_secondary)))
        self.recent_caches: deque[dict[str, Any]] = deque(maxlen=RECENT)  # summaries of cached requests
        self._wiring: dict[str, Wiring] = {
            name: read_wiring(module) for name, module in stage.components.items() if name in stage.layout.denoisers
        }
        self._learned: set[tuple[str, ...]] = set()  # kinds of requests whose batch axes are known

    def denoise(
        self,
        request: GenerationRequest,
        conditioning: Conditioning,
        checkpoint: Checkpoint | None = None,
        envelope: Envelope = UNFOLLOWED,
        on_progress: Callable[[DenoisingProgress], None] | None = None,
        on_checkpoint: Callable[[Checkpoint], None] | None = None,
        on_start: Callable[[Denoising], None] | None = None,
        on_preview: Callable[[int, DecodeInputs], None] | None = None,
    ) -> tuple[DecodeInputs, Denoising]:
        """Runs in the engine's thread, by turns with other requests; the caller's waits.

        Raises InvalidRequestError for what the pipeline refuses, HandOffError where it does not fit,
        CancelledStage when the job was cancelled.
        """
        self._learn_axes(request)
        fingerprint = request_fingerprint(self.fingerprint, request)
        run = _Run(self, request, envelope, conditioning, fingerprint, on_progress, on_checkpoint, on_start, on_preview)
        resume_from = check_checkpoint(checkpoint, fingerprint) if checkpoint else None
        if not self.needs_remote_calls:
            try:
                return run.run(None, resume_from)
            except FeedsBackError as error:
                if self.ask_stage is None:
                    raise NotSupportedError(f"{type(self.stage.pipeline).__name__} cannot be split: {error}") from error
                logger.warning("%s needs remote calls: %s", type(self.stage.pipeline).__name__, error)
                self.needs_remote_calls = True
        return run.run(self._call_remotely, resume_from)

    def _learn_axes(self, request: GenerationRequest) -> None:
        """Once for each kind of request: which axis of each argument is the batch."""
        kind = tuple(sorted(request.arguments))
        if self.encode is None or kind in self._learned or self.args.max_batch_size == 1:
            return
        self._learned.add(kind)
        encode = self.encode

        def encoded(arguments: dict[str, Any]) -> Any:
            return unpack_conditioning(encode(_with_arguments(request, arguments)), self.stage)

        for arguments in (small_arguments(request, size_multiple(self.stage)), request.arguments):
            try:
                axes = learn_batch_axes(self.stage, arguments, encoded, decode_arguments, self._run_probe)
            except Exception as error:  # noqa: BLE001  (this size may not suit the pipeline; the request itself tells)
                logger.info("the batch axes cannot be learned from %s: %s", sorted(arguments), error)
                continue
            for name, learned in axes.items():
                self.engine.batches.axes.setdefault(name, learned)
            return

    def _run_probe(self, module: Any, component: str, context: Any, args: Any, kwargs: Any) -> Any:
        return self.engine.run(Job("probe", deterministic=True), module, component, context, args, kwargs)

    def check_wiring(self, component: str) -> None:
        """Raises NotSupportedError where the pipeline rewired the denoiser for this request."""
        before = self._wiring.get(component)
        if before is not None and restore_wiring(before):
            raise NotSupportedError(
                f"{type(self.stage.pipeline).__name__} rewires {component} for such a request, but others share it"
            )

    def _call_remotely(
        self, session: DenoiseSession, stage: StageName, component: str, method: str, args: Any, kwargs: Any
    ) -> Any:
        ask_stage = self.ask_stage
        assert ask_stage is not None
        call = component_call(component, method, args, kwargs)
        with session.waiting():
            answer = self.engine.elsewhere(lambda: ask_stage(stage, call))
        return apply_answer(answer, args, kwargs, self.stage.device)


class _Run:
    """One request's way through the stage."""

    def __init__(
        self,
        owner: DenoiserStage,
        request: GenerationRequest,
        envelope: Envelope,
        conditioning: Conditioning,
        fingerprint: str,
        on_progress: Callable[[DenoisingProgress], None] | None,
        on_checkpoint: Callable[[Checkpoint], None] | None,
        on_start: Callable[[Denoising], None] | None,
        on_preview: Callable[[int, DecodeInputs], None] | None,
    ) -> None:
        self.owner = owner
        self.request = request
        self.envelope = envelope
        self.conditioning = conditioning
        self.fingerprint = fingerprint
        self.on_progress = on_progress
        self.on_checkpoint = on_checkpoint
        self.on_start = on_start
        self.on_preview = on_preview
        self.num_steps = 0
        self.forwards_a_step = 1.0
        self.started = time.monotonic()
        self.job = Job(
            request.request_id,
            deterministic=request.deterministic or owner.args.deterministic,
            remaining_forwards=self.remaining_forwards,
        )
        if request.deadline_s is not None:
            self.job.deadline = self.job.expires = self.started + request.deadline_s
        self._checked: set[str] = set()
        self.caches = RequestCaches(owner.env, request)

    def run(self, call_remotely: Any, resume_from: Packed | None) -> tuple[DecodeInputs, Denoising]:
        engine = self.owner.engine
        engine.begin(self.job)
        try:
            # In this thread: what was sent may be large pictures, and to decode one can take a second.
            arguments, calls = call_arguments(self.request), unpack_conditioning(self.conditioning, self.owner.stage)
            outcome, denoising = engine.call(self.job, lambda: self._run(arguments, calls, call_remotely, resume_from))
        finally:
            engine.end(self.job)
            self._note_caches()
        return pack_outcome(outcome), denoising

    def _run(
        self, arguments: dict[str, Any], calls: list[EncoderCall], call_remotely: Any, resume_from: Packed | None
    ) -> tuple[HandOff | Result, Denoising]:
        self.session = ResumableSession(
            self.owner.stage,
            arguments,
            self.request.seed,
            calls,
            run_denoiser=self.run_denoiser,
            call_remotely=call_remotely,
            complete=self.envelope.complete_hand_off,
            on_progress=self.note_progress,
            on_checkpoint=self.note_checkpoint if self.on_checkpoint else None,
            every=self.owner.args.checkpoint_every,
            resume_from=resume_from,
            cache_state=self.caches.state,
            previews=self.previews() if call_remotely is None else None,
        )
        denoising = Denoising(self.job, self.session)
        if resume_from is not None:
            self.owner.measure(Resumed(self.session.resumed_at))
        if self.on_start:
            self.on_start(denoising)
        return self.session.run(), denoising

    def previews(self) -> Previews | None:
        """Of pipelines that need other stages in their loop there are none."""
        on_preview = self.on_preview
        if on_preview is None or not self.envelope.previews:
            return None
        is_video = self.request.output.kind == "video"
        return Previews(
            self.envelope.previews,
            lambda step, outcome: on_preview(step, pack_outcome(first_frame(outcome) if is_video else outcome)),
        )

    def _note_caches(self) -> None:
        if not self.caches.contexts:
            return
        summary = self.caches.summary()
        self.owner.recent_caches.append({"request_id": self.request.request_id, **summary})
        for component, counts in summary.items():
            self.owner.measure(CachedSteps(component, counts["computed_steps"], counts["reused_steps"]))

    def run_denoiser(self, module: Any, component: str, context: Any, args: Any, kwargs: Any) -> Any:
        if component not in self._checked:
            self._checked.add(component)
            self.owner.check_wiring(component)
        caches = self.caches.lent(self.session, component, module)
        output = self.owner.engine.run(self.job, module, component, context, args, kwargs, caches)
        if self.job.deadline is None:
            self._set_default_deadline()
        return output

    def remaining_forwards(self) -> int:
        """By the forwards that a step has taken so far; 0 after the last."""
        num_steps = self.num_steps or int(self.request.arguments.get("num_inference_steps") or 1)
        steps = num_steps - self.session.resumed_at
        return max(0, round(steps * self.forwards_a_step) - self.job.forwards)

    def _set_default_deadline(self) -> None:
        # A deadline that grows with the request's own work lets short ones pass long ones, and as time goes on
        # the slack of a long one shrinks below theirs: nobody starves. Not by the first forward itself, which a
        # warm-up or a full machine may have made slow: among equals it would go last.
        steps = self.num_steps or int(self.request.arguments.get("num_inference_steps") or 1)
        self.job.deadline = self.job.arrived + DEFAULT_SLACK * self.job.step_s * steps

    def note_progress(self, step: int, num_steps: int) -> None:
        self.num_steps = num_steps
        done = step - self.session.resumed_at
        if done > 0:
            self.forwards_a_step = self.job.forwards / done
        if self.on_progress:
            left = num_steps - step
            eta = (time.monotonic() - self.started) / done * left if done > 0 else None
            self.on_progress(DenoisingProgress(step, num_steps, eta))

    def note_checkpoint(self, step: int, content: Packed) -> None:
        assert self.on_checkpoint is not None
        started = time.perf_counter()
        self.on_checkpoint(make_checkpoint(self.request, self.fingerprint, step, content))
        self.owner.measure(CheckpointMade(content.num_bytes, time.perf_counter() - started))


def small_arguments(request: GenerationRequest, multiple: int) -> dict[str, Any]:
    """The same kind of request with little work in it: the probe needs shapes, not pictures."""
    bounds = {"height": 8 * multiple, "width": 8 * multiple, "num_frames": 9, "num_inference_steps": 8}
    small = {n: min(request.arguments[n], most) for n, most in bounds.items() if request.arguments.get(n)}
    return {**request.arguments, **small}


def _with_arguments(request: GenerationRequest, arguments: dict[str, Any]) -> GenerationRequest:
    return GenerationRequest(**{**vars(request), "arguments": arguments, "seed": 0})
