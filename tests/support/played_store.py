"""Ray's key-value store, in memory."""

from __future__ import annotations


class PlayedStore:
    """Ray's key-value store."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], bytes] = {}

    def _internal_kv_put(self, key: str, value: str, *, namespace: str) -> bool:
        self.kept[namespace, key] = value.encode()
        return True

    def _internal_kv_get(self, key: str, *, namespace: str) -> bytes | None:
        return self.kept.get((namespace, key))

    def _internal_kv_del(self, key: str, *, namespace: str) -> int:
        return int(self.kept.pop((namespace, key), None) is not None)
