"""What the tests of accelerations share: stages that hold given modules, and a watcher of kernel calls."""

from collections import Counter
from typing import Any

import torch

from deployments.devices import Device, select_device
from deployments.modules import Kernel, StageModules, unwrapped
from env_config.variables import EnvConfig

CPU = select_device("cpu")


def denoiser_stage(*, device: Device = CPU, wrap_kernel: Any = unwrapped, **denoisers: torch.nn.Module) -> StageModules:
    """A denoiser stage that holds these modules by name, on the CPU unless said otherwise."""
    return StageModules(("denoiser",), dict(denoisers), tuple(denoisers), (), device, wrap_kernel)


def vae_stage(vae: torch.nn.Module, device: Device = CPU, wrap_kernel: Any = unwrapped) -> StageModules:
    return StageModules(("vae",), {"vae": vae}, (), ("vae",), device, wrap_kernel)


def env(**variables: str) -> EnvConfig:
    """The configuration of a process with these variables, written without their prefix."""
    return EnvConfig.from_environ({f"SGLANG_{name}": value for name, value in variables.items()})


class KernelWatcher:
    """Counts the calls of every kernel by its name, as the kernel API log does."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __call__(self, name: str, kernel: Kernel) -> Kernel:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return kernel(*args, **kwargs)

        return watched
