"""torch's global generators, the CPU's and the device's: their states by the type of device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

GlobalStates = dict[str, torch.Tensor]  # type of device -> the state of its global generator, bytes on the CPU


def global_states(device: torch.device) -> GlobalStates:
    """Those of the CPU and of the device. On CUDA a state is a seed and an offset on the host: nobody waits for it."""
    states = {"cpu": torch.get_rng_state()}
    if (module := _module_of(device)) is not None:
        states[device.type] = module.get_rng_state()
    return states


def set_global_states(states: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Those of other types of device, from a stage that runs elsewhere, are left out."""
    if (state := states.get("cpu")) is not None:
        torch.set_rng_state(state)
    state, module = states.get(device.type), _module_of(device)
    if state is not None and module is not None:
        module.set_rng_state(state)


def moved_states(before: GlobalStates, after: GlobalStates) -> GlobalStates:
    """Those of `after` that differ from `before`."""
    return {name: state for name, state in after.items() if not torch.equal(before[name], state)}


def seed_global_generators(seed: int, device: torch.device) -> None:
    """As torch.manual_seed, which costs a millisecond for devices that this process does not use."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _module_of(device: torch.device) -> Any:
    """torch's own of that kind of device, where it has a global generator."""
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None
