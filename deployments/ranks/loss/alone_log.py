"""What the log says of work that rank 0 does alone: of each part and reason once, whatever numbers the reason has."""

from __future__ import annotations

import logging
import re

logger = logging.getLogger(__name__)

KEPT = 256  # the oldest may be told again


class AloneLog:
    """For any thread."""

    def __init__(self, setting: str) -> None:
        """`setting`: what asked for the ranks, such as vae.parallel."""
        self._setting = setting
        self._told: dict[tuple[str, str], None] = {}

    def tell(self, name: str, reason: str) -> None:
        kind = name, re.sub(r"\d+", "0", reason)
        if kind in self._told:
            return
        self._told[kind] = None
        for oldest in list(self._told)[:-KEPT]:
            self._told.pop(oldest, None)
        logger.warning("%s: rank 0 computes alone with %s: %s", self._setting, name, reason)
