"""The same call through the stages, each in a process of its own that shares nothing but packed messages."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks.coverage.processes import RemoteError, Worker
from benchmarks.coverage.surroundings.allowances import after_load, leave_guardrails_out
from benchmarks.coverage.unsplit import SEED, Leaves, output_leaves
from deployments.devices import select_device
from deployments.messages import (
    STAGES,
    ComponentAnswer,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    Envelope,
    GenerationRequest,
    OutputFormat,
    StageDescription,
    StageName,
)
from deployments.model import ModelArgs
from deployments.stage_pipeline.description import describe_stage
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stages.build import build_stage
from deployments.stages.decode import decode, decode_output
from deployments.stages.denoise import AskStage, DenoiserStage
from deployments.stages.encode import encode
from env_config.variables import EnvConfig
from serve_app.requests.bodies import GenerationBody
from serve_app.requests.translate import sendable_arguments

# How an application may spread the stages: which of them share a process.
PLACEMENTS: dict[str, tuple[tuple[StageName, ...], ...]] = {
    "three_stage": (("encoder",), ("denoiser",), ("vae",)),
    "two_stage": (("encoder", "vae"), ("denoiser",)),
    "one_stage": (STAGES,),
}
ENVIRONMENT = EnvConfig.from_environ({"SGLANG_USE_RUNAI_MODEL_STREAMER": "false"})  # small files, read plainly
OUTPUTS = {
    "audio": OutputFormat("audio", "wav"),
    "image": OutputFormat("image", "png"),
    "tensors": OutputFormat("tensors", "safetensors"),
    "video": OutputFormat("video", "mp4"),
}


def build(folder: Path, stages: tuple[StageName, ...]) -> StagePipeline:
    """What a replica of these stages holds."""
    leave_guardrails_out()
    model = ModelArgs(path=str(folder), name=folder.name)
    stage = build_stage(model, stages, ENVIRONMENT, select_device("cpu"))
    after_load(stage.pipeline)
    return stage


def request_of(arguments: dict[str, Any], seed: int = SEED, name: str = "coverage") -> GenerationRequest:
    return GenerationRequest(name, "coverage", dict(arguments), seed, OUTPUTS["image"])


class StageWorker:
    """Some stages of one pipeline."""

    def __init__(self, folder: Path, stages: tuple[StageName, ...], ask_stage: AskStage) -> None:
        self.folder, self.stages, self.ask_stage = folder, stages, ask_stage

    def load(self) -> None:
        self.stage = build(self.folder, self.stages)
        if "denoiser" in self.stages:
            self.denoiser = DenoiserStage(self.stage, ask_stage=self.ask_stage)

    def describe(self) -> StageDescription:
        return describe_stage(self.stage)

    def encode(self, request: GenerationRequest) -> Conditioning:
        return encode(self.stage, request)

    def denoise(
        self, request: GenerationRequest, conditioning: Conditioning, envelope: Envelope
    ) -> tuple[DecodeInputs, bool]:
        """The hand-off, and whether component calls were made in other stages for it."""
        inputs, _ = self.denoiser.denoise(request, conditioning, envelope=envelope)
        return inputs, self.denoiser.needs_remote_calls(request) or envelope.remote_calls

    def decode(self, request: GenerationRequest, inputs: DecodeInputs) -> Leaves:
        return output_leaves(decode_output(self.stage, request, inputs))

    def count_files(self, request: GenerationRequest, inputs: DecodeInputs) -> int:
        """Of those that the answer to a request would be made of."""
        return len(decode(self.stage, request, inputs).files)

    def call_component(self, call: ComponentCall) -> ComponentAnswer:
        return answer_call(self.stage, call)


@dataclasses.dataclass(frozen=True)
class Made:
    """What the stages made of a call."""

    leaves: Leaves
    by_remote_calls: bool
    request: GenerationRequest
    inputs: DecodeInputs


class StageProcesses:
    """The stages of one pipeline, in the processes of a placement."""

    def __init__(self, folder: Path, placement: str) -> None:
        held = PLACEMENTS[placement]
        self.workers = [Worker(StageWorker, folder, stages) for stages in held]
        self.holder = {stage: self.workers[index] for index, stages in enumerate(held) for stage in stages}

    def load(self) -> None:
        for worker in self.workers:
            worker.ask("load")

    def describe(self) -> StageDescription:
        description: StageDescription = self.holder["vae"].ask("describe")
        return description

    def generate(self, arguments: dict[str, Any]) -> Made:
        """The ways that the application goes, one after the other. Raises RemoteError for what a stage raises."""
        try:
            return self._generate(arguments, Envelope())
        except RemoteError as error:
            if "HandOffError" not in error.failure.kinds:
                raise
            is_incomplete = "HandOffIncompleteError" in error.failure.kinds
        if is_incomplete:
            try:
                return self._generate(arguments, Envelope(complete_hand_off=True))
            except RemoteError as error:
                if "HandOffError" not in error.failure.kinds:
                    raise
        return self._generate(arguments, Envelope(remote_calls=True))

    def count_files(self, made: Made, media_kind: str) -> int:
        request = dataclasses.replace(made.request, output=OUTPUTS[media_kind])
        count: int = self.holder["vae"].ask("count_files", request, made.inputs)
        return count

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _generate(self, arguments: dict[str, Any], envelope: Envelope) -> Made:
        request = request_of(arguments)
        conditioning = self.holder["encoder"].ask("encode", request)
        inputs, by_remote_calls = self.holder["denoiser"].ask(
            "denoise", request, conditioning, envelope, answer=self._answer
        )
        return Made(self.holder["vae"].ask("decode", request, inputs), by_remote_calls, request, inputs)

    def _answer(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        answer: ComponentAnswer = self.holder[stage].ask("call_component", call)
        return answer


def http_fields(description: StageDescription) -> tuple[str, ...]:
    """What a request can say beside its prompt, as the application itself tells it."""
    bodies = [each for each in GenerationBody.__subclasses__() if each.media_kind == description.media_kind]
    fields = [field for body in bodies for field in sendable_arguments(body, description).values()]
    return tuple(dict.fromkeys(field for field in fields if field != "prompt"))
