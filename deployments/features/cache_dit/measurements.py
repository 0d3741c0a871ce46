"""What a cached request measures, once, at its end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CachedSteps:
    """Steps of one transformer in one finished request, under Cache-DiT."""

    component: str
    computed: int
    reused: int
