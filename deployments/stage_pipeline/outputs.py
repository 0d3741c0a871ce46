"""What a pipeline makes, read from its class: the kind of medium, how to ask for it, and the rate of its sound."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from deployments.errors import CheckpointError
from deployments.media.fields import FIELDS_OF, TEXTS
from deployments.messages import MediaKind

# Forms of an output, the best first: tensors keep all that the model made, and the decoder's process can hand them on.
OUTPUT_TYPES = ("pt", "np", "pil")
SAMPLE_RATES = ("output_sampling_rate", "sampling_rate", "sample_rate")  # the first is that of a vocoder that resamples
MAKERS_OF_SOUND = ("vocoder", "vae", "audio_vae", "sound_tokenizer")  # before the others: what makes the waves


def media_kind(pipeline_class: type) -> MediaKind:
    """Told by the output classes that the pipeline's module uses.

    Tensors are what is neither seen nor heard: embeddings of a prior, coordinates. Raises CheckpointError for a
    pipeline that makes text, or nothing that is known.
    """
    fields = {field for value in output_classes(pipeline_class) for field in getattr(value, "__dataclass_fields__", ())}
    for kind, names in FIELDS_OF.items():
        if fields & set(names):
            return kind
    if not fields or fields & set(TEXTS):
        made = "text" if fields else "nothing known"
        raise CheckpointError(f"{pipeline_class.__name__} makes {made}; pictures, videos, sound and tensors are served")
    return "tensors"


def output_classes(pipeline_class: Any) -> list[type[BaseOutput]]:
    """The one that the class says it returns (modular pipelines), or all that its module uses.

    A combined pipeline may use none of its own: it returns what the last of its pipelines returns.
    """
    if said := getattr(pipeline_class, "output_class", None):
        return [said]
    used = [value for value in vars(sys.modules[pipeline_class.__module__]).values() if isinstance(value, type)]
    own = [value for value in used if issubclass(value, BaseOutput)]
    others = [value for value in used if issubclass(value, DiffusionPipeline)]
    return own or [
        each for other in others if other not in (pipeline_class, DiffusionPipeline) for each in output_classes(other)
    ]


def own_arguments(pipeline_class: type, generator: torch.Generator) -> dict[str, Any]:
    """What Triptych itself sets in a call of the pipeline, of what it takes."""
    parameters = inspect.signature(pipeline_class.__call__).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    own = {"output_type": output_type(pipeline_class), "generator": generator}
    return {name: value for name, value in own.items() if takes_any or name in parameters}


@functools.cache
def output_type(pipeline_class: type) -> str:
    """The first of OUTPUT_TYPES that the pipeline does not refuse, as its code says: `output_type not in [...]`."""
    allowed = [choices for function in _checking(pipeline_class) for choices in _choices(function)]
    return next((each for each in OUTPUT_TYPES if all(each in choices for choices in allowed)), OUTPUT_TYPES[0])


def sample_rate(pipeline: Any) -> int | None:
    """Samples per second of the sound that the pipeline makes, where a component or the pipeline itself says it."""
    names = [name for name in MAKERS_OF_SOUND if name in pipeline.components]
    names += [name for name, value in pipeline.components.items() if isinstance(value, torch.nn.Module)]
    owners = [getattr(getattr(pipeline, name, None), "config", None) for name in names]
    for owner in (*owners, pipeline):
        for name in SAMPLE_RATES:
            rate = getattr(owner, name, None)
            if isinstance(rate, int | float) and rate > 0:
                return int(rate)
    return None


def makes_linear_light(pipeline: Any) -> bool:
    """Whether its frames are linear light without an upper bound, for high dynamic range."""
    return any(hasattr(value, "postprocess_hdr_video") for value in vars(pipeline).values())


def _checking(pipeline_class: type) -> Iterator[Any]:
    for name in ("__call__", "check_inputs"):
        if (function := getattr(pipeline_class, name, None)) is not None:
            yield inspect.unwrap(function)


def _choices(function: Any) -> Iterator[set[Any]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # without a source nothing is known to be refused
        return
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Compare)
            and isinstance(node.left, ast.Name)
            and node.left.id == "output_type"
            and isinstance(node.ops[0], ast.NotIn)
            and isinstance(node.comparators[0], ast.List | ast.Tuple | ast.Set)
        ):
            yield {item.value for item in node.comparators[0].elts if isinstance(item, ast.Constant)}
