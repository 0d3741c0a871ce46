"""What a pipeline can do, as data: told from the inputs of its call, and whether they may be left out.

diffusers marks an input that its pipeline cannot do without in one of two ways: the parameter has no default, or it has
the default None although its annotation does not admit None (`image: PipelineImageInput = None`).
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch

from deployments.messages import MediaKind, Task
from deployments.stage_pipeline.argument_types import call_inputs

# The annotation says otherwise: whether these pipelines begin with a picture or a video, by what their code does.
NEEDS_INPUT: dict[str, bool] = {
    # Optional in the signature, but used without a check, or replaced only by latents, which callers cannot give.
    "BriaFiboEditPipeline": True,
    "Flux2KleinInpaintPipeline": True,
    "FluxFillPipeline": True,
    "FluxKontextInpaintPipeline": True,
    "JoyImageEditPipeline": True,
    "LongCatImageEditPipeline": True,
    "QwenImageEditInpaintPipeline": True,
    "QwenImageEditPipeline": True,
    "QwenImageEditPlusPipeline": True,
    # Their `audio` is None by default, and refused.
    "StableAudio3AudioToAudioPipeline": True,
    "StableAudio3InpaintPipeline": True,
    # Conditions may be left out: it makes a video of the prompt alone, like LTXPipeline.
    "LTXConditionPipeline": False,
}
# Their `video` is what another pipeline's decoder made, to be enlarged as latents: no prompt says how to edit it.
ENLARGES_LATENTS = frozenset({"LTXLatentUpsamplePipeline", "LTX2LatentUpsamplePipeline"})

SOUNDS = ("audio", "src_audio", "reference_audio", "initial_audio_waveforms")  # parameters that begin a sound
TENSORS = (torch.Tensor, torch.FloatTensor)  # as annotations; the second is no subclass of the first


def tasks_of(pipeline_class: type, kind: MediaKind) -> tuple[Task, ...]:
    """The tasks of a pipeline that makes `kind`; those that begin with the prompt alone come first.

    Empty where callers can only give tensors (decoders of a prior) or nothing at all (unconditional models).
    """
    return tuple(TASKS_OF[kind](pipeline_class, call_inputs(pipeline_class)))


def _picture_tasks(pipeline_class: type, inputs: dict[str, inspect.Parameter]) -> Iterator[Task]:
    if _begins_with_text(pipeline_class, inputs):
        yield "text_to_image"
    if "image" in inputs and ("mask_image" not in inputs or not getattr(pipeline_class, "needs_mask", True)):
        yield "image_to_image"
    if "image" in inputs and "mask_image" in inputs:
        yield "inpainting"


def _video_tasks(pipeline_class: type, inputs: dict[str, inspect.Parameter]) -> Iterator[Task]:
    if _begins_with_text(pipeline_class, inputs):
        yield "text_to_video"
    if "image" in inputs:
        yield "image_to_video"
    is_edited = pipeline_class.__name__ not in ENLARGES_LATENTS
    if "video" in inputs and is_edited and not _is_tensor(inputs["video"]):
        yield "video_to_video"


def _sound_tasks(pipeline_class: type, inputs: dict[str, inspect.Parameter]) -> Iterator[Task]:
    if _begins_with_text(pipeline_class, inputs):
        yield "text_to_audio"
    if any(name in inputs for name in SOUNDS):
        yield "audio_to_audio"


def _feature_tasks(pipeline_class: type, inputs: dict[str, inspect.Parameter]) -> Iterator[Task]:
    if _begins_with_text(pipeline_class, inputs):
        yield "feature_extraction"
    if "image" in inputs:
        yield "image_feature_extraction"


TASKS_OF: dict[MediaKind, Callable[[type, dict[str, inspect.Parameter]], Iterator[Task]]] = {
    "image": _picture_tasks,
    "video": _video_tasks,
    "audio": _sound_tasks,
    "tensors": _feature_tasks,
}


def _begins_with_text(pipeline_class: type, inputs: dict[str, inspect.Parameter]) -> bool:
    starts = [inputs[name] for name in ("image", "video") if name in inputs]
    needs_input = NEEDS_INPUT.get(pipeline_class.__name__, any(_is_needed(start) for start in starts))
    needs_tensor = any(each.default is each.empty and _is_tensor(each) for each in inputs.values())
    return "prompt" in inputs and not needs_input and not needs_tensor


def _is_needed(parameter: inspect.Parameter) -> bool:
    """Without a default, or with None for one that the annotation does not admit."""
    if parameter.default is parameter.empty:
        return True
    return parameter.default is None and bool(_choices(parameter)) and type(None) not in _choices(parameter)


def _is_tensor(parameter: inspect.Parameter) -> bool:
    """Only a tensor will do: neither a picture nor a list of pictures."""
    choices = [choice for choice in _choices(parameter) if choice is not type(None)]
    return bool(choices) and all(choice in TENSORS for choice in choices)


def _choices(parameter: inspect.Parameter) -> tuple[Any, ...]:
    """The types that an annotation lists; empty where there is none, or one that cannot be evaluated."""
    annotation = parameter.annotation
    if annotation is parameter.empty or isinstance(annotation, str):
        return ()
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)
