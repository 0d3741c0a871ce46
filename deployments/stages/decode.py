"""The VAE stage without Ray: the inputs of the decoders in, pixels, sound or tensors out."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from deployments.media.files import FileToWrite
from deployments.media.outputs import Making, files_to_write
from deployments.messages import DecodeInputs, GenerationRequest, Usage
from deployments.stage_pipeline.description import call_parameters
from deployments.stage_pipeline.hand_off import unpack_outcome
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.outputs import makes_linear_light, sample_rate
from deployments.stage_pipeline.sessions.decode import DecodeSession
from deployments.stage_pipeline.sessions.denoise import Result
from deployments.stages.encode import call_arguments
from deployments.stages.usage import usage_of

DEFAULT_FPS = 16.0


@dataclass(frozen=True)
class Decoded:
    """What one request made; the files are still to be written."""

    files: tuple[FileToWrite, ...]
    seconds: dict[str, float]
    usage: Usage

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def decode(stage: StagePipeline, request: GenerationRequest, inputs: DecodeInputs) -> Decoded:
    """The files to write.

    Raises HandOffError where the picture would not be the pipeline's own, DeviceFullError or TooLargeForDeviceError.
    """
    started = time.perf_counter()

    def work() -> tuple[FileToWrite, ...]:
        output = decode_output(stage, request, inputs)
        return files_to_write(output, request, making_of(stage, made_of(request, inputs)))

    files = stage.memory.run(work, is_steady=request.deterministic)
    usage = usage_of(stage, request, files)
    return Decoded(files, {"decode": time.perf_counter() - started}, usage)


def made_of(request: GenerationRequest, inputs: DecodeInputs) -> dict[str, Any]:
    """What the file says of its making besides what was asked: steps, and warnings where there are any.

    None about the answer or of the moment: the same work makes the same bytes.
    """
    warnings = [asdict(warning) for warning in (*request.left_out, *inputs.warnings)]
    return {"steps": inputs.num_steps} | ({"warnings": warnings} if warnings else {})


def decode_output(stage: StagePipeline, request: GenerationRequest, inputs: DecodeInputs) -> Any:
    """What the unsplit pipeline would have returned."""

    def work() -> Any:
        outcome = unpack_outcome(inputs, stage)
        if isinstance(outcome, Result):
            return outcome.output
        return DecodeSession(stage, call_arguments(stage, request), request.seed, outcome).run()

    return stage.memory.run(work, is_steady=request.deterministic)


def making_of(stage: StagePipeline, metadata: dict[str, Any]) -> Making:
    """How what the pipeline made is to be read; `metadata`: more of the files."""
    pipeline = stage.pipeline
    return Making(default_fps(stage), sample_rate(pipeline), metadata, makes_linear_light(pipeline))


def default_fps(stage: StagePipeline) -> float:
    """Frames per second that the pipeline makes its motion for, where it says so; else 16, Wan's."""
    parameters, _ = call_parameters(type(stage.pipeline))
    return float(parameters.get("frame_rate") or parameters.get("fps") or DEFAULT_FPS)
