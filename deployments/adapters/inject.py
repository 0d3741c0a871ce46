"""Puts an adapter's layers into a component by the component's own loader, and takes them out again.

Only in the thread that owns the component's forwards. Afterwards no adapter is active: a forward is the component's
own until `deployments.adapters.forward.applied` says otherwise.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.utils import delete_adapter_layers, recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer

from deployments.adapters.convert import DIFFUSERS, TRANSFORMERS, Part
from deployments.stage_pipeline.skeleton import BUILDING
from deployments.tensors.global_generators import global_states, set_global_states


def inject(component: Any, part: Part, name: str, device: torch.device) -> int:
    """The bytes that the layers of the adapter `name` have, all on `device`. Raises what the loader raises."""
    had_layers = any(True for _ in layers_of(component))
    states = global_states(device)  # new layers are drawn before they are filled
    try:
        with BUILDING:
            _load(component, part, name)
            for layer in layers_of(component):
                layer._move_adapter_to_device_of_base_layer(name, device)
            if part.method == TRANSFORMERS:  # its loader casts the whole component to the dtype that this has
                for parameter in adapter_parameters(component, name):
                    parameter.data = parameter.data.to(component.dtype)
    except BaseException:
        eject(component, name, keeps_layers=had_layers)
        raise
    finally:
        set_global_states(states, device)
    rest(component)
    tell_groups(component)
    return sum(parameter.nbytes for parameter in adapter_parameters(component, name))


def _load(component: Any, part: Part, name: str) -> None:
    if part.method == DIFFUSERS:
        component.load_lora_adapter(dict(part.tensors), adapter_name=name, low_cpu_mem_usage=True, **part.options)
        return
    config = copy.deepcopy(part.options["peft_config"])
    with quiet():
        component.load_adapter(
            adapter_name=name, adapter_state_dict=dict(part.tensors), peft_config=config, low_cpu_mem_usage=True
        )


@contextmanager
def quiet() -> Iterator[None]:
    """transformers reports the layers of all other adapters as missing."""
    logger = logging.getLogger("transformers.integrations.peft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def eject(component: Any, name: str, keeps_layers: bool = False) -> None:
    """The adapter's weights are gone; with the last one the component is as it was before the first.

    `keeps_layers`: PEFT's layers stay, empty, after the last one: without them what is compiled is compiled again,
    and once more with the next adapter.
    """
    rest(component)
    delete_adapter_layers(component, name)
    configs = getattr(component, "peft_config", None)
    if configs:
        configs.pop(name, None)
    if not (configs or keeps_layers):
        recurse_remove_peft_layers(component)
        if configs is not None:
            del component.peft_config
        component._hf_peft_config_loaded = False
    tell_groups(component)


def tell_groups(component: torch.nn.Module) -> None:
    """Groups of blocks that diffusers exchanges with a stream (`offload: {kind: group}`) know the copy of each tensor
    on the host: of the new ones too, and of none that has gone. To apply the hooks anew, as diffusers does, would take
    away what else surrounds the component's forward.
    """
    for group in streamed_groups(component):
        there = dict.fromkeys(
            tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())
        )
        there |= dict.fromkeys((*group.parameters, *group.buffers))
        known = group.cpu_param_dict
        group.cpu_param_dict = {
            tensor: known[tensor] if tensor in known else group._to_cpu(tensor, group.low_cpu_mem_usage)
            for tensor in there
        }


def streamed_groups(component: torch.nn.Module) -> Iterator[Any]:
    """diffusers' ModuleGroups."""
    for module in component.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for hook in registry.hooks.values() if registry is not None else ():
            group = getattr(hook, "group", None)
            if isinstance(group, ModuleGroup) and group.stream is not None:
                yield group


def rest(component: torch.nn.Module) -> None:
    """No adapter is active.

    Their weights require gradients, as those that `set_adapters` has activated do: by that torch chooses how it
    multiplies what is not contiguous (`should_fold` of at::matmul), and the ways round differently.
    """
    for layer in layers_of(component):
        layer.set_adapter([])
        layer.enable_adapters(enabled=False)
        for kind in layer.adapter_layer_names:
            getattr(layer, kind).requires_grad_(True)
        layer.eval()  # dropout of an adapter's own


def layers_of(component: torch.nn.Module) -> Iterator[Any]:
    for module in list(component.modules()):
        if isinstance(module, BaseTunerLayer):
            yield module


def adapter_parameters(component: torch.nn.Module, name: str) -> Iterator[torch.nn.Parameter]:
    for path, parameter in component.named_parameters():
        if f".{name}." in path:
            yield parameter
