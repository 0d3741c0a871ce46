"""Sends the webhooks that are due: a dead target keeps none of the others waiting, and a stop gives back what is sent.

How often a webhook was tried, and when it is tried again, stands in the store: between two deliveries nothing of
it is held here.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from pydantic import SecretStr

from deployments import tracing
from deployments.metrics.meter import NO_METER, Meter
from serve_app.jobs.records import Webhook
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import StoreThreads
from serve_app.jobs.webhooks.delivery import WebhookRules, deliver

logger = logging.getLogger(__name__)

MAX_DELIVERIES = 64  # at a time
MAX_REPEATED = 32  # of them that were tried before: a first delivery always finds a slot
MAX_PER_TARGET = 4
PAUSE_S = 1.0  # between looks for webhooks that are due
TAKEN_FOR_S = 30.0  # then a webhook is due again, as its sender has died; longer than a delivery


class WebhookSender:
    """Delivers the webhooks of an application from this process; `taker` names it.

    `urls_of` answers with the addresses of what a job made.
    """

    def __init__(
        self,
        store: JobStore,
        threads: StoreThreads,
        taker: str,
        secret: SecretStr,
        rules: WebhookRules,
        urls_of: Callable[[Webhook], Awaitable[list[str]]],
        meter: Meter = NO_METER,
    ) -> None:
        self._store = store
        self._threads = threads
        self._taker = taker
        self._secret = secret
        self._rules = rules
        self._urls_of = urls_of
        self._meter = meter
        self._sending: dict[asyncio.Task[None], Webhook] = {}

    async def keep(self) -> None:
        """To be repeated without end: begin what is due and has a slot."""
        while len(self._sending) < MAX_DELIVERIES:
            targets = Counter(webhook.target for webhook in self._sending.values())
            busy = [target for target, count in targets.items() if count >= MAX_PER_TARGET]
            num_repeated = sum(webhook.attempt > 1 for webhook in self._sending.values())
            webhook = await self._threads.run(
                self._store.take_webhook, self._taker, TAKEN_FOR_S, busy, num_repeated < MAX_REPEATED
            )
            if webhook is None:
                break
            task = asyncio.create_task(self._send(webhook))
            self._sending[task] = webhook
            task.add_done_callback(self._sending.pop)
        await asyncio.sleep(PAUSE_S)

    def stop(self) -> None:
        """Send no more; the store gives back what this process has taken (`JobStore.release`)."""
        for task in self._sending:
            task.cancel()

    async def _send(self, webhook: Webhook) -> None:
        try:
            if not await self._is_through(webhook):
                await self._again_later(webhook)
        except Exception:  # the job store is away: the webhook stays taken, and is due again when that ends
            logger.exception("the delivery of %s could not be written down; it is due again later", _id_of(webhook))

    async def _is_through(self, webhook: Webhook) -> bool:
        """Whether nothing is left to do for it: it was taken, refused or given up."""
        webhook_id = _id_of(webhook)
        try:
            urls = await self._urls_of(webhook)
        except Exception:  # not the target's fault, so it is no reason to give up
            logger.exception("webhook %s is sent later: what the job made could not be looked up", webhook_id)
            return False
        payload = {
            "id": webhook_id,
            "object": "event",
            "type": f"{webhook.kind}.{webhook.status}",  # as OpenAI's: video.completed, video.failed
            "created_at": int(webhook.completed_at),
            "data": {"id": webhook.job_id} | ({"urls": urls} if urls else {}),
        }
        secret = self._secret.get_secret_value()
        began = time.perf_counter()
        with tracing.begun("webhook", webhook.trace, job_id=webhook.job_id, attempt=webhook.attempt) as span:
            outcome = await deliver(webhook.url, secret, payload, self._rules, webhook_id)
            span.set(outcome=outcome)
            if outcome != "taken":
                span.fail(outcome)
        is_given_up = outcome == "failed" and webhook.attempt >= self._rules.attempts
        told = "given_up" if is_given_up else outcome
        self._meter.count("triptych_webhooks_total", outcome=told)
        self._meter.observe("triptych_webhook_seconds", time.perf_counter() - began, outcome=told)
        if outcome == "failed" and not is_given_up:
            return False
        if is_given_up:
            logger.warning("webhook %s was given up after %d attempts", webhook_id, webhook.attempt)
        await self._threads.run(self._store.webhook_done, webhook.job_id)
        return True

    async def _again_later(self, webhook: Webhook) -> None:
        wait_s = self._rules.wait_s(webhook.attempt)
        await self._threads.run(self._store.webhook_failed, self._taker, webhook.job_id, wait_s)


def _id_of(webhook: Webhook) -> str:
    return f"wh_{webhook.job_id}"
