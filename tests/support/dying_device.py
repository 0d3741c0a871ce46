"""A plugin for torch whose device is simulated, and dies in the process that next finds the file named by DIES_AT."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tests.support import simulated_accelerator

DIES_AT = "TRIPTYCH_TEST_DEVICE_DIES_AT"  # set by tests
# What is imported as torch_npu; diffusers takes from it what FLUX does not call.
PLUGIN = "from tests.support.dying_device import install\n\nnpu_fusion_attention = None\ninstall()\n"


def install() -> None:
    simulated_accelerator.install("npu")
    torch.get_device_module("npu").is_available = lambda: True
    simulated_accelerator.before_operations.append(Death(Path(os.environ[DIES_AT])))


class Death:
    """As of a device that is lost: all that it is asked from then on fails. The file is removed: no other one dies."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._is_dead = False

    def __call__(self) -> None:
        if not self._is_dead and self._file.exists():
            self._file.unlink()
            self._is_dead = True
        if self._is_dead:
            raise torch.AcceleratorError("the device is lost")


def plugin_in(folder: Path) -> str:
    """The folder with the plugin, for PYTHONPATH."""
    folder.mkdir()
    (folder / "torch_npu.py").write_text(PLUGIN)
    return str(folder)
