"""What is known of a model while it sleeps, in Ray's own key-value store: for all ingress replicas, and new ones.

It is plain JSON, and lasts as long as the Ray cluster. A model that is loaded tells it anew.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from ray.experimental import internal_kv

from deployments.messages import ArgumentDescription, ArgumentNotes, StageDescription, ValueType

logger = logging.getLogger(__name__)

NAMESPACE = "triptych-models"
USED = "triptych-used"  # read by serve_app.autoscaling.sleep
TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Facts:
    """Of one model."""

    description: StageDescription | None = None  # that its encoder told last
    arguments: tuple[ArgumentDescription, ...] | None = None  # that the checkpoint reads
    load_s: float | None = None  # seconds of its last start; None: not measured yet


class FactStore:
    """The facts of one model of an application."""

    def __init__(self, application: str, model: str) -> None:
        self._application, self._key = application, f"{application}/{model}"

    async def read(self) -> Facts:
        """Those that were written last; none where nothing was, or the store does not answer."""
        text = await self._in_time(lambda: internal_kv._internal_kv_get(self._key, namespace=NAMESPACE))
        return facts_from_json(text) if isinstance(text, bytes) else Facts()

    async def write(self, facts: Facts) -> None:
        """Best effort: what is not kept is told again by the model, when it is loaded."""
        data = facts_to_json(facts)
        await self._in_time(lambda: internal_kv._internal_kv_put(self._key, data, namespace=NAMESPACE))

    async def note_use(self, deployment: str) -> None:
        """A request comes to it now: its replicas must not go before they report that."""
        key, now = f"{self._application}/{deployment}", str(time.time()).encode()
        await self._in_time(lambda: internal_kv._internal_kv_put(key, now, namespace=USED))

    async def _in_time(self, work: Callable[[], object]) -> object:
        try:
            return await asyncio.wait_for(asyncio.to_thread(work), TIMEOUT_S)
        except Exception as error:  # noqa: BLE001  (Ray's control store is away)
            logger.warning("what is known of %s cannot be kept or read: %r", self._key, error)
            return None


def facts_to_json(facts: Facts) -> bytes:
    return json.dumps(asdict(facts), default=str).encode()


def facts_from_json(data: bytes) -> Facts:
    """None of them where another version of the application has written them."""
    try:
        plain = json.loads(data)
        description, arguments = plain["description"], plain["arguments"]
        return Facts(
            None if description is None else _description(description),
            None if arguments is None else tuple(ArgumentDescription(**each) for each in arguments),
            plain["load_s"],
        )
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("what is known of a model cannot be read: %r", error)
        return Facts()


def _description(plain: dict[str, Any]) -> StageDescription:
    tuples = {name: tuple(plain[name]) for name in ("stages", "required", "features", "tasks")}
    types = {name: _type(each) for name, each in plain["argument_types"].items()}
    notes = {name: ArgumentNotes(**each) for name, each in plain["argument_notes"].items()}
    return StageDescription(**{**plain, **tuples, "argument_types": types, "argument_notes": notes})


def _type(plain: dict[str, Any]) -> ValueType:
    parts = {name: tuple(plain[name]) for name in ("choices", "names", "needed")}
    return ValueType(plain["kind"], tuple(map(_type, plain["of"])), **parts)
