"""The methods of quantisation that diffusers does not know by itself: a row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantizer:
    """One method, by the name that a component's config.json gives it in `quantization_config.quant_method`.

    `register` makes the method known to diffusers (or transformers) under that name. It imports its library
    inside, so a row costs nothing where no checkpoint needs it. It may be called many times.
    """

    method: str
    register: Callable[[], None]


def register_nvfp4() -> None:
    from deployments.weights.quantization.nvfp4 import register

    register()


QUANTIZERS: tuple[Quantizer, ...] = (Quantizer("nvfp4", register_nvfp4),)


def register_method(method: str | None) -> None:
    """Register the row of this name. Methods without one are the library's own, or it refuses them.

    Raises ValueError where a row's library is not installed.
    """
    for quantizer in QUANTIZERS:
        if quantizer.method == method:
            try:
                quantizer.register()
            except ImportError as error:
                raise ValueError(str(error)) from error
