"""Processors that need torchvision, named with the line to type where it is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import FeatureExtractionMixin, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

PROCESSORS = (ProcessorMixin, ImageProcessingMixin, FeatureExtractionMixin)
INSTALL = "pip install 'triptych[vision]'"


def lack_of_torchvision(folder: Path, classes: Mapping[str, Any]) -> str | None:
    """A sentence that names the processor which cannot be loaded without torchvision; None where there is none.

    To be asked when a pipeline could not be loaded: libraries tell of it in many ways.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return None
    for name, cls in classes.items():
        if is_processor(cls) and fails_without_torchvision(cls, folder / name):
            return (
                f"{cls.__name__} in {folder / name} needs torchvision, which is not installed: {INSTALL} "
                "(it takes the torchvision that fits torch)"
            )
    return None


def is_processor(cls: Any) -> bool:
    """Also what transformers exports in place of a class whose libraries are not installed."""
    is_stand_in = "torchvision" in (getattr(cls, "_backends", None) or ())
    return is_stand_in or (isinstance(cls, type) and (issubclass(cls, PROCESSORS) or cls.__name__.startswith("Auto")))


def fails_without_torchvision(cls: Any, folder: Path) -> bool:
    try:
        cls.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # noqa: BLE001  (whatever a processor raises whose parts are not there)
        return "torchvision" in str(error).lower() or "video" in str(error).lower()
    return False
