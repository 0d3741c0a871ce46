"""What cannot be had beside ranks, refused at the start by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from deployments.features import FEATURES
from deployments.features.feature import Feature
from deployments.features.lora.request import LORA
from deployments.model import CompileMode, ModelArgs
from deployments.modules import AccelerationError
from env_config.variables import EnvConfig

NO_LORAS = "with `parallel.tensor` no LoRA can be used: each rank has a part of the weights, a LoRA is for whole ones"


def loras_problem(model: ModelArgs) -> str | None:
    """Why no request can have any, whatever the modules are; None: there is no such reason."""
    return NO_LORAS if model.parallel is not None and model.parallel.tensor > 1 else None


def features_beside(model: ModelArgs) -> tuple[Feature, ...]:
    """Those that requests may have: what else they ask for would change the modules of one rank alone."""
    if model.parallel is None:
        return FEATURES
    loras = () if loras_problem(model) else (LORA,)
    return tuple(each for each in FEATURES if not each.is_asked_for or each in loras)


def refuse_beside_ranks(model: ModelArgs, modes: Mapping[str, CompileMode], env: EnvConfig) -> None:
    """`modes`: in which each denoiser is compiled. Raises AccelerationError."""
    if model.parallel is None:
        return
    problems: list[Any] = []
    problems += [f"compile: {name}: {mode}; off is allowed" for name, mode in modes.items() if mode != "off"]
    problems += [f"offload.{name}; leave it out: encoders are allowed" for name in model.offload if name in modes]
    if model.adapters and loras_problem(model):
        problems.append(
            f"adapters: {', '.join(model.adapters)} beside tensor: {model.parallel.tensor}; leave either out"
        )
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
