"""Random numbers for a device from a generator of another one, as `randn_tensor` of diffusers draws them.

A request's generator is the CPU's: the same seed gives the same numbers on every device. Where a pipeline hands it to
torch together with its device, torch itself refuses ("Expected a 'cuda' device type for generator but found 'cpu'").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


def draws_for(device: torch.device) -> AbstractContextManager[object]:
    """While code runs that may draw for this device with a generator of the CPU. Only in this thread, or greenlet."""
    return nullcontext() if device == CPU else DrawWhereTheGeneratorIs()


def draws_of_call(args: Any, kwargs: Any) -> AbstractContextManager[object]:
    """Around the call of a module: only where it is handed a generator, for modules draw with no other."""
    given = (*args, *kwargs.values())
    return DrawWhereTheGeneratorIs() if any(isinstance(value, torch.Generator) for value in given) else nullcontext()


@contextmanager
def without_draws() -> Iterator[None]:
    """Takes the modes of this thread away meanwhile, for other code than that which they were entered for.

    The greenlets of a thread share them: they go before another one runs, and come back after it.
    """
    taken = []
    while torch._C._len_torch_function_stack():
        taken.append(torch._C._pop_torch_function_stack())
    try:
        yield
    finally:
        for mode in reversed(taken):
            torch._C._push_on_torch_function_stack(mode)


class DrawWhereTheGeneratorIs(TorchFunctionMode):
    """Calls with a generator of another device than theirs draw on the generator's, and move what was drawn."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator") or next((v for v in args if isinstance(v, torch.Generator)), None)
        if generator is None:
            return func(*args, **kwargs)
        here = _device_of_call(args, kwargs)
        if here == generator.device:
            return func(*args, **kwargs)
        return _drawn(func, args, kwargs, here, generator.device)


CPU = torch.device("cpu")


def _device_of_call(args: Any, kwargs: dict[str, Any]) -> torch.device:
    """Where its output will be: as it says, or where its tensors are; without both, torch's default."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    given = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)), None)
    return torch.get_default_device() if given is None else given.device


def _drawn(func: Callable[..., Any], args: Any, kwargs: dict[str, Any], here: torch.device, there: torch.device) -> Any:
    def moved_to(device: torch.device) -> Callable[[Any], Any]:
        return lambda value: value.to(device) if isinstance(value, torch.Tensor) else value

    moved_args, moved_kwargs = tree_map(moved_to(there), (args, kwargs))
    if kwargs.get("device") is not None:
        moved_kwargs["device"] = there
    output = func(*moved_args, **moved_kwargs)
    filled = _filled_in_place(func, args, kwargs)
    if filled is None:
        return tree_map(moved_to(here), output)
    filled.copy_(output)
    return filled


def _filled_in_place(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The tensor that the call is to fill: `out`, or its own of a method such as `normal_`."""
    if isinstance(out := kwargs.get("out"), torch.Tensor):
        return out
    name = getattr(func, "__name__", "")
    if not name.endswith("_") or name.endswith("__"):
        return None
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
