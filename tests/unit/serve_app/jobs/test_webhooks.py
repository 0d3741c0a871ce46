"""Webhooks, received by a real server and verified by OpenAI's client."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
from aiohttp import web
from pydantic import SecretStr

from deployments.errors import InvalidRequestError
from serve_app.errors import JobStoreAwayError
from serve_app.jobs.database import open_database
from serve_app.jobs.records import NewJob, Webhook
from serve_app.jobs.store import JobStore
from serve_app.jobs.threads import StoreThreads
from serve_app.jobs.webhooks import sender
from serve_app.jobs.webhooks.delivery import WebhookRules, check_webhook_url, deliver
from serve_app.jobs.webhooks.sender import WebhookSender
from tests.support.in_process import until
from tests.support.job_stores import put_tables
from tests.support.recorded_meter import RecordedMeter
from tests.support.web_server import Receiver, web_server

EAGER = WebhookRules(allow_private=True, attempts=4, first_wait_s=0)
PAYLOAD = {"id": "job_1", "type": "job.completed", "data": {"prompt": "Käse 🧀"}}
SECRETS = ["plain secret", "whsec_c2VjcmV0IGJ5dGVz"]


@pytest.mark.parametrize("secret", SECRETS)
async def test_the_openai_client_verifies_the_signature(secret):
    receiver = Receiver(200)
    async with web_server(receiver.answer) as url:
        assert await deliver(f"{url}/hook", secret, PAYLOAD, EAGER, "wh_1") == "taken"
    [(headers, body)] = receiver.received
    client = openai.OpenAI(api_key="none", webhook_secret=secret)
    client.webhooks.verify_signature(body, headers)
    assert json.loads(body) == PAYLOAD
    assert headers["content-type" if "content-type" in headers else "Content-Type"] == "application/json"
    for other_body, other_secret in ((body + b" ", secret), (body, "another")):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(other_body, headers, secret=other_secret)
    stale = {**headers, "webhook-timestamp": "1600000000"}
    with pytest.raises(openai.InvalidWebhookSignatureError, match="too old"):
        client.webhooks.verify_signature(body, stale)


@pytest.mark.parametrize("status", [500, None, 429, 302, 404])
async def test_what_is_no_success_has_failed_and_a_redirect_is_not_followed(status):
    receiver = Receiver(status)
    async with web_server(receiver.answer) as url:
        assert await deliver(f"{url}/hook", "secret", PAYLOAD, EAGER, "wh_1") == "failed"
    assert len(receiver.received) == 1


async def test_a_target_that_is_not_there_has_failed():
    assert await deliver("http://127.0.0.1:1/", "secret", PAYLOAD, EAGER, "wh_1") == "failed"


async def test_a_receiver_that_is_gone_or_forbidden_is_not_asked_again():
    receiver = Receiver(410)
    async with web_server(receiver.answer) as url:
        assert await deliver(url, "secret", PAYLOAD, EAGER, "wh_1") == "refused"
        assert await deliver(url, "secret", PAYLOAD, WebhookRules(), "wh_1") == "refused"
    assert len(receiver.received) == 1


def test_the_waits_double_up_to_the_longest(monkeypatch):
    monkeypatch.setattr("serve_app.jobs.webhooks.delivery.random.uniform", lambda low, high: 1.0)
    rules = WebhookRules(first_wait_s=1, max_wait_s=5)
    assert [rules.wait_s(attempt) for attempt in range(1, 6)] == [1, 2, 4, 5, 5]


# --- many of them ---


class Hooks:
    """Completed jobs with webhooks, and the senders of several processes."""

    def __init__(self, path: Path) -> None:
        self.store = JobStore(open_database(None, put_tables(path)))
        self.senders: list[WebhookSender] = []
        self.meter = RecordedMeter()

    def end_job(self, job_id: str, url: str) -> None:
        self.store.add(NewJob(job_id, "image", [{}], webhook_url=url))
        self.store.claim("runner", 10)
        self.store.complete("runner", job_id)

    def sender(self, rules: WebhookRules = EAGER) -> WebhookSender:
        taker, secret = f"sender {len(self.senders)}", SecretStr("secret")
        self.senders.append(WebhookSender(self.store, StoreThreads(), taker, secret, rules, no_urls, self.meter))
        return self.senders[-1]

    def stop(self, number: int) -> None:
        self.senders[number].stop()
        self.store.release(f"sender {number}")

    def left(self) -> int:
        with sqlite3.connect(str(self.store._engine.url.database)) as database:
            [(count,)] = database.execute("SELECT count(*) FROM jobs WHERE webhook_due IS NOT NULL").fetchall()
        database.close()
        return int(count)


@pytest.fixture
def hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hooks]:
    monkeypatch.setattr(sender, "PAUSE_S", 0.02)
    made = Hooks(tmp_path)
    yield made
    for number in range(len(made.senders)):
        made.senders[number].stop()
    made.store.close()


async def no_urls(_: Webhook) -> list[str]:
    return []


@asynccontextmanager
async def working(*senders: WebhookSender) -> AsyncIterator[None]:
    async def work(each: WebhookSender) -> None:
        while True:
            await each.keep()

    tasks = [asyncio.create_task(work(each)) for each in senders]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def hang(_: web.Request) -> web.Response:
    await asyncio.Event().wait()
    raise AssertionError


async def test_targets_that_hang_keep_no_other_waiting(hooks: Hooks) -> None:
    good = Receiver(200)
    async with web_server(hang) as dead, web_server(good.answer) as url:
        for number in range(32):
            hooks.end_job(f"image_{number}", dead)
        hooks.end_job("image_good", url)
        async with working(hooks.sender()), asyncio.timeout(20):
            await until(lambda: good.received)
        sent_to = [webhook.url for webhook in hooks.senders[0]._sending.values()]
        assert sent_to.count(dead) == sender.MAX_PER_TARGET
        hooks.senders[0].stop()


async def test_a_failed_delivery_is_tried_again_under_the_same_id_until_it_is_given_up(hooks: Hooks) -> None:
    taken, never = Receiver(500, None, 429, 204), Receiver(*[500] * 10)
    async with web_server(taken.answer) as url, web_server(never.answer) as other:
        hooks.end_job("image_1", url)
        hooks.end_job("image_2", other)
        async with working(hooks.sender()), asyncio.timeout(20):
            await until(lambda: hooks.left() == 0)
    assert [len(taken.received), len(never.received)] == [4, EAGER.attempts]
    assert {headers["webhook-id"] for headers, _ in taken.received} == {"wh_image_1"}
    failed = 3 + EAGER.attempts - 1
    told = {("taken",): 1, ("failed",): failed, ("given_up",): 1}
    assert hooks.meter.counted["triptych_webhooks_total"] == told
    assert {key: len(seconds) for key, seconds in hooks.meter.observed["triptych_webhook_seconds"].items()} == told


async def test_a_webhook_whose_job_cannot_be_looked_up_is_tried_again_and_never_given_up_for_it(
    hooks: Hooks, caplog: pytest.LogCaptureFixture
) -> None:
    receiver, failures = Receiver(200), [JobStoreAwayError("away") for _ in range(EAGER.attempts + 1)]

    async def urls_of(_: Webhook) -> list[str]:
        if failures:
            raise failures.pop()
        return ["https://example.com/1.png"]

    async with web_server(receiver.answer) as url:
        hooks.end_job("image_1", url)
        each = hooks.sender()
        each._urls_of = urls_of
        async with working(each):
            await until(lambda: hooks.left() == 0)
    [(_, body)] = receiver.received
    assert json.loads(body)["data"]["urls"] == ["https://example.com/1.png"]
    assert "wh_image_1 is sent later" in caplog.text


async def test_a_stop_in_mid_delivery_gives_the_webhook_to_another_at_once(hooks: Hooks) -> None:
    answers = asyncio.Event()
    received = []

    async def hang_at_first(request: web.Request) -> web.Response:
        received.append(request.headers["webhook-id"])
        if len(received) == 1:
            answers.set()
            await asyncio.Event().wait()
        return web.Response()

    async with web_server(hang_at_first) as url:
        hooks.end_job("image_1", url)
        async with working(hooks.sender()):
            await answers.wait()
        hooks.stop(0)
        async with working(hooks.sender()), asyncio.timeout(20):
            await until(lambda: hooks.left() == 0)
    assert received == ["wh_image_1"] * 2


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/", "https://[::1]/", "file:///x", "no url", "http://u:p@example.com/"]
)
def test_a_url_that_no_webhook_may_have_is_refused_at_the_door(url):
    with pytest.raises(InvalidRequestError, match="webhook_url"):
        check_webhook_url(url, WebhookRules())
    check_webhook_url("https://example.com/hook", WebhookRules())
