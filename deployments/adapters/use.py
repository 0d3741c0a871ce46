"""What a request says of one LoRA, as it travels in `GenerationRequest.features["loras"]`: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from deployments.adapters.args import Scale

FEATURE = "loras"


@dataclass(frozen=True)
class AdapterUse:
    """Of one LoRA. Its place is what the configuration or the registry says, never the caller."""

    name: str
    path: str
    weight_name: str | None = None
    scale: Scale = 1.0
    digest: str = ""  # SHA-256 of the weights' file, where it is known; another one is refused
    component: str | None = None  # into which it goes, where its loader can be told to (AdapterArgs.component)

    def scale_in(self, component: str) -> float:
        """A component that a mapping does not name has 1."""
        return self.scale.get(component, 1.0) if isinstance(self.scale, Mapping) else self.scale

    def plain(self) -> dict[str, Any]:
        """For a message; `use_of` reads it."""
        return asdict(self)


def use_of(plain: Mapping[str, Any]) -> AdapterUse:
    """What `AdapterUse.plain` has written."""
    return AdapterUse(**plain)
