"""Models that hold several others, such as MultiControlNetModel: each member has a folder of its own, by number."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

from deployments.errors import CheckpointError
from deployments.weights.files import read_object

MEMBERS = ("controlnets", "adapters")  # the only argument of a container's constructor


def is_container(cls: type[torch.nn.Module]) -> bool:
    """Whether models of the class are made of a list of others and have no weights or settings beside theirs."""
    if not issubclass(cls, ModelMixin):
        return False
    arguments = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    return len(arguments) == 1 and arguments[0] in MEMBERS


def member_folders(folder: Path) -> list[Path]:
    """As the containers of diffusers save themselves: `controlnet`, `controlnet_1`, `controlnet_2` ..."""
    folders = [folder]
    while (following := folder.with_name(f"{folder.name}_{len(folders)}")).is_dir():
        folders.append(following)
    return folders


def member_class(folder: Path) -> Any:
    """Raises CheckpointError where its configuration names no model of diffusers."""
    name = read_object(folder / "config.json").get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise CheckpointError(f"{folder / 'config.json'} names the model {name!r}, which diffusers lacks")
    return cls


def members(container: torch.nn.Module) -> list[torch.nn.Module]:
    """In the order of their folders."""
    [of_a_kind] = container.children()
    return list(of_a_kind.children())
