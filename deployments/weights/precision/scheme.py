"""What a scheme of precision is: a row of `table.SCHEMES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

INSTALL = "pip install 'triptych[precision]'"


class Filling(Protocol):
    """Puts the weights of one empty model of diffusers in place, each in its precision."""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor` is on the device, in the dtype that the model would have without a scheme."""

    def finish(self) -> None:
        """All weights are there."""


@dataclass(frozen=True)
class Scheme:
    """One scheme by its name in `precision`; a row costs nothing until a model asks for it.

    `says` is for people: which weights, in how many bits. `bits` are those of a weight of a linear layer.
    `compute_dtypes` are the names of the dtypes in which such a model can compute. `packages` have to be installed.
    `obstacle` says why the scheme cannot be had on a device, None where it can. `begin` starts an empty model of
    diffusers, `for_transformers` is the quantization_config for from_pretrained; None: models of that library cannot
    have it.
    """

    name: str
    says: str
    bits: float
    compute_dtypes: tuple[str, ...]
    packages: tuple[str, ...]
    obstacle: Callable[[torch.device], str | None]
    begin: Callable[[Any, torch.dtype, torch.device], Filling] | None
    for_transformers: Callable[[torch.dtype, torch.device], Any] | None
