"""The denoiser stage without Ray: conditioning in, the inputs of the decoders out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from deployments.denoising.hand_off import pack_outcome
from deployments.encoding import call_arguments, unpack_conditioning
from deployments.errors import FeedsBackError, NotSupportedError
from deployments.messages import ComponentAnswer, ComponentCall, Conditioning, DecodeInputs, GenerationRequest, StageName
from deployments.stage_pipeline.denoise_session import DenoiseSession, OnProgress
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.remote_calls import apply_answer, component_call

logger = logging.getLogger(__name__)

AskStage = Callable[[StageName, ComponentCall], ComponentAnswer]


class DenoiserStage:
    """Runs the denoising loops of a pipeline.

    `ask_stage` makes a component call in the stage that holds the component. It serves pipelines whose
    decoded or encoded data flows back into the loop, which show themselves at their first request.
    """

    def __init__(self, stage: StagePipeline, ask_stage: AskStage | None = None) -> None:
        self.stage = stage
        self.ask_stage = ask_stage
        self.needs_remote_calls = False

    def denoise(
        self,
        request: GenerationRequest,
        conditioning: Conditioning,
        on_progress: OnProgress | None = None,
        on_session: Callable[[DenoiseSession], None] | None = None,
    ) -> DecodeInputs:
        """Raises InvalidRequestError for what the pipeline refuses, HandOffError where it does not fit."""
        if not self.needs_remote_calls:
            try:
                return self._run(request, conditioning, on_progress, on_session, remotely=False)
            except FeedsBackError as error:
                if self.ask_stage is None:
                    raise NotSupportedError(f"{type(self.stage.pipeline).__name__} cannot be split: {error}") from error
                logger.warning("%s needs remote calls: %s", type(self.stage.pipeline).__name__, error)
                self.needs_remote_calls = True
        return self._run(request, conditioning, on_progress, on_session, remotely=True)

    def _run(
        self,
        request: GenerationRequest,
        conditioning: Conditioning,
        on_progress: OnProgress | None,
        on_session: Callable[[DenoiseSession], None] | None,
        remotely: bool,
    ) -> DecodeInputs:
        session = DenoiseSession(
            self.stage,
            call_arguments(request),
            request.seed,
            unpack_conditioning(conditioning, self.stage),
            call_remotely=self._call_remotely if remotely else None,
            complete=request.complete_hand_off,
            on_progress=on_progress,
        )
        if on_session:
            on_session(session)
        return pack_outcome(session.run())

    def _call_remotely(self, stage: StageName, component: str, method: str, args: Any, kwargs: Any, _: Any) -> Any:
        assert self.ask_stage is not None
        answer = self.ask_stage(stage, component_call(component, method, args, kwargs))
        return apply_answer(answer, args, kwargs, self.stage.device)
