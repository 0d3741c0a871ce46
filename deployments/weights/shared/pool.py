"""The components of the models that share a process: one that is proved to be equal to another's is that very one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from deployments.errors import CheckpointError
from deployments.memory.args import OffloadArgs, VAEArgs
from deployments.weights.precision.chosen import Precision
from deployments.weights.shared.same_files import Stored, difference


@dataclass(frozen=True)
class AskedComponent:
    """What a model needs, as its checkpoint and its arguments say."""

    name: str
    cls: type[torch.nn.Module]
    dtype: torch.dtype | None
    precision: Precision | None
    is_autoencoder: bool
    takes_adapters: bool  # LoRAs may go into it


@dataclass(frozen=True)
class HeldAs:
    """All that a component in memory follows from, its files apart."""

    cls: type[torch.nn.Module]
    dtype: torch.dtype | None
    precision: Precision | None
    offload: OffloadArgs | None
    vae: VAEArgs | None  # of autoencoders
    may_have_adapters: bool  # LoRAs of requests may be put into it


# What of HeldAs may keep two components of one class apart, and what is said then.
SETTINGS = {"dtype": "dtype", "precision": "precision", "offload": "offload", "vae": "vae"}


@dataclass
class Entry:
    """A component of a model in the pool."""

    model: str
    name: str
    held_as: HeldAs
    stored: Stored
    module: torch.nn.Module
    users: list[tuple[str, str]] = field(default_factory=list)  # models that have it too, under which name each
    is_changed: bool = False  # by the constructor of its own pipeline

    @property
    def place(self) -> str:
        return f"{self.model}.{self.name}"


class ComponentPool:
    """Of one process, while its models are loaded one after the other."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.lines: list[str] = []  # for the log: what is one, and why the others are not

    def of_model(self, model: str, settings: Settings) -> ModelInPool:
        return ModelInPool(self, model, settings)

    def shared_by(self, model: str) -> dict[str, str]:
        """The model's components that another one has too -> MODEL.COMPONENT of the others."""
        found: dict[str, str] = {}
        for entry in self.entries:
            holders = [(entry.model, entry.name), *entry.users]
            for own in (name for holder, name in holders if holder == model):
                others = [f"{holder}.{name}" for holder, name in holders if holder != model]
                found |= {own: " and ".join(others)} if others else {}
        return found


@dataclass(frozen=True)
class Settings:
    """What the arguments of a model say of how its components are held."""

    offload: Mapping[str, OffloadArgs]
    vae: VAEArgs
    gets_adapters: bool  # of its configuration, or while it runs


class ModelInPool:
    """The pool as the loading of one model uses it."""

    def __init__(self, pool: ComponentPool, model: str, settings: Settings) -> None:
        self._pool, self._model, self._settings = pool, model, settings
        self._states: list[tuple[Entry, Any]] = []  # as each was before the pipeline was made of it
        self.borrowed: dict[str, str] = {}  # component -> MODEL.COMPONENT that it is

    def component(self, asked: AskedComponent, stored: Stored, load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """Another model's component that is equal, or what `load` returns. Raises CheckpointError."""
        name = asked.name
        held_as = HeldAs(
            asked.cls,
            asked.dtype,
            asked.precision,
            self._settings.offload.get(name),
            self._settings.vae if asked.is_autoencoder else None,
            self._settings.gets_adapters and asked.takes_adapters,
        )
        entry = self._equal(name, held_as, stored)
        if entry is None:
            entry = Entry(self._model, name, held_as, stored, load())
            self._pool.entries.append(entry)
        else:
            entry.users.append((self._model, name))
            self.borrowed[name] = entry.place
            self._pool.lines.append(f"share: {self._model}.{name} is {entry.place}: {size_of(entry.module)} once")
        self._states.append((entry, state_of(entry.module)))
        return entry.module

    def _equal(self, name: str, held_as: HeldAs, stored: Stored) -> Entry | None:
        """Of another model, and not taken for another component of this one."""
        taken = self.borrowed.values()
        for entry in self._pool.entries:
            if entry.model == self._model or entry.place in taken or entry.held_as.cls is not held_as.cls:
                continue
            why = apart(held_as, entry.held_as)
            if why is None and entry.is_changed:
                why = f"{entry.place} is changed by its pipeline's constructor"
            if why is None:
                why = difference(stored, entry.stored, held_as.dtype is not None)
            if why is None:
                return entry
            self._pool.lines.append(f"share: {self._model}.{name} is another than {entry.place}: {why}")
        return None

    def check_unchanged(self) -> None:
        """After the pipeline was made. Raises CheckpointError where its constructor has changed another's component."""
        for entry, before in self._states:
            if state_of(entry.module) == before:
                continue
            if entry.model != self._model:
                raise CheckpointError(
                    f"the constructor of {self._model}'s pipeline changes a component that it shares, {entry.place}: "
                    "leave one of the two out of `share`"
                )
            entry.is_changed = True


def apart(one: HeldAs, other: HeldAs) -> str | None:
    """Which settings keep two components of one class apart; None: none does."""
    if one.may_have_adapters or other.may_have_adapters:
        return "LoRAs may be put into it, see `adapters` and `adapter_places`"
    differing = [name for name in SETTINGS if getattr(one, name) != getattr(other, name)]
    if one.precision and other.precision and one.precision.scheme == other.precision.scheme:
        differing = [name for name in differing if name != "precision"]  # their files are compared
    return f"it has another {' and '.join(SETTINGS[name] for name in differing)}" if differing else None


def state_of(module: torch.nn.Module) -> Any:
    """Changes with whatever changes a weight, puts another in its place, or sets a value of the configuration."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, id(tensor), tensor._version) for name, tensor in tensors], repr(getattr(module, "config", None))


def size_of(module: torch.nn.Module) -> str:
    num_bytes = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    return f"{num_bytes / 1e6:,.1f} MB"
