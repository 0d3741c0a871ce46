"""Libraries as the tests expect them: torchvision beside any torch, old pipelines where they were."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import types
from typing import Any

_kept: list[Any] = []  # a library of torch lives as long as its object


def make_torchvision_usable() -> None:
    """Processors of transformers need its Python code alone; its operators may be built for another torch."""
    if importlib.util.find_spec("torchvision") is None:
        return
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        _forget("torchvision")
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


def restore_old_names() -> None:
    """Older tests import deprecated pipelines from where they were, and diffusers as `src.diffusers`."""
    import diffusers
    from diffusers.pipelines import deprecated

    prefix = "diffusers.pipelines.deprecated."
    for found in pkgutil.walk_packages(deprecated.__path__, prefix):
        try:
            module = importlib.import_module(found.name)
        except (ImportError, RuntimeError):  # it needs a library that is not here
            continue
        sys.modules.setdefault("diffusers.pipelines." + found.name.removeprefix(prefix), module)
    sys.modules.setdefault("src", types.ModuleType("src"))
    sys.modules.setdefault("src.diffusers", diffusers)


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        del sys.modules[name]
