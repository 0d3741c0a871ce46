"""What cannot be had beside ranks, refused at the start by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from deployments.features import FEATURES
from deployments.features.feature import Feature
from deployments.model import CompileMode, ModelArgs
from deployments.modules import AccelerationError
from env_config.variables import EnvConfig

NO_LORAS = "with `parallel` no LoRA can be used: it would be put into the modules of one rank alone"


def features_beside(model: ModelArgs) -> tuple[Feature, ...]:
    """Those that requests may have: what a request asks for would change the modules of one rank alone."""
    return FEATURES if model.parallel is None else tuple(each for each in FEATURES if not each.is_asked_for)


def refuse_beside_ranks(model: ModelArgs, modes: Mapping[str, CompileMode], env: EnvConfig) -> None:
    """`modes`: in which each denoiser is compiled. Raises AccelerationError."""
    if model.parallel is None:
        return
    problems: list[Any] = []
    problems += [f"compile: {name}: {mode}; off is allowed" for name, mode in modes.items() if mode != "off"]
    problems += [f"offload.{name}; leave it out: encoders are allowed" for name in model.offload if name in modes]
    problems += [f"adapters: {', '.join(model.adapters)}; leave it out"] if model.adapters else []
    problems += [f"{feature.name} by its variables; set them off" for feature in FEATURES if _is_on(feature, env)]
    if problems:
        raise AccelerationError(f"with `parallel` this is not possible: {'; '.join(problems)}")


def refuse_beside_tile_ranks(model: ModelArgs, autoencoders: Collection[str]) -> None:
    """Raises AccelerationError."""
    offloaded = [name for name in model.offload if name in autoencoders]
    if model.vae.parallel is not None and offloaded:
        raise AccelerationError(
            f"offload.{offloaded[0]} is not possible with vae.parallel, whose ranks call its decoder by itself: leave "
            "one of them out"
        )


def _is_on(feature: Feature, env: EnvConfig) -> bool:
    """For every request."""
    return feature.is_asked_for and feature.wanted(env, None) is not None
