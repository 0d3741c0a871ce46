"""What is known of a LoRA that requests may name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from deployments.adapters.args import Scale
from deployments.adapters.use import AdapterUse

Source = Literal["configuration", "added"]


@dataclass(frozen=True)
class Facts:
    """What a stage has read in the file."""

    digest: str  # SHA-256 of the file
    components: tuple[str, ...] = ()  # of the pipeline, that it changes
    rank: int | None = None  # the largest
    num_bytes: int | None = None

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Facts:
        """From what the stages' `inspect_adapter` answers, or from a row of the store; further entries are left."""
        return cls(plain["digest"], tuple(plain.get("components") or ()), plain.get("rank"), plain.get("num_bytes"))


@dataclass(frozen=True)
class ServedAdapter:
    """A LoRA by its name; `path` is never a caller's own word."""

    name: str
    path: str
    source: Source
    weight_name: str | None = None
    component: str | None = None  # into which it goes; None: where the pipeline's loader puts it
    scale: Scale = 1.0  # of requests that give none
    created: float = 0.0  # Unix time
    facts: Facts | None = None  # None: no stage has read it yet

    @property
    def digest(self) -> str:
        """SHA-256 of the file; empty where no stage has read it yet."""
        return self.facts.digest if self.facts else ""

    def use(self, scale: Scale | None = None) -> AdapterUse:
        """By a request that gives `scale`, or none."""
        return AdapterUse(
            name=self.name,
            path=self.path,
            weight_name=self.weight_name,
            component=self.component,
            scale=self.scale if scale is None else scale,
            digest=self.digest,
        )
