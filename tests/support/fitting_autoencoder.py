"""An autoencoder that was prepared for a device with so much memory, and what its decoder is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deployments.memory.args import VAEArgs
from deployments.memory.autoencoder import prepare
from deployments.memory.device_memory import Room
from deployments.memory.stage_memory import StageMemory


class Played:
    def __init__(self, free: int) -> None:
        self.free = free

    def room(self) -> Room:
        return Room(self.free, 10**12)

    def give_back(self) -> None:
        return


class Prepared:
    """An autoencoder whose decoder notes what it was given, on a device with so many bytes free."""

    def __init__(self, make: Callable[[], Any], free: int | None = None, **settings: Any) -> None:
        self.device = Played(free or 0)
        self.memory = StageMemory(self.device if free is not None else None)
        self.vae = make()
        self.counted = 0
        self.given: list[tuple[int, ...]] = []

        def twin() -> Any:
            self.counted += 1
            return make().to("meta")

        self.line = prepare("vae", self.vae, twin, VAEArgs.model_validate(settings), self.memory)
        self.vae.tile_overlap_factor = 0  # the library blends overlaps line by line in Python
        self.vae.decoder.register_forward_pre_hook(lambda _, args: self.given.append(tuple(args[0].shape)))

    def decode(self, *shape: int) -> list[tuple[int, ...]]:
        """The shapes that the decoder was given."""
        self.given.clear()
        with torch.no_grad():
            self.vae.decode(torch.zeros(shape))
        return list(self.given)
