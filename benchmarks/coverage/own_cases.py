"""The tiny models of Triptych's own tests as cases, for classes that diffusers has no tiny components of."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from benchmarks.coverage.cases import Case
from benchmarks.coverage.checkpoint import NOT_ARGUMENTS, TestCall
from benchmarks.coverage.exported import exported_class
from tests.support.tiny_models import TINY_MODELS, checkpoint, request_arguments, tiny_model, tiny_patches
from tests.support.tiny_models.checkpoints import BY_NAME


def own_cases(only: str = "") -> list[Case]:
    """Of the classes that match `only`. Diffusers is patched in this process, for those that are forked from it."""
    tiny_patches()
    names = [name for name in (*TINY_MODELS, *BY_NAME) if tiny_model(name).after_load is None]
    cases = [Case(name, _class_of(name), partial(save_tiny_model, name), name) for name in names]
    return [case for case in cases if re.search(only, case.pipeline)]


def save_tiny_model(name: str, folder: Path) -> TestCall:
    assert folder.name == name, "a tiny model is known by its folder"
    checkpoint(name, folder.parent)
    arguments = {name: value for name, value in request_arguments(name).items() if name not in NOT_ARGUMENTS}
    return TestCall(arguments, None)


def _class_of(name: str) -> str:
    pipeline, _ = tiny_model(name).build()
    name_of_class: str = exported_class(type(pipeline)).__name__
    return name_of_class
