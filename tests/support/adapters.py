"""LoRAs with random weights, and a library that injects them into given modules and keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from deployments.adapters.forward import prepare
from deployments.adapters.use import AdapterUse
from deployments.errors import InvalidRequestError
from deployments.tensors.packing import pack

Weights = dict[str, torch.Tensor]
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out")


def lora_for(module: torch.nn.Module, seed: int, targets: Sequence[str] = ATTENTION, rank: int = 4) -> Weights:
    """In diffusers' names, of linear layers; strong enough to be seen."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.endswith(tuple(targets)):
            a = torch.randn(rank, layer.in_features, generator=generator)
            b = torch.randn(layer.out_features, rank, generator=generator)
            weights |= {f"{name}.lora_A.weight": 0.2 * a, f"{name}.lora_B.weight": 0.2 * b}
    return weights


@dataclass(frozen=True)
class HeldHere:
    peft_name: str
    components: frozenset[str]
    use: AdapterUse


@dataclass(frozen=True)
class HereOnHost:
    digest: str


class AdaptersHere:
    """`files`: by path the weights of each component."""

    def __init__(self, components: Mapping[str, Any], files: dict[str, dict[str, Weights]]) -> None:
        self.components = components
        self.files = files
        self.num_holding = 0

    def fetched(self, use: AdapterUse) -> HereOnHost:
        if use.path not in self.files:
            raise InvalidRequestError(f"there is no {use.path}", param="loras")
        content = pack([self.files[use.path]])
        sha = hashlib.sha256(repr(content.tree).encode())
        for buffer in content.buffers:
            sha.update(buffer.data)
        return HereOnHost(sha.hexdigest())

    @contextmanager
    def holding(self, uses: Sequence[AdapterUse]) -> Iterator[list[HeldHere]]:
        held = [self._held(replace(use, digest=use.digest or self.fetched(use).digest)) for use in uses]
        self.num_holding += 1
        try:
            yield held
        finally:
            self.num_holding -= 1

    def _held(self, use: AdapterUse) -> HeldHere:
        name, weights = f"a{use.digest[:12]}", self.files[use.path]
        for component, state in weights.items():
            module = self.components[component]
            if name not in getattr(module, "peft_config", {}):
                module.load_lora_adapter(dict(state), prefix=None, adapter_name=name)
                prepare(module)
        return HeldHere(name, frozenset(weights), use)
