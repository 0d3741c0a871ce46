"""What a replica tells of its start, which whoever asks for the health reads while it cannot answer itself.

Kept in Ray's own key-value store, one text for each deployment of an application. Loads no torch.
"""

from __future__ import annotations

import logging

from ray.experimental import internal_kv

logger = logging.getLogger(__name__)

NAMESPACE = "triptych-starting"


def tell_start(application: str, deployment: str, text: str) -> None:
    """The newest counts; an empty one takes it away."""
    try:
        if text:
            logger.info("%s: %s", deployment, text)
            internal_kv._internal_kv_put(_key(application, deployment), text, namespace=NAMESPACE)
        else:
            internal_kv._internal_kv_del(_key(application, deployment), namespace=NAMESPACE)
    except Exception as error:  # noqa: BLE001  (Ray's control store is away: the start goes on without being told)
        logger.debug("the start of %s cannot be told: %r", deployment, error)


def told_start(application: str, deployment: str) -> str | None:
    """None where nothing is told, or nobody can be asked."""
    try:
        text = internal_kv._internal_kv_get(_key(application, deployment), namespace=NAMESPACE)
    except Exception as error:  # noqa: BLE001  (Ray's control store is away)
        logger.debug("the start of %s cannot be asked: %r", deployment, error)
        return None
    return text.decode() if text else None


def _key(application: str, deployment: str) -> str:
    return f"{application}/{deployment}"
