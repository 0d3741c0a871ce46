"""What a layer is: it wraps the making of media, once, when an ingress replica starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from env_config.variables import EnvConfig
from serve_app.making.follower import Make
from serve_app.making.served_model import ServedModel
from serve_app.making.stages import Stages


@dataclass(frozen=True)
class LayerContext:
    """What layers are made from."""

    env: EnvConfig
    stages: Stages
    model: ServedModel
    c2pa_certificate: Path | None = None
    c2pa_private_key: Path | None = None


@dataclass(frozen=True)
class Layer:
    """A row of LAYERS: `wrap` returns `make` with the layer around it, or `make` itself where the layer is off."""

    name: str
    wrap: Callable[[Make, LayerContext], Make]
