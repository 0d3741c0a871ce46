"""What a group of ranks that ended for lack of memory leaves to the next one of its deployment.

Kept in Ray's own key-value store, one text for each deployment of an application and version of its model.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

from ray.experimental import internal_kv

from deployments.ranks.loss.lack import Lack, with_another

logger = logging.getLogger(__name__)

NAMESPACE = "triptych-lacks"


class LacksOfDeployment:
    """A LackRecord."""

    def __init__(self, application: str, deployment: str, version: str, now: Callable[[], float] = time.time) -> None:
        """`version`: of the model's arguments, by which other forwards fit."""
        self._key = f"{application}/{deployment}/{version}"
        self._now = now

    def known(self) -> Sequence[Lack]:
        """Empty where Ray's control store is away: the group then learns it again."""
        try:
            text = internal_kv._internal_kv_get(self._key, namespace=NAMESPACE)
            lacks = [Lack(**each) for each in json.loads(text)] if text else []
        except Exception as error:  # noqa: BLE001  (of a store that is away, and of what another version has left)
            logger.warning("what groups of ranks before had no memory for cannot be asked: %r", error)
            return ()
        return tuple(each for each in lacks if not each.is_old(self._now()))

    def add(self, lack: Lack) -> None:
        """To what the groups of other replicas have told meanwhile."""
        text = json.dumps([asdict(each) for each in with_another(self.known(), lack)])
        try:
            internal_kv._internal_kv_put(self._key, text, namespace=NAMESPACE)
        except Exception as error:  # noqa: BLE001  (of a store that is away)
            logger.warning("what this group of ranks had no memory for cannot be told: %r", error)
