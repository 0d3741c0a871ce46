"""The modules of one stage that are real in this process: what accelerations and features may change at its start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.devices import Device
from deployments.messages import StageName
from deployments.model import CompileMode

Kernel = Callable[..., Any]


class AccelerationError(ValueError):
    """An acceleration was asked for and cannot be had in this process; the sentence names what to change."""


def unwrapped(name: str, kernel: Kernel) -> Kernel:
    """The kernel itself: nobody watches the calls."""
    return kernel


@dataclass(frozen=True)
class StageModules:
    """The modules of one stage that are real in this process."""

    stages: tuple[StageName, ...]
    components: dict[str, torch.nn.Module]  # by the pipeline's component names
    denoisers: tuple[str, ...]  # names among the components, the first is the primary one
    autoencoders: tuple[str, ...]  # names among the components
    device: Device
    # Every kernel entry point that an acceleration installs goes through here, by a name such as
    # "attention.transformer.flash"; the kernel API log hangs its watcher in.
    wrap_kernel: Callable[[str, Kernel], Kernel] = unwrapped
    compile: Mapping[str, CompileMode] = field(default_factory=dict)  # of denoisers
    switches: dict[str, Any] = field(default_factory=dict)  # of those that are compiled (accelerations.compile.Switch)

    def parts(self, names: tuple[str, ...]) -> dict[str, torch.nn.Module]:
        """The components of those names."""
        return {name: self.components[name] for name in names}
