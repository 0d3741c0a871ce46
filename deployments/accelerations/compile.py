"""torch.compile for the denoisers of a stage: their repeated blocks (diffusers' regional compilation), or all of a
forward. Nothing is compiled here: `compiled_forwards` says which forwards are.

LoRAs come and go as they like: a layer with room for them calls one operator (`deployments.adapters.forward`), and what
is compiled knows nothing of them but the layers, which are there from the first LoRA on that is for them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from deployments.accelerations.acceleration import Acceleration
from deployments.devices import Device
from deployments.model import CompileMode
from deployments.modules import AccelerationError, StageModules
from env_config.variables import EnvConfig

BACKEND = "inductor"
# Of one class of blocks: one for lone samples, one for batches, both again with free sizes, and that for each feature.
OPTIONS: dict[str, Any] = {"recompile_limit": 32}

Function = Callable[..., Any]
Path = tuple[Any, ...]  # from the arguments' root to a value: ("hidden_states",) or ("x", 0)


@dataclass(eq=False)
class Switch:
    """Of one component: whether the forward under way is compiled, and where in its arguments the batch is."""

    mode: CompileMode
    is_on: bool = False
    num_samples: int = 1
    batch_axes: Mapping[Path, Any] | None = None  # learned, by argument; None: nobody knows


class Switched:
    """A function in two forms, as it was and compiled; the switch of its component says which is called.

    The size of a batch is no part of what is compiled: the axes of the batch are marked as free.
    """

    def __init__(self, switch: Switch, eager: Function, compiled: Function) -> None:
        functools.update_wrapper(self, eager)
        self._switch = switch
        self._eager = eager
        self._compiled = compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._switch.is_on:
            return self._eager(*args, **kwargs)
        if self._switch.num_samples > 1:
            self._mark_batch(args, kwargs)
        return self._compiled(*args, **kwargs)

    def _mark_batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of a whole forward the learned axes; of what is inside it, whatever has a row for each sample."""
        num_samples, learned = self._switch.num_samples, self._switch.batch_axes
        if self._switch.mode == "whole" and learned is not None:
            for (name, *rest), axis in learned.items():
                if isinstance(axis, int) and not rest and isinstance(kwargs.get(name), torch.Tensor):
                    torch._dynamo.maybe_mark_dynamic(kwargs[name], axis)
            return
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == num_samples:
                torch._dynamo.maybe_mark_dynamic(value, 0)


def install(modules: StageModules, env: EnvConfig) -> str:
    """Give each denoiser that is to be compiled its two forms; the switches go into `modules.switches`.

    Raises AccelerationError for one that has no repeated blocks, and where this process can compile nothing.
    """
    modes = {name: mode for name, mode in modules.compile.items() if mode != "off" and name in modules.components}
    if not modes:
        return ""
    check_compiler(modules.device, BACKEND)
    told = []
    for name, mode in modes.items():
        modules.switches[name] = Switch(mode)
        counts = FORMS[mode](name, modules.components[name], modules.switches[name], BACKEND)
        told.append(f"{mode} in {name} ({', '.join(f'{n} x {kind}' for kind, n in counts.items())})")
    return f"compile: {'; '.join(told)}, from the second request of a kind on"


COMPILE = Acceleration("compile", lambda env: True, install)  # asked for in the arguments, not by a variable


def give_blocks_two_forms(name: str, component: Any, switch: Switch, backend: str) -> Counter[str]:
    """The blocks that diffusers names for it."""
    if not callable(getattr(component, "compile_repeated_blocks", None)):
        raise _without_blocks(name, component)
    try:
        component.compile_repeated_blocks(backend=backend, **OPTIONS)
    except ValueError as error:
        raise _without_blocks(name, component) from error
    blocks = [module for module in component.modules() if module._compiled_call_impl is not None]
    for block in blocks:
        block._compiled_call_impl = Switched(switch, block._call_impl, block._compiled_call_impl)
    return Counter(type(block).__name__ for block in blocks)


def give_forward_two_forms(name: str, component: Any, switch: Switch, backend: str) -> Counter[str]:
    """In place of the forward that is found: Cache-DiT, which comes later, keeps it for what it does not cache."""
    forward = component.forward
    compiled = torch.compile(forward, backend=backend, **OPTIONS)
    component.forward = Switched(switch, forward, compiled)
    return Counter([type(component).__name__])


FORMS: dict[str, Callable[[str, Any, Switch, str], Counter[str]]] = {
    "regional": give_blocks_two_forms,
    "whole": give_forward_two_forms,
}


def _without_blocks(name: str, component: Any) -> AccelerationError:
    return AccelerationError(
        f"compile: {name}: regional is not possible, {type(component).__name__} names no repeated blocks; "
        "allowed are off and whole"
    )


def check_compiler(device: Device, backend: str) -> None:
    """Compiles a small function. Raises AccelerationError that says what is missing on this machine."""
    told = f"compile: nothing can be compiled on {device.name}"
    try:
        numbers = torch.linspace(0, 1, 8, device=device.torch_device)
        with torch.no_grad():
            compiled = torch.compile(_small_function, backend=backend)(numbers)
    except Exception as error:  # whatever a compiler that is not there makes torch raise
        needed = NEEDED.get(device.torch_device.type, "what torch.compile needs for this device")
        cause = getattr(error, "inner_exception", error)
        first = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise AccelerationError(f"{told}, which needs {needed} ({first}). Install it, or leave compile: off") from error
    if not torch.allclose(compiled, _small_function(numbers), rtol=1e-3, atol=1e-3):
        raise AccelerationError(f"{told}: what was compiled gives wrong numbers. Leave compile: off")


NEEDED = {
    "cpu": "a C++ compiler (g++ or clang++) and Python's header files",
    "cuda": "Triton, a C compiler, and a GPU of compute capability 7.0 or newer",
    "xpu": "Triton and a C compiler",
}


def _small_function(numbers: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(numbers) * 2 + 1


def modes_of(asked: CompileMode | Mapping[str, CompileMode], denoisers: Iterable[str]) -> dict[str, CompileMode]:
    """The mode of each denoiser of a pipeline. Raises AccelerationError for a name that is none of theirs."""
    names = tuple(denoisers)
    if isinstance(asked, str):
        return dict.fromkeys(names, asked)
    if unknown := sorted(set(asked) - set(names)):
        allowed = ", ".join(names) or "none, this pipeline has no denoiser"
        raise AccelerationError(f"compile names {', '.join(unknown)}; what can be compiled: {allowed}")
    return dict(asked)
