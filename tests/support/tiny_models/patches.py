"""The few places where diffusers insists on full-size pictures or on a package that tests cannot have."""

from functools import partial
from typing import Any

from diffusers.pipelines.cosmos import pipeline_cosmos2_text2image, pipeline_cosmos_text2world
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_layered,
)

TINY_EDIT_AREA = 32 * 32  # pixels; these pipelines resize every input picture to an area of 384^2 to 1024^2

FULL_SIZE_DIMENSIONS = {
    module: module.calculate_dimensions
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus, pipeline_qwenimage_layered)
}
COSMOS_PIPELINES = (pipeline_cosmos_text2world, pipeline_cosmos2_text2image)


def tiny_patches() -> None:
    """Patch diffusers; every process that loads or runs a tiny model calls this, as often as it likes."""
    for module, calculate_dimensions in FULL_SIZE_DIMENSIONS.items():
        module.calculate_dimensions = partial(_at_tiny_area, calculate_dimensions)
    for module in COSMOS_PIPELINES:
        module.CosmosSafetyChecker = PermissiveGuardrail


class PermissiveGuardrail:
    """Stands for cosmos_guardrail's safety checker, which the Cosmos pipelines construct themselves."""

    def to(self, device: Any) -> "PermissiveGuardrail":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _at_tiny_area(calculate_dimensions: Any, target_area: int, ratio: float) -> Any:
    return calculate_dimensions(TINY_EDIT_AREA, ratio)
