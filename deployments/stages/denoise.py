"""The denoiser stage without Ray: conditioning in, the inputs of the decoders out.

Each request runs its own session, all of them by turns in the engine's thread, where their forwards meet.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

import torch

from deployments.accelerations import ACCELERATIONS
from deployments.accelerations.compiled_forwards import CompiledForwards
from deployments.adapters.forward import num_layers
from deployments.adapters.held import Adapters
from deployments.denoising.checkpoint import check_checkpoint
from deployments.denoising.fingerprint import model_fingerprint, request_fingerprint
from deployments.denoising.measurements import Measure
from deployments.denoising.probe import learn_batch_axes
from deployments.denoising.wiring import SharedWiring
from deployments.engine.batching.axes import BatchAxes, Path
from deployments.engine.engine import Engine
from deployments.engine.executor import Executor, LocalExecutor
from deployments.engine.fiber import Fiber
from deployments.engine.forward import bind
from deployments.engine.statistics import ignore
from deployments.errors import (
    CannotResumeError,
    FeedsBackError,
    GenerationFailedError,
    NotSupportedError,
    PassesApartError,
)
from deployments.features import FEATURES
from deployments.features.feature import Feature
from deployments.features.in_use import fetch_features, wanted_features
from deployments.messages import (
    STAGES,
    UNFOLLOWED,
    Checkpoint,
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    Envelope,
    GenerationRequest,
    Packed,
    StageName,
)
from deployments.model import DenoisingArgs
from deployments.ranks.executor import RanksExecutor
from deployments.ranks.group import RankGroup
from deployments.ranks.loss.lack import Refusals
from deployments.stage_pipeline.description import size_multiple
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.remote_calls import apply_answer, component_call
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, call_directly
from deployments.stage_pipeline.sessions.own_modules import is_rewired
from deployments.stages.adapters import evict_idle_of_encoders, uses_of, with_digests
from deployments.stages.denoise_run import NO_FOLLOWER, DenoiseRun, DenoisingFollower, SharedByRuns
from deployments.stages.encode import decode_arguments, unpack_conditioning
from deployments.stages.ranks.adapters import AdaptersOfRankZero
from deployments.tensors.out_of_memory import is_out_of_memory
from deployments.tensors.values import PLAIN, map_values
from env_config.variables import EnvConfig

logger = logging.getLogger(__name__)

AskStage = Callable[[StageName, ComponentCall], ComponentAnswer]
Encode = Callable[[GenerationRequest], Conditioning]
Kind = tuple[str, ...]
MOST_KINDS = 1000  # of requests that are remembered
WAY_OF_WORKING = re.compile(r"[A-Za-z0-9_.+/:-]*")  # such as the name of a mode
NUM_SENDERS = 4  # threads; each waits for the device most of the time
LEARNING_S = 120.0  # at most, for two calls of the encoder and a forward or two of every denoiser
EVICTION_S = 2.0  # at most, for the engine's thread to come by
RECENT = 100  # requests whose summaries are kept for each feature


class DenoiserStage:
    """Runs the denoising loops of a pipeline, any number at a time.

    `ask_stage` makes a component call in the stage that holds the component. It serves pipelines whose
    decoded or encoded data flows back into the loop, which show themselves at the first request of a kind.
    `encode` runs the encoder stage; with it the batch axes are learned, without it they are guessed.
    `features` are what requests may ask for, `adapters` the LoRAs of this process, where not those of `stage`.
    `ranks` compute the forwards with this process, which waits here until they have built the denoisers.
    """

    def __init__(
        self,
        stage: StagePipeline,
        args: DenoisingArgs | None = None,
        ask_stage: AskStage | None = None,
        encode: Encode | None = None,
        env: EnvConfig | None = None,
        measure: Measure = ignore,
        features: tuple[Feature, ...] = FEATURES,
        adapters: Adapters | None = None,
        ranks: RankGroup | None = None,
    ) -> None:
        self.args = args or DenoisingArgs()
        self.env = env or EnvConfig()
        self.stage = stage
        self.ask_stage = ask_stage
        self.encode = encode
        self.features = features
        held: Adapters | None = adapters or stage.adapters
        self._of_ranks = AdaptersOfRankZero(held) if ranks is not None and held is not None else None
        self.adapters = self._of_ranks or held
        self._by_remote_calls: set[Kind] = set()  # kinds of requests whose data flows back
        self._with_passes_apart: dict[str, None] = {}  # courses of requests whose guidance passes cannot wait
        self.ranks = ranks
        self._not_probed = Refusals(ranks.lacks if ranks is not None else (), deaths=1)
        self.compiled = CompiledForwards(
            stage.switches,
            call_directly,
            self._batch_axes,
            is_rewired,
            lambda kind: self.engine.under_way.work(kind),
            num_layers,
        )
        self.engine = Engine(
            self.args.max_batch_size,
            self.args.max_batch_tokens,
            self.args.max_wait_s,
            self.args.order,
            self._executor(),
            measure,
            self.args.merging,
            self.args.guidance_passes,
            compilation_s=lambda: self.compiled.compilation_s,
        )
        for lack in ranks.lacks if ranks else ():
            self.engine.batches.did_not_fit_before(lack.component, lack.shape, lack.samples, lack.deaths)
        stage.memory.when_lacking(self._evict_idle)
        settings = [(feature.name, feature.settings(self.env)) for feature in features]
        accelerated = [(each.name, each.settings(self.env)) for each in ACCELERATIONS if each.is_on(self.env)]
        settings += [(name, value) for name, value in accelerated if value]
        settings += [("parallel", ranks.args.degrees)] if ranks else []
        self.fingerprint = model_fingerprint(stage, settings=repr(settings))
        if ranks is not None:  # after the fingerprint, which asks for whole weights; before the wiring is read
            ranks.open(self.denoisers, stage.device)
        self.recent_summaries = {feature.name: deque[dict[str, Any]](maxlen=RECENT) for feature in features}
        wiring = SharedWiring(type(stage.pipeline).__name__, self.denoisers)
        senders = ThreadPoolExecutor(NUM_SENDERS, thread_name_prefix="sender")
        self._shared = SharedByRuns(
            stage, self.args, self.engine, wiring, measure, self.recent_summaries, self.compiled, senders
        )
        # Kinds of requests whose batch axes are asked for, or were: set where they are known, or cannot be.
        self._learned: dict[Kind, Event] = {}

    @property
    def denoisers(self) -> dict[str, torch.nn.Module]:
        """Those of the pipeline, by component."""
        components = self.stage.components
        return {name: components[name] for name in self.stage.layout.denoisers if name in components}

    def _executor(self) -> Executor:
        local = LocalExecutor(self.compiled, self.stage.device, self._free_memory)
        if self.ranks is None:
            return local
        return RanksExecutor(self.ranks, local, self.denoisers, self.learned_axes, is_rewired, self._of_ranks)

    def _free_memory(self) -> None:
        """After a forward that did not fit; called by the engine, in whatever thread that was seen."""
        self._evict_idle(wait_s=0.0)
        evict_idle_of_encoders(self.stage, wait_s=0.0)
        self.stage.memory.give_back()

    def _evict_idle(self, wait_s: float = EVICTION_S) -> None:
        """LoRAs that no request uses leave the denoisers, in the engine's thread."""
        if self.stage.adapters is None:
            return
        work = partial(self.stage.adapters.evict_idle, self.stage.layout.denoisers)
        if self.engine.is_here:
            work()
            return
        with suppress(TimeoutError, GenerationFailedError):  # the engine is at a forward, or closed
            self.engine.submit(Fiber("idle adapters"), work).result(wait_s)

    def denoise(
        self,
        request: GenerationRequest,
        conditioning: Conditioning,
        checkpoint: Checkpoint | None = None,
        envelope: Envelope = UNFOLLOWED,
        follower: DenoisingFollower = NO_FOLLOWER,
    ) -> tuple[DecodeInputs, DenoiseRun]:
        """Runs in the engine's thread, by turns with other requests; the caller's waits.

        Raises InvalidRequestError for what a feature or the pipeline refuses, AdapterReplacedError for a LoRA of which
        the encoders have used other contents than there are here, CannotResumeError for a checkpoint that is of no use
        here, HandOffError where the pipeline does not fit, CancelledStage when the run's fiber was cancelled,
        DeviceFullError or TooLargeForDeviceError.
        """
        try:
            return self.stage.memory.named(
                lambda: self._denoised(request, conditioning, checkpoint, envelope, follower)
            )
        finally:
            if not self.engine.num_fibers:
                self.stage.memory.rest()

    def _denoised(
        self,
        request: GenerationRequest,
        conditioning: Conditioning,
        checkpoint: Checkpoint | None,
        envelope: Envelope,
        follower: DenoisingFollower,
    ) -> tuple[DecodeInputs, DenoiseRun]:
        asked, request = request, with_digests(request, conditioning.adapters)
        wanted, contents, request = fetch_features(
            wanted_features(self.features, self.env, request), self.adapters, request
        )
        knows_axes = self._learn_axes(request)
        fingerprint = request_fingerprint(self.fingerprint_for(request) + contents + conditioning.making, asked)
        fingerprint_apart = f"{fingerprint}|passes apart"
        began_again = checkpoint is not None and checkpoint.fingerprint == fingerprint_apart  # in another replica
        is_apart = began_again or not knows_axes or course_of(request) in self._with_passes_apart
        fingerprint = fingerprint_apart if is_apart else fingerprint
        run = DenoiseRun(self._shared, request, conditioning, wanted, fingerprint, envelope, follower)
        run.fiber.may_share = partial(self._may_share, kind_of(request))
        run.passes_apart |= is_apart
        resume_from = check_checkpoint(checkpoint, fingerprint) if checkpoint else None
        try:
            return self._run(run, request, envelope, resume_from), run
        except PassesApartError as error:
            self._note_passes_apart(request, error)
            if resume_from is not None:  # what it holds may have been made together
                raise CannotResumeError(f"its steps cannot go on with its guidance passes together: {error}") from error
        run.passes_apart, run.fingerprint = True, fingerprint_apart
        return self._run(run, request, envelope, None), run

    def _run(
        self, run: DenoiseRun, request: GenerationRequest, envelope: Envelope, resume_from: Packed | None
    ) -> DecodeInputs:
        if not (envelope.remote_calls or self.needs_remote_calls(request)):
            try:
                return run.run(None, resume_from)
            except FeedsBackError as error:
                if not self._can_call:
                    raise NotSupportedError(f"{type(self.stage.pipeline).__name__} cannot be split: {error}") from error
                self._note_remote_calls(request, error)
        if not self._can_call:
            raise NotSupportedError(f"{type(self.stage.pipeline).__name__} cannot be split")
        return run.run(partial(self._call_remotely, request), resume_from)

    def _note_passes_apart(self, request: GenerationRequest, error: PassesApartError) -> None:
        while len(self._with_passes_apart) >= MOST_KINDS:
            del self._with_passes_apart[next(iter(self._with_passes_apart))]
        self._with_passes_apart[course_of(request)] = None
        kind = ", ".join(kind_of(request)) or "no argument"
        logger.warning("guidance passes of requests with %s are made apart: %s", kind, error)

    def needs_remote_calls(self, request: GenerationRequest) -> bool:
        """Whether one of its kind has shown that it does."""
        return kind_of(request) in self._by_remote_calls

    def _note_remote_calls(self, request: GenerationRequest, error: FeedsBackError) -> None:
        if len(self._by_remote_calls) < MOST_KINDS:
            self._by_remote_calls.add(kind_of(request))
        level = logging.INFO if self._holds_all else logging.WARNING  # it costs nothing where all is here
        name, kind = type(self.stage.pipeline).__name__, ", ".join(kind_of(request))
        logger.log(level, "%s needs remote calls for requests with %s: %s", name, kind or "no argument", error)

    def fingerprint_for(self, request: GenerationRequest) -> str:
        """That of the model, and for a request whose forwards may be compiled or share a batch how they do."""
        if request.deterministic or self.args.deterministic:
            return self.fingerprint
        apart, bound = self.args.guidance_passes == "apart", self.args.max_batch_tokens
        passes = "" if apart else f"|passes {self.args.guidance_passes}" + (f" {bound}" if bound else "")
        return self.fingerprint + self.compiled.settings + passes

    def learned_axes(self, component: str) -> BatchAxes | None:
        """As the engine has learned them of the component."""
        return self.engine.batches.axes.get(component)

    def _batch_axes(self, component: str) -> Mapping[Path, Any] | None:
        learned = self.learned_axes(component)
        return None if learned is None else learned.arguments

    @property
    def _can_call(self) -> bool:
        """Whether calls of encoders and decoders can be made from the loop: by another stage, or here."""
        return self.ask_stage is not None or self._holds_all

    @property
    def _holds_all(self) -> bool:
        return set(self.stage.stages) == set(STAGES)

    def _learn_axes(self, request: GenerationRequest) -> bool:
        """Once for each kind of request: which axis of each argument is the batch.

        False: another request of the kind still learns it, and the guidance passes of this one cannot be together.
        """
        passes = self.args.guidance_passes
        splits_batches = self.ranks is not None and self.ranks.args.batch > 1
        needs_axes = splits_batches or self.args.max_batch_size > 1 or passes != "apart"
        if self.encode is None or not needs_axes:
            return True
        mine = Event()
        learned = self._learned.setdefault(kind_of(request), mine)
        if learned is not mine:
            # Guidance passes run together from the first step on, as always, or not at all.
            if passes != "together" or learned.wait(LEARNING_S):
                return True
            logger.warning(
                "the guidance passes of one request are made apart: another has not learned the batch axes within %g s",
                LEARNING_S,
            )
            return False
        try:
            if not self._ask_for_axes(request, self.encode):
                del self._learned[kind_of(request)]  # the next request asks again
        finally:
            learned.set()
        return True

    def _may_share(self, kind: Kind) -> bool:
        """Not by guessed axes while they are asked for: the others of the kind run alone until then."""
        learned = self._learned.get(kind)
        return learned is None or learned.is_set()

    def _ask_for_axes(self, request: GenerationRequest, encode: Encode) -> bool:
        """False where memory lacked for it."""

        def encoded(arguments: dict[str, Any]) -> Any:
            return unpack_conditioning(encode(_with_arguments(request, arguments)), self.stage)

        def decoded(arguments: dict[str, Any]) -> dict[str, Any]:
            return decode_arguments(self.stage, arguments)

        for arguments in (small_arguments(request, size_multiple(self.stage)), request.arguments):
            try:
                axes = learn_batch_axes(self.stage, arguments, encoded, decoded, self._run_probe)
            except Exception as error:  # noqa: BLE001  (this size may not suit the pipeline; the request itself tells)
                logger.info("the batch axes cannot be learned from %s: %s", sorted(arguments), error)
                if is_out_of_memory(error):
                    return False  # the request itself is no smaller
                continue
            for name, learned in axes.items():
                self.engine.set_axes(name, learned)
            break
        return True

    def _run_probe(self, module: Any, component: str, context: Any, args: Any, kwargs: Any) -> Any:
        refusal = self._not_probed.reason(component, bind(module, args, kwargs), None)
        if refusal is not None:
            raise torch.OutOfMemoryError(refusal)
        return self.engine.run(Fiber("probe", deterministic=True), module, component, context, args, kwargs)

    def _call_remotely(
        self,
        request: GenerationRequest,
        session: DenoiseSession,
        stage: StageName,
        component: str,
        method: str,
        args: Any,
        kwargs: Any,
    ) -> Any:
        ask_stage = self.ask_stage
        assert ask_stage is not None
        call = replace(
            component_call(session, component, method, args, kwargs),
            adapters=tuple(use.plain() for use in uses_of(request)),
        )
        with session.waiting():
            answer = self.engine.elsewhere(lambda: ask_stage(stage, call))
        return apply_answer(answer, args, kwargs, self.stage.device)


