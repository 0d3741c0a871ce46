"""Tiny random-weight checkpoints of many families, and what their unsplit pipelines return."""

from tests.support.tiny_models.checkpoints import (
    MODULAR_MODELS,
    TINY_MODELS,
    checkpoint,
    request_arguments,
    run_unsplit,
    tiny_model,
)
from tests.support.tiny_models.patches import tiny_patches
from tests.support.tiny_models.tiny_model import TinyModel

__all__ = [
    "MODULAR_MODELS",
    "TINY_MODELS",
    "TinyModel",
    "checkpoint",
    "request_arguments",
    "run_unsplit",
    "tiny_model",
    "tiny_patches",
]
