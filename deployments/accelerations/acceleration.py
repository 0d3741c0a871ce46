"""What an acceleration is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deployments.modules import StageModules
from env_config.variables import EnvConfig


@dataclass(frozen=True)
class Acceleration:
    """One acceleration: when it is on, and how it is put into the modules of a stage, once, at start.

    `install` returns the line for the log that says what was done or why there was nothing to do.
    It raises AccelerationError when what was asked for cannot be done. `settings` are those of the variables that
    change the denoiser's numbers: a checkpoint made under others means start again. Their `repr` is compared.
    """

    name: str
    is_on: Callable[[EnvConfig], bool]
    install: Callable[[StageModules, EnvConfig], str]
    settings: Callable[[EnvConfig], object] = lambda env: None
