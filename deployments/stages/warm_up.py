"""The requests that a replica makes before it takes any, each stage for itself. Knows no Ray.

The encoder encodes them, the denoiser denoises what the encoder made of them, alone and two at once, and compiles what
is to be compiled; the VAE stage decodes what a denoiser would have handed over, with drawn numbers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from deployments.errors import CheckpointError
from deployments.messages import Conditioning, DecodeInputs, DenoisingProgress, GenerationRequest, StageDescription
from deployments.model import ModelArgs
from deployments.needed_inputs import OUTPUTS, needed_inputs
from deployments.stage_pipeline.argument_types import as_taken, fits
from deployments.stage_pipeline.hand_off import pack_outcome
from deployments.stage_pipeline.inputs.fields import argument_fields
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stage_pipeline.sessions.denoise import DenoiseSession
from deployments.stage_pipeline.sessions.plays.play import drawn_output
from deployments.stages.decode import Decoded, decode
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoisingFollower
from deployments.stages.effects import in_json_words
from deployments.stages.encode import call_arguments, unpack_conditioning
from deployments.tensors.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

PLAIN_SIDE = 512  # pixels of a picture where the model has no size of its own
SIDES = ("width", "height")
COUNTS = ("num_inference_steps", "num_frames")

Tell = Callable[[str], None]


def warm_up_requests(stage: StagePipeline, description: StageDescription, model: ModelArgs) -> list[GenerationRequest]:
    """Those of `warm_up`, over the default arguments, with made-up words and pictures where the call needs some.

    Raises CheckpointError that names the entry, the argument, its value and what is allowed.
    """
    requests = []
    for index, each in enumerate(model.warm_up):
        given = with_sides(f"warm_up[{index}]", each, description)
        checked = {
            name: _checked(f"warm_up[{index}].{name}", name, value, stage, description) for name, value in given.items()
        }
        side = checked.get("width") or description.default_width or PLAIN_SIDE
        arguments = needed_inputs(description, side) | model.default_arguments | checked
        output = OUTPUTS[description.media_kind]
        requests.append(GenerationRequest(f"warm-up-{index + 1}", model.name, arguments, 0, output))
    return requests


def with_sides(place: str, given: dict[str, Any], description: StageDescription) -> dict[str, Any]:
    """With width and height in place of a size, as callers write it; raises CheckpointError."""
    if "size" not in given or "size" in description.parameters:
        return given
    size = given["size"]
    sides = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size) if isinstance(size, str) else None
    if sides is None:
        raise CheckpointError(f"{place}.size: must be like 1024x1024, got {size!r}")
    others = {name: value for name, value in given.items() if name != "size"}
    return others | dict(zip(SIDES, map(int, sides.groups()), strict=True))


def _checked(place: str, name: str, value: Any, stage: StagePipeline, description: StageDescription) -> Any:
    if name not in description.parameters:
        known = ", ".join(sorted(description.parameters))
        raise CheckpointError(f"{place}: {description.pipeline_class} does not take it; it takes {known}")
    wanted = argument_fields(type(stage.pipeline))[name].type
    if not fits(as_taken(type(stage.pipeline), {name: value})[name], wanted):
        raise CheckpointError(f"{place}: must be {in_json_words(wanted)}, got {value!r}")
    multiple = description.size_multiple if name in SIDES else 1
    if name in (*SIDES, *COUNTS) and isinstance(value, int) and (value < 1 or value % multiple):
        allowed = f"a positive multiple of {multiple}" if multiple > 1 else "at least 1"
        raise CheckpointError(f"{place}: must be {allowed}, got {value}")
    return value


def warm_denoiser(denoiser: DenoiserStage, request: GenerationRequest, conditioning: Conditioning, tell: Tell) -> None:
    """Alone, then two at once where forwards may be merged: batches are compiled and verified too.

    Where only the guidance passes of one request may be, alone again.
    """

    def progress(step: DenoisingProgress) -> None:
        tell(f"step {step.step} of {step.num_steps}")

    follower = DenoisingFollower(progress=progress)
    with denoiser.compiled.warming_up():
        denoiser.denoise(request, conditioning, follower=follower)
        args = denoiser.args
        if (
            args.deterministic
            or request.deterministic
            or (args.max_batch_size == 1 and args.guidance_passes == "apart")
        ):
            return
        names = "ab" if args.max_batch_size > 1 else "a"
        both = [
            replace(request, request_id=f"{request.request_id}-{name}", seed=seed) for seed, name in enumerate(names)
        ]
        tell("two at once" if len(both) > 1 else "its guidance passes at once")
        with denoiser.engine.merging_always(), ThreadPoolExecutor(len(both)) as threads:
            list(threads.map(lambda each: denoiser.denoise(each, conditioning, follower=follower), both))


def warm_vae(stage: StagePipeline, request: GenerationRequest, conditioning: Conditioning) -> Decoded | None:
    """The pipeline's own loop with drawn numbers in place of what its denoisers return, and its real decoders.

    Returns the files that are to be written, or None for a pipeline whose loop cannot be played so, which is told.
    Raises DeviceFullError or TooLargeForDeviceError.
    """

    def played(module: Any, component: str, context: Any, args: Any, kwargs: Any) -> Any:
        return drawn_output(stage, component, args, kwargs)

    def made() -> DecodeInputs | None:
        calls = unpack_conditioning(conditioning, stage)
        session = DenoiseSession(stage, call_arguments(stage, request), request.seed, calls, run_denoiser=played)
        try:
            return pack_outcome(session.run(), session.device, session.steps_done)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # Of a loop that is only played: it says nothing of true requests.
            logger.warning("warm-up: the VAE stage is not warmed up by %s: %s", request.request_id, error)
            return None

    inputs = stage.memory.run(made, is_steady=request.deterministic)  # its decoders are called in it
    return None if inputs is None else decode(stage, request, inputs)
