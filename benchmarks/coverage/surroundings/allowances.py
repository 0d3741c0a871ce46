"""What the tests themselves set up beside the components, so that a tiny pipeline can be called on a CPU."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

SIDE = 64  # pixels: editing pipelines bring every picture to an area of up to 1024 x 1024

# Our tokenizers make more tokens of a template than the published ones.
MORE_ARGUMENTS: dict[str, dict[str, Any]] = {"Kandinsky5I2IPipeline": {"max_sequence_length": 512}}


def allow_small_pictures() -> None:
    for name, module in list(sys.modules.items()):
        original = getattr(module, "calculate_dimensions", None)
        if name.startswith("diffusers.pipelines.") and callable(original) and not hasattr(original, "is_small"):
            setattr(module, "calculate_dimensions", _small(original))  # noqa: B010  (a module has no such attribute)


def leave_guardrails_out() -> None:
    """Cosmos refuses to work without a library of safety models, which the tests replace as well."""
    from diffusers.pipelines import cosmos

    for found in pkgutil.iter_modules(cosmos.__path__):
        module: Any = importlib.import_module(f"diffusers.pipelines.cosmos.{found.name}")
        if hasattr(module, "CosmosSafetyChecker"):
            module.CosmosSafetyChecker = _Permissive


def after_load(pipeline: Any) -> None:
    """What a test switches on before its call; no checkpoint can say it."""
    if type(pipeline).__name__ == "AllegroPipeline":
        pipeline.vae.enable_tiling()


class _Permissive:
    def to(self, device: Any) -> _Permissive:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _small(original: Any) -> Any:
    def calculate_dimensions(target_area: int, ratio: float) -> Any:
        return original(SIDE * SIDE, ratio)

    setattr(calculate_dimensions, "is_small", True)  # noqa: B010
    return calculate_dimensions
