"""PARTS: what is looked at, in order, a row each, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """`name` is its module in `parts`; `box_s` how long it may take on a card, its imports among it.

    `by_name`: it is looked at only where it is asked for, because few machines have what it needs.
    """

    name: str
    title: str
    box_s: float
    by_name: bool = False


PARTS = (
    Part("environment", "What the machine has", 45),
    Part("engine", "The engine against the plain loop", 100),
    Part("forwards", "Forwards of several samples", 90),
    Part("decoding", "Decoders", 90),
    Part("bits", "The same bits", 70),
    Part("memory", "Out of memory in a batch", 45),
    Part("death", "A device that died", 60),
    Part("copies", "A hand-off beside a forward", 45),
    Part("half_precision", "Half precision", 45),
    Part("compiled", "Regional compilation", 120),
    Part("loading", "Loading", 90),
    Part("two_cards", "A forward on two cards", 450, by_name=True),
)
