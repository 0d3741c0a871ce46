"""One delivery of a webhook: a signed POST to an address that the caller named.

Signed as https://www.standardwebhooks.com says and OpenAI's client verifies: HMAC-SHA256 over
`id.timestamp.body`, base64, in the header `webhook-signature`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
from pydantic import SecretStr

from deployments import tracing
from deployments.errors import InvalidRequestError
from env_config.secret import SecretError, SecretReference
from serve_app.outbound import ForbiddenTargetError, checked_url, client_session

logger = logging.getLogger(__name__)


Outcome = Literal["taken", "refused", "failed"]  # refused: another try is of no use


@dataclass(frozen=True)
class WebhookRules:
    """How hard is tried; the waits are doubled each time, up to `max_wait_s`, and spread by a quarter."""

    allow_private: bool = False  # targets inside our own network
    attempts: int = 8
    first_wait_s: float = 1.0
    max_wait_s: float = 60.0
    timeout_s: float = 10.0  # of one delivery

    def wait_s(self, attempt: int) -> float:
        """Seconds from the end of attempt number 1, 2 ... to the next."""
        wait_s = min(self.max_wait_s, self.first_wait_s * 2.0 ** (attempt - 1))
        return wait_s * random.uniform(0.75, 1.25)


def check_webhook_url(url: str, rules: WebhookRules) -> None:
    """What can be said before the name is resolved. Raises InvalidRequestError for `webhook_url`."""
    try:
        checked_url(url, rules.allow_private)
    except ForbiddenTargetError as error:
        raise InvalidRequestError(f"webhook_url: {error}", "webhook_url") from error


def read_secret(reference: SecretReference | None) -> SecretStr | None:
    """The secret that signs. Raises SecretError for one that cannot be read, or cannot sign."""
    if reference is None:
        return None
    secret = reference.read("jobs.webhook_secret")
    try:
        signed_headers(secret, "", 0, b"")
    except ValueError:
        raise SecretError("jobs.webhook_secret: what follows whsec_ must be base64") from None
    return SecretStr(secret)


async def deliver(url: str, secret: str, payload: Mapping[str, Any], rules: WebhookRules, webhook_id: str) -> Outcome:
    """Whether the target took it (a 2xx answer); each delivery is signed anew.

    `webhook_id` stays the same for all deliveries of one event, also after a restart: receivers tell by it
    what they have had. Redirects are not followed. A forbidden target, or one that is gone, refuses.
    """
    body = json.dumps(payload, separators=(",", ":")).encode()
    try:
        headers = signed_headers(secret, webhook_id, int(time.time()), body) | dict(tracing.carried())
        status = await _post(url, headers, body, rules)
    except ForbiddenTargetError as error:
        logger.warning("webhook %s was not sent: %s", webhook_id, error)
        return "refused"
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        logger.info("webhook %s: %s", webhook_id, type(error).__name__)
        return "failed"
    if 200 <= status < 300:
        return "taken"
    logger.info("webhook %s: status %d", webhook_id, status)
    return "refused" if status == 410 else "failed"  # "gone": the receiver asks for no more


def signed_headers(secret: str, webhook_id: str, timestamp: int, body: bytes) -> dict[str, str]:
    """`timestamp` in Unix seconds; a secret that begins with whsec_ is base64 after it."""
    key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode()
    content = f"{webhook_id}.{timestamp}.".encode() + body
    signature = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return {
        "content-type": "application/json",
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{signature}",
    }


async def _post(url: str, headers: dict[str, str], body: bytes, rules: WebhookRules) -> int:
    async with (
        client_session(rules.allow_private, rules.timeout_s) as session,
        session.post(
            checked_url(url, rules.allow_private), data=body, headers=headers, allow_redirects=False
        ) as answer,
    ):
        return answer.status
