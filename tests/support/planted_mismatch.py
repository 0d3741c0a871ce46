"""A fault planted into the process that holds the split against the unsplit pipeline: its VAE stage decodes wrongly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

# Imported by every Python process that finds it on its path.
SITE = "from tests.support.planted_mismatch import plant\n\nplant()\n"


def plant() -> None:
    if sys.orig_argv[1:3] != ["-m", "deployments.verify"]:
        return
    import torch

    from deployments.tensors.values import map_values
    from deployments.verify import split

    decode = split.decode_output

    def brighter(value: Any) -> Any:
        is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value * 1.01 + 1e-3 if is_floating else value

    split.decode_output = lambda *args: map_values(brighter, decode(*args))


def fault_in(folder: Path) -> str:
    """The folder with the fault, for PYTHONPATH."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    return str(folder)
