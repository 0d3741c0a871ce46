"""What a group of ranks that ended for lack of memory leaves to the next one of its deployment.

Kept in Ray's own key-value store, one text for each deployment of an application. Loads no torch of its own.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from ray.experimental import internal_kv

from deployments.ranks.loss.lack import Lack

logger = logging.getLogger(__name__)

NAMESPACE = "triptych-lacks"
KEPT_S = 3600.0  # another process on the device may have been the reason


class LacksOfDeployment:
    """A LackRecord."""

    def __init__(self, application: str, deployment: str, now: Callable[[], float] = time.time) -> None:
        self._key = f"{application}/{deployment}"
        self._now = now

    def known(self) -> Sequence[Lack]:
        """Empty where Ray's control store is away: the group then learns it again."""
        try:
            text = internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)
        except Exception as error:  # noqa: BLE001  (of a store that is away)
            logger.warning("what groups of ranks before had no memory for cannot be asked: %r", error)
            return ()
        if not text:
            return ()
        kept = json.loads(text)
        return tuple(Lack(**each) for each in kept["lacks"]) if self._now() - kept["at"] < KEPT_S else ()

    def keep(self, lacks: Sequence[Lack]) -> None:
        text = json.dumps({"at": self._now(), "lacks": [asdict(each) for each in lacks]})
        try:
            internal_kv._internal_kv_put(self._key, text, namespace=NAMESPACE)
        except Exception as error:  # noqa: BLE001  (of a store that is away)
            logger.warning("what this group of ranks had no memory for cannot be told: %r", error)
