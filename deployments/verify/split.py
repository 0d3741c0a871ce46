"""One request through the stages of the split, whose messages are written as bytes and read again on their way."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from deployments.devices import Device
from deployments.errors import FeedsBackError, HandOffError, HandOffIncompleteError
from deployments.features import FEATURES
from deployments.messages import (
    Checkpoint,
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    Envelope,
    GenerationRequest,
    StageName,
)
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.hand_off import pack_outcome, unpack_outcome
from deployments.stage_pipeline.remote_calls import answer_call, apply_answer, component_call
from deployments.stage_pipeline.sessions.denoise import DenoiseSession, HandOff, Result
from deployments.stage_pipeline.sessions.encode import EncoderCall
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoiseRun, DenoisingFollower
from deployments.stages.encode import call_arguments, encode, unpack_conditioning
from deployments.verify.whole import Whole
from env_config.variables import EnvConfig

PATIENCE_S = 1.0  # that a forward waits for the other request: this is no time of the served application's
Message = TypeVar("Message")


@dataclass
class Split:
    """The stages, and how the pipeline turned out to be split: by hand-off or remote calls, with all decoder calls."""

    whole: Whole
    device: Device
    env: EnvConfig
    by_remote_calls: bool = False
    complete: bool = False

    # -- encoder, denoiser, VAE, one after another --------------------------------------------------------------

    def encode(self, request: GenerationRequest) -> Conditioning:
        return sent(encode(self.whole.stages["encoder"], request))

    def recorded(self, conditioning: Conditioning) -> list[EncoderCall]:
        """As the denoiser reads it."""
        return unpack_conditioning(conditioning, self.whole.stages["denoiser"])

    def denoise(self, request: GenerationRequest, conditioning: Conditioning) -> DecodeInputs:
        """The plain loop, without an engine."""
        try:
            return self._denoise(request, conditioning)
        except FeedsBackError:
            if self.by_remote_calls:
                raise
            self.by_remote_calls = True
            return self._denoise(request, conditioning)

    def outcome(self, inputs: DecodeInputs) -> HandOff | Result:
        """As the VAE stage reads it."""
        return unpack_outcome(inputs, self.whole.stages["vae"])

    def decode(self, request: GenerationRequest, conditioning: Conditioning, inputs: DecodeInputs) -> Any:
        """The pipeline's output; the denoising is made again on the longer ways of the application, where its hand-off
        turns out not to be enough.
        """
        try:
            output = decode_output(self.whole.stages["vae"], request, inputs)
        except HandOffError as error:
            if self.by_remote_calls:
                raise
            self.complete = isinstance(error, HandOffIncompleteError) and not self.complete
            self.by_remote_calls = not self.complete
            return self.decode(request, conditioning, self.denoise(request, conditioning))
        return dict(output) if hasattr(output, "keys") else output

    def _denoise(self, request: GenerationRequest, conditioning: Conditioning) -> DecodeInputs:
        stage = self.whole.stages["denoiser"]
        session = DenoiseSession(
            stage,
            call_arguments(stage, request),
            request.seed,
            self.recorded(conditioning),
            call_remotely=self._call_remotely if self.by_remote_calls else None,
            hands_over=True,
            complete=self.complete,
        )
        with stage.memory.steady(request.deterministic):
            outcome = session.run()
        return sent(pack_outcome(outcome, session.device, session.steps_done))

    def _call_remotely(
        self, session: DenoiseSession, stage: StageName, component: str, method: str, args: Any, kwargs: Any
    ) -> Any:
        device = self.whole.stages["denoiser"].device
        call = component_call(session, component, method, args, kwargs)
        with session.waiting():
            answer = self.ask_stage(stage, call)
        return apply_answer(answer, args, kwargs, device)

    def ask_stage(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        return sent(answer_call(self.whole.stages[stage], sent(call)))

    # -- the engine -----------------------------------------------------------------------------------------------

    def open_denoiser(self, args: DenoisingArgs) -> DenoiserStage:
        """As in a replica, but that it waits for others and merges what it can, writes checkpoints at each step, and
        offers no feature."""
        return DenoiserStage(
            self.whole.stages["denoiser"],
            args.model_copy(update={"max_wait_s": PATIENCE_S, "checkpoint_every": 1, "merging": "always"}),
            ask_stage=self.ask_stage,
            encode=self.encode,
            env=self.env,
            features=tuple(feature for feature in FEATURES if not feature.is_asked_for),
        )

    def run(
        self,
        denoiser: DenoiserStage,
        request: GenerationRequest,
        conditioning: Conditioning,
        checkpoint: Checkpoint | None = None,
        checkpoints: list[Checkpoint] | None = None,
    ) -> tuple[DecodeInputs, DenoiseRun]:
        """Those made on the way are added to `checkpoints`."""
        follower = DenoisingFollower(checkpoint=None if checkpoints is None else checkpoints.append)
        envelope = Envelope(complete_hand_off=self.complete, remote_calls=self.by_remote_calls)
        inputs, run = denoiser.denoise(request, conditioning, checkpoint, envelope, follower)
        return sent(inputs), run

    def run_together(
        self, denoiser: DenoiserStage, requests: Sequence[GenerationRequest], conditionings: Sequence[Conditioning]
    ) -> list[tuple[DecodeInputs, DenoiseRun]]:
        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(partial(self.run, denoiser), requests, conditionings))


def sent(message: Message) -> Message:
    """What another process reads of it."""
    received: Message = pickle.loads(pickle.dumps(message))
    return received


def another(request: GenerationRequest, prompt: str) -> GenerationRequest:
    """A request of the same kind with another seed and, where it has one, another prompt; forwards may be merged."""
    changes = {"prompt": prompt} if isinstance(request.arguments.get("prompt"), str) else {}
    return replace(
        request,
        request_id="verify-2",
        arguments=request.arguments | changes,
        seed=request.seed + 1,
        deterministic=False,
    )
