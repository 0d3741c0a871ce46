"""A parameter as a pipeline sees it: what it is at once, its numbers by a call that the session routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

# What torch is asked about a parameter without reading a number of it.
TOLD = frozenset(
    {
        *(getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "layout", "requires_grad")),
        *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "nelement", "element_size")),
        *(getattr(torch.Tensor, name) for name in ("is_floating_point", "is_complex")),
    }
)


# Where it would lie if it were here.
PLACES: dict[Any, Callable[[torch.device], Any]] = {
    torch.Tensor.device.__get__: lambda device: device,
    torch.Tensor.is_cuda.__get__: lambda device: device.type == "cuda",  # type: ignore[attr-defined]
    torch.Tensor.is_meta.__get__: lambda device: device.type == "meta",  # type: ignore[attr-defined]
}


class RoutedParameter(torch.Tensor):
    """Stands for a parameter that may be on the meta device here; the first use of its numbers asks for them.

    Pipelines read the dtype and the device of parameters of any size, but the numbers only of small ones
    (learned embeddings of what is absent). So only what is used crosses from stage to stage.
    """

    _is_param = True  # what isinstance(value, torch.nn.Parameter) asks for
    _device: torch.device
    _read: Callable[[], torch.Tensor]
    _numbers: torch.Tensor | None

    @classmethod
    def of(cls, parameter: torch.Tensor, device: torch.device, read: Callable[[], torch.Tensor]) -> Self:
        """`device` is that of the stage, where `read` puts the numbers."""
        shape = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        routed = torch.Tensor._make_subclass(cls, shape)
        routed._device, routed._read, routed._numbers = device, read, None
        return routed

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in PLACES:
            return PLACES[function](args[0]._device)
        if function not in TOLD:
            args, kwargs = pytree.tree_map(numbers_of, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    def numbers(self) -> torch.Tensor:
        """Read once."""
        if self._numbers is None:
            self._numbers = self._read()
        return self._numbers


def numbers_of(value: Any) -> Any:
    return value.numbers() if type(value) is RoutedParameter else value
