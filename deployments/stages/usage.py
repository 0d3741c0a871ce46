"""What a request was, counted: the tokens of its words, and the places of latents that its pictures stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deployments.media.files import FileToWrite
from deployments.media.opening import read_header
from deployments.messages import GenerationRequest, InputImage, Usage
from deployments.stage_pipeline.description import frame_multiple, size_multiple
from deployments.stage_pipeline.loading import StagePipeline
from deployments.stages.encode import MAX_INPUT_PIXELS

TEXTS = ("prompt", "negative_prompt")


def usage_of(stage: StagePipeline, request: GenerationRequest, files: tuple[FileToWrite, ...]) -> Usage:
    """As `Usage` says."""
    side, frames = size_multiple(stage), frame_multiple(stage)

    def places(width: int, height: int, num_frames: int = 1) -> int:
        latent_frames = 1 + -(-(num_frames - 1) // frames)
        return -(-width // side) * -(-height // side) * latent_frames

    made = [(*file.frames[0].shape[1::-1], len(file.frames)) for file in files if file.frames]
    return Usage(
        text_tokens=sum(_text_tokens(stage, request.arguments.get(name)) for name in TEXTS),
        image_tokens=sum(places(*_size(picture)) for picture in _pictures(list(request.arguments.values()))),
        output_tokens=sum(places(*size) for size in made),
    )


def _text_tokens(stage: StagePipeline, text: Any) -> int:
    """By the pipeline's first tokenizer, whole and without the marks that it adds; 0 where it has none."""
    tokenizer: Any = getattr(stage.pipeline, "tokenizer", None)
    texts = text if isinstance(text, list) else [text]
    if not hasattr(tokenizer, "tokenize"):
        return 0
    return sum(len(tokenizer.tokenize(each)) for each in texts if isinstance(each, str))


def _pictures(values: list[Any]) -> Iterator[InputImage]:
    for value in values:
        if isinstance(value, list | dict):
            yield from _pictures(list(value.values()) if isinstance(value, dict) else value)
        elif isinstance(value, InputImage):
            yield value


def _size(picture: InputImage) -> tuple[int, int]:
    header = read_header(picture.data, "image", MAX_INPUT_PIXELS)
    return header.width, header.height
