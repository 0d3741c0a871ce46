"""Puts the weights of components on the host while they are not used: OFFLOADS, a row for each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading

from deployments.memory.args import OffloadArgs
from deployments.memory.turns import Turns
from deployments.modules import AccelerationError, StageModules

HOST = torch.device("cpu")
LISTS = (torch.nn.ModuleList, torch.nn.Sequential)  # of blocks
WITH_STREAMS = ("cuda", "xpu")  # as diffusers uses them, with pinned memory on the host
QUANTISERS_THAT_STAY = ("bitsandbytes",)  # their weights are made on the device and do not leave it


def refuse_offload(args: Mapping[str, OffloadArgs], components: Mapping[str, type]) -> None:
    """Raises AccelerationError for a name that is no component with weights of the pipeline."""
    if unknown := sorted(args.keys() - components.keys()):
        raise AccelerationError(f"offload names {', '.join(unknown)}; the models are {', '.join(components)}")


def install_offload(modules: StageModules, args: Mapping[str, OffloadArgs], turns: Turns) -> list[str]:
    """Offloads those that are held here, whose weights must be on the host; the lines for the log.

    Raises AccelerationError where a component cannot be offloaded so.
    """
    lines = []
    for name in [name for name in args if name in modules.components]:
        refuse_quantised(name, modules.components[name])
        lines.append(f"offload: {name}: {OFFLOADS[args[name].kind](name, modules, args[name], turns)}")
    if lines and modules.device.torch_device == HOST:
        lines.append("offload: this replica runs on cpu, whose weights are on the host anyway")
    return lines


def by_groups(name: str, modules: StageModules, args: OffloadArgs, turns: Turns) -> str:
    """diffusers' group offloading."""
    module: Any = modules.components[name]
    device = modules.device.torch_device
    if not getattr(module, "_supports_group_offloading", True):
        raise AccelerationError(
            f"offload.{name}: {type(module).__name__} does not support kind: group; kind: model is allowed"
        )
    stream = with_stream(name, args, device, name in modules.denoisers)
    try:
        block_modules = names_to_blocks(module) if args.level == "block" else None
        apply_group_offloading(
            module,
            onload_device=device,
            offload_device=HOST,
            offload_type=f"{args.level}_level",
            num_blocks_per_group=args.blocks_per_group if args.level == "block" else None,
            use_stream=stream,
            low_cpu_mem_usage=not args.pin_memory,
            block_modules=block_modules,
        )
    except ValueError as error:
        raise AccelerationError(f"offload.{name}: {error}; level: leaf and kind: model are allowed") from error
    size = f"groups of {args.blocks_per_group} blocks" if args.level == "block" else "single layers"
    return f"{size}{', the next one is copied meanwhile' if stream else ''}"


def whole(name: str, modules: StageModules, args: OffloadArgs, turns: Turns) -> str:
    """The component as a whole, by turns with others of this kind."""
    turns.add(name, modules.components[name], args.pin_memory and modules.device.torch_device.type in WITH_STREAMS)
    return "on the device for its calls"


OFFLOADS: dict[str, Callable[[str, StageModules, OffloadArgs, Turns], str]] = {"group": by_groups, "model": whole}


def with_stream(name: str, args: OffloadArgs, device: torch.device, is_denoiser: bool) -> bool:
    """Raises AccelerationError where a stream is asked for and the device has none."""
    if args.stream == "on" and device.type not in WITH_STREAMS:
        raise AccelerationError(
            f"offload.{name}: stream is on, and {device.type} has no streams; devices that have: "
            f"{', '.join(WITH_STREAMS)}. auto and off are allowed"
        )
    if args.stream == "auto":
        return is_denoiser and args.blocks_per_group == 1 and device.type in WITH_STREAMS
    return args.stream == "on"


def names_to_blocks(module: Any) -> list[str] | None:
    """The children to look into for lists of blocks; None: most are at the top, or the class names them.

    The blocks of most encoders are some levels down. Raises AccelerationError where the names do not tell the way.
    """
    if getattr(module, "_group_offload_block_modules", None) is not None:
        return None
    if 2 * sum(num_bytes(child) for child in module.children() if isinstance(child, LISTS)) >= num_bytes(module):
        return None
    found: dict[str, None] = {}
    lists: set[str] = set()

    def look(owner: torch.nn.Module, above: tuple[str, ...]) -> None:
        for name, child in owner.named_children():
            if isinstance(child, LISTS):
                found.update(dict.fromkeys(above))
                lists.add(name)
            else:
                look(child, (*above, name))

    look(module, ())
    if ambiguous := sorted(lists & found.keys()):
        raise AccelerationError(f"the blocks of {type(module).__name__} are under {ambiguous[0]} and are called so too")
    return list(found) or None


def num_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def refuse_quantised(name: str, module: Any) -> None:
    """Raises AccelerationError for weights that cannot leave the device."""
    quantiser = getattr(module, "hf_quantizer", None)
    method = str(getattr(getattr(quantiser, "quantization_config", None), "quant_method", "")).lower()
    if any(each in method for each in QUANTISERS_THAT_STAY):
        raise AccelerationError(
            f"offload.{name}: its weights are quantised by {method}, which keeps them on the device; "
            "leave it out of offload, or take another precision"
        )
