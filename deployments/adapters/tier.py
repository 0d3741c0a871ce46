"""What one kind of memory keeps under a byte budget: those used longest ago go first, those in use never."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class Kept(Generic[V]):
    """One entry; `pins` are its users at the moment."""

    value: V
    num_bytes: int
    pins: int = 0


class Tier(Generic[K, V]):
    """Not thread-safe: its owner has a lock."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[K, Kept[V]] = OrderedDict()  # the one used longest ago first

    def get(self, key: K) -> V | None:
        """It counts as used now."""
        kept = self._kept.get(key)
        if kept is None:
            return None
        self._kept.move_to_end(key)
        return kept.value

    def put(self, key: K, value: V, num_bytes: int) -> None:
        self._kept[key] = Kept(value, num_bytes)

    def remove(self, key: K) -> None:
        self._kept.pop(key, None)

    def pin(self, key: K) -> None:
        self._kept[key].pins += 1

    def unpin(self, key: K) -> None:
        self._kept[key].pins -= 1

    def is_pinned(self, key: K) -> bool:
        return key in self._kept and self._kept[key].pins > 0

    def too_many(self, room_for: int = 0) -> Iterator[tuple[K, V]]:
        """Those that must go so that `room_for` more bytes are within the budget; the caller removes them."""
        over = self.num_bytes + room_for - self.max_bytes
        for key, kept in list(self._kept.items()):
            if over <= 0:
                return
            if not kept.pins:
                over -= kept.num_bytes
                yield key, kept.value

    def items(self) -> list[tuple[K, V]]:
        return [(key, kept.value) for key, kept in self._kept.items()]

    @property
    def num_bytes(self) -> int:
        return sum(kept.num_bytes for kept in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: K) -> bool:
        return key in self._kept
