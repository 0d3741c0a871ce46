"""What the unsplit pipeline makes, and how an output is compared with it: bit for bit."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from PIL import Image

from benchmarks.coverage.surroundings.allowances import after_load

SEED = 0
Compared = Literal["same", "differs", "nothing"]
Leaves = list[Any]
ARRAYS = (torch.Tensor, np.ndarray, np.generic)


def load_unsplit(folder: Path) -> Any:
    if not (folder / "model_index.json").is_file():
        from tests.support.tiny_models.modular import load_modular  # not before: diffusers' package is `tests` as well

        return load_modular(folder)
    pipeline = DiffusionPipeline.from_pretrained(str(folder), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    after_load(pipeline)
    return pipeline


def call_unsplit(pipeline: Any, arguments: dict[str, Any], output_type: str = "pt") -> Leaves:
    """The leaves of its output; the global and the request's generator begin at SEED."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    generator = torch.Generator("cpu").manual_seed(SEED)
    own = {"generator": generator, "output_type": output_type}
    if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        own = {name: value for name, value in own.items() if name in parameters}
    torch.manual_seed(SEED)
    if isinstance(pipeline, ModularPipeline):
        from tests.support.tiny_models.modular import call_modular

        return output_leaves(call_modular(pipeline, copy.deepcopy(arguments), generator))
    with torch.no_grad():
        return output_leaves(pipeline(**copy.deepcopy(arguments) | own))


def output_leaves(output: Any) -> Leaves:
    """Numbers and words; of a picture its pixels, of an object its class and numbers."""
    leaves: Leaves = []
    for leaf in torch.utils._pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output):
        if isinstance(leaf, Image.Image):
            leaves.append(np.asarray(leaf))
        elif isinstance(leaf, (*ARRAYS, str, bool, int, float, type(None))):
            leaves.append(leaf)
        else:
            numbers = {k: v for k, v in vars(leaf).items() if isinstance(v, torch.Tensor | int | float)}
            leaves += [f"object {type(leaf).__name__}", *(numbers[name] for name in sorted(numbers))]
    return leaves


def compare(made: Leaves, truth: Leaves) -> tuple[Compared, str]:
    """With a sentence where they differ; "nothing" where the truth has neither numbers nor pixels."""
    if len(made) != len(truth):
        return "differs", f"{len(made)} values in place of {len(truth)}"
    worst, differing, compared = 0.0, 0, 0
    for a, b in zip(made, truth, strict=True):
        if not isinstance(b, ARRAYS):
            if a != b:
                return "differs", f"{str(a)[:80]} in place of {str(b)[:80]}"
            continue
        a, b = np.asarray(a), np.asarray(b)
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return "differs", f"{a.dtype}{list(a.shape)} in place of {b.dtype}{list(b.shape)}"
        compared += 1
        if a.tobytes() != b.tobytes() and not np.array_equal(a, b):
            differing += 1
            worst = max(worst, float(np.nanmax(np.abs(a.astype(float) - b.astype(float)))))
    if differing:
        return "differs", f"{differing} of {compared} tensors differ, by up to {worst:.3g}"
    return ("same" if compared else "nothing"), ""


def all_finite(leaves: Leaves) -> bool:
    arrays = [np.asarray(leaf) for leaf in leaves if isinstance(leaf, ARRAYS)]
    return all(bool(np.isfinite(each).all()) for each in arrays if each.dtype.kind == "f")
