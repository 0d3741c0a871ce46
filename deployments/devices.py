"""The device that this process computes on: the seven documented names and how each is found."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from deployments.accelerators import VARIABLE


@dataclass(frozen=True)
class Device:
    """A device by its documented name and by torch's: ROCm's is `cuda` to torch."""

    name: str
    torch_device: torch.device


class DeviceError(ValueError):
    """The device asked for is not in this machine or not in this build of torch."""


def select_device(target: str) -> Device:
    """The device of that documented name. Raises DeviceError with what this machine has instead."""
    if target not in DEVICES:
        raise DeviceError(f"{VARIABLE} must be one of {', '.join(DEVICES)}, got {target!r}")
    kind = DEVICES[target]
    obstacle = kind.find_obstacle()
    if obstacle is not None:
        raise DeviceError(
            f"{VARIABLE}={target} cannot be used: {obstacle}. "
            f"This machine has: {', '.join(available_devices())}. {kind.hint}"
        )
    return Device(target, torch.device(kind.torch_type))


def available_devices() -> list[str]:
    """The documented names of the devices that can be used in this process."""
    return [name for name, kind in DEVICES.items() if kind.find_obstacle() is None]


def synchronize(device: Device) -> None:
    """Wait until the device has done all that was queued."""
    if device.torch_device.type != "cpu":
        torch.get_device_module(device.torch_device).synchronize()


class DeviceProbe:
    """A tiny operation that shows whether the device works.

    In a stream of its own, where the device has them, so that it need not wait for the work of others; its memory is
    taken now, when the device works.
    """

    def __init__(self, device: Device) -> None:
        self._numbers = torch.ones(2, device=device.torch_device)
        self._numbers.sum().item()  # waits until they are there, for the other stream too
        self._stream = _stream_of(device.torch_device)
        self()

    def __call__(self) -> None:
        """Raises what the device raises; does not return where it hangs."""
        with self._stream or nullcontext():
            if int(self._numbers.sum().item()) != len(self._numbers):
                raise RuntimeError("one and one are not two on this device")


def _stream_of(device: torch.device) -> Any:
    """None for devices without streams."""
    if device.type in ("cpu", "mps"):
        return None
    try:
        return torch.Stream(device)
    except (RuntimeError, NotImplementedError, TypeError):  # of a plugin
        return None


def memory_allocated(device: Device) -> int | None:
    """Bytes that tensors of this process hold on the device; None where torch does not count them."""
    return DEVICES[device.name].memory_allocated(device.torch_device)


def _missing_cuda() -> str | None:
    if torch.version.hip:
        return f"this torch {torch.__version__} is built for ROCm, whose name here is rocm"
    if not torch.version.cuda:
        return f"this torch {torch.__version__} is built without CUDA"
    return None if torch.cuda.is_available() else "no CUDA device or no driver was found"


def _missing_rocm() -> str | None:
    if not torch.version.hip:
        return f"this torch {torch.__version__} is built without ROCm"
    return None if torch.cuda.is_available() else "no ROCm device or no driver was found"


def _missing_xpu() -> str | None:
    return None if torch.xpu.is_available() else "no XPU was found, or this torch is built without XPU"


def _missing_mps() -> str | None:
    if not torch.backends.mps.is_built():
        return f"this torch {torch.__version__} is built without MPS"
    return None if torch.backends.mps.is_available() else "this system has no Metal device"


def _missing_plugin(name: str, package: str) -> str | None:
    # A plugin package that this torch has not loaded by itself is loaded here; one without its
    # vendor's libraries raises OSError or RuntimeError instead of ImportError.
    if torch._C._get_privateuse1_backend_name() != name:
        try:
            importlib.import_module(package)
        except (ImportError, OSError, RuntimeError) as error:
            return f"{package} cannot be imported ({error})"
    module = getattr(torch, name, None)
    if module is None or not module.is_available():
        return f"{package} found no device"
    return None


def _accelerator_memory(device: torch.device) -> int:
    return int(torch.get_device_module(device).memory_allocated())


def _mps_memory(_: torch.device) -> int:
    return int(torch.mps.current_allocated_memory())


def _uncounted_memory(_: torch.device) -> None:
    return None


@dataclass(frozen=True)
class _DeviceKind:
    torch_type: str
    find_obstacle: Callable[[], str | None]  # None: the device can be used; else why not
    hint: str
    memory_allocated: Callable[[torch.device], int | None] = _accelerator_memory


DEVICES: dict[str, _DeviceKind] = {
    "cuda": _DeviceKind("cuda", _missing_cuda, "CUDA needs an NVIDIA GPU and torch's CUDA build."),
    "rocm": _DeviceKind("cuda", _missing_rocm, "ROCm needs an AMD GPU and torch's ROCm build."),
    "xpu": _DeviceKind("xpu", _missing_xpu, "XPU needs an Intel GPU and torch's XPU build."),
    "npu": _DeviceKind(
        "npu",
        lambda: _missing_plugin("npu", "torch_npu"),
        "NPU needs Ascend's CANN and `pip install torch-npu` of torch's own version.",
    ),
    "musa": _DeviceKind(
        "musa",
        lambda: _missing_plugin("musa", "torch_musa"),
        "MUSA needs Moore Threads' SDK and torch_musa of torch's own version.",
    ),
    "mps": _DeviceKind("mps", _missing_mps, "MPS needs macOS on Apple silicon.", _mps_memory),
    "cpu": _DeviceKind("cpu", lambda: None, "", _uncounted_memory),
}