def kind_of(request: GenerationRequest) -> Kind:
    """Requests of one kind have the same arguments."""
    return tuple(sorted(request.arguments))


def course_of(request: GenerationRequest) -> str:
    """Equal for requests whose pipeline asks for the same forwards: they differ by seeds, words and files at most."""

    def leaf(value: Any) -> Any:
        is_plain = isinstance(value, PLAIN) and not isinstance(value, bytes)
        is_words = isinstance(value, str) and not WAY_OF_WORKING.fullmatch(value)
        return value if is_plain and not is_words else type(value).__name__

    def without_words(name: str, value: Any) -> Any:
        return map_values(lambda each: type(each).__name__, value) if "prompt" in name else map_values(leaf, value)

    return repr({name: without_words(name, value) for name, value in sorted(request.arguments.items())})


def small_arguments(request: GenerationRequest, multiple: int) -> dict[str, Any]:
    """The same kind of request with little work in it: the probe needs shapes, not pictures."""
    bounds = {"height": 8 * multiple, "width": 8 * multiple, "num_frames": 9, "num_inference_steps": 8}
    small = {n: min(request.arguments[n], most) for n, most in bounds.items() if request.arguments.get(n)}
    return {**request.arguments, **small}


def _with_arguments(request: GenerationRequest, arguments: dict[str, Any]) -> GenerationRequest:
    return GenerationRequest(**{**vars(request), "arguments": arguments, "seed": 0, "features": {}})
