"""What makes an autoencoder need less memory: its own switches for slices, tiles and chunks of frames; their sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import torch

from deployments.modules import AccelerationError

TILING, SLICING, CHUNKS = "use_tiling", "use_slicing", "use_framewise_decoding"
EMPTY_CELL = CellType()
SETTERS = ("__init__", "enable_tiling", "disable_tiling", "enable_slicing", "disable_slicing")
# What AutoencoderKL and its like have, whose `enable_tiling` takes no sizes.
SAMPLE_SIZE, LATENT_SIZE, OVERLAP = "tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"


@dataclass(frozen=True)
class Way:
    """How one call is made; None: as the autoencoder is set."""

    slicing: bool | None = None
    chunks: bool | None = None
    tiling: bool | None = None

    def __str__(self) -> str:
        parts = (("in slices", self.slicing), ("in chunks of frames", self.chunks), ("in tiles", self.tiling))
        return ", ".join(name for name, is_on in parts if is_on) or "whole"


@dataclass(frozen=True)
class Abilities:
    """Which switches the code of an autoencoder's class heeds; some have one that nothing reads."""

    tiling: bool
    slicing: bool
    chunks: bool


def abilities_of(cls: type) -> Abilities:
    """From the names that its methods read, those that only set the switches apart."""
    read: set[str] = set()
    for base in cls.__mro__:
        members = [member for name, member in vars(base).items() if name not in SETTERS]
        for function in _functions(members):
            read |= set(function.__code__.co_names)
    return Abilities(TILING in read, SLICING in read, CHUNKS in read)


def _functions(members: list[Any]) -> set[FunctionType]:
    """Those among them, and the functions that decorators keep in them."""
    found: set[FunctionType] = set()
    left = members
    while left:
        member = left.pop()
        if isinstance(member, FunctionType) and member not in found:
            found.add(member)
            left += [cell.cell_contents for cell in member.__closure__ or () if cell != EMPTY_CELL]
    return found


@contextmanager
def switched(module: torch.nn.Module, way: Way) -> Iterator[None]:
    """The autoencoder set so; as it was before, afterwards."""
    before = {name: value for name, value in vars(module).items() if is_plain(value)}
    wanted = {SLICING: way.slicing, CHUNKS: way.chunks, TILING: way.tiling}
    try:
        for name, value in wanted.items():
            if value is not None:
                setattr(module, name, value)
        yield
    finally:
        for name in [n for n, value in vars(module).items() if is_plain(value) and n not in before]:
            delattr(module, name)
        vars(module).update(before)


def is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None)


def copy_settings(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Gives the target the switches and sizes that were set on the source."""
    names = [n for n, value in vars(source).items() if is_plain(value) and not n.startswith("_") and n != "training"]
    vars(target).update({name: vars(source)[name] for name in names})


def set_tile(name: str, module: Any, tile: Mapping[str, int | float]) -> None:
    """Sets the sizes of the tiles. Raises AccelerationError for one that it does not take, or that leaves gaps."""
    if not tile:
        return
    taken = tile_sizes(module)
    if unknown := sorted(tile.keys() - taken):
        raise AccelerationError(
            f"vae: tile names {', '.join(unknown)}, which {type(module).__name__} ({name}) does not take; "
            f"it takes {', '.join(sorted(taken)) or 'none'}"
        )
    parameters = inspect.signature(module.enable_tiling).parameters
    if tile.keys() <= parameters.keys():
        was_on = module.use_tiling
        module.enable_tiling(**tile)
        module.use_tiling = was_on
    else:
        _set_square_tile(module, tile)
    check_tile(name, module)


def tile_sizes(module: Any) -> set[str]:
    """The names of the sizes that can be set."""
    enable = getattr(module, "enable_tiling", None)
    if enable is None:
        return set()
    named = {name for name in inspect.signature(enable).parameters if name.startswith("tile_")}
    return named or {name for name in (SAMPLE_SIZE, OVERLAP) if hasattr(module, name) and hasattr(module, LATENT_SIZE)}


def _set_square_tile(module: Any, tile: Mapping[str, int | float]) -> None:
    size = getattr(module, SAMPLE_SIZE)
    size = size[0] if isinstance(size, list | tuple) else size
    scale = size // getattr(module, LATENT_SIZE)
    if SAMPLE_SIZE in tile:
        setattr(module, SAMPLE_SIZE, tile[SAMPLE_SIZE])
        setattr(module, LATENT_SIZE, int(tile[SAMPLE_SIZE]) // scale)
    if OVERLAP in tile:
        setattr(module, OVERLAP, tile[OVERLAP])


def check_tile(name: str, module: Any) -> None:
    """Raises AccelerationError where tiles would not cover the picture, or would not be whole latents."""
    sizes = {n: v for n, v in vars(module).items() if n.startswith("tile_") and isinstance(v, int | float)}
    scales = {
        "num_frames": getattr(module, "temporal_compression_ratio", 1),
        "height": getattr(module, "spatial_compression_ratio", 1),
        "width": getattr(module, "spatial_compression_ratio", 1),
    }
    for axis, scale in scales.items():
        size, stride = sizes.get(f"tile_sample_min_{axis}"), sizes.get(f"tile_sample_stride_{axis}")
        for each, value in (("min", size), ("stride", stride)):
            if value is not None and (value < scale or value % scale):
                raise AccelerationError(
                    f"vae: tile_sample_{each}_{axis} of {name} must be a multiple of {scale}, got {value}"
                )
        if size is not None and stride is not None and stride > size:
            raise AccelerationError(
                f"vae: tile_sample_stride_{axis} of {name} must be at most tile_sample_min_{axis}, {size}, got {stride}"
            )
    for each, value in sizes.items():
        if "overlap_factor" in each and not 0 <= value < 1:
            raise AccelerationError(f"vae: {each} of {name} must be at least 0 and below 1, got {value}")
        if "latent_min" in each and value < 1:
            raise AccelerationError(f"vae: the tiles of {name} are smaller than one latent ({each} {value})")
