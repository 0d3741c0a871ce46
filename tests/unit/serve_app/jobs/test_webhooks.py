"""Webhooks, received by a real server and verified by OpenAI's client."""

from __future__ import annotations

import json

import openai
import pytest

from deployments.errors import InvalidRequestError
from serve_app.jobs.webhooks.delivery import WebhookRules, check_webhook_url, deliver
from tests.support.web_server import Receiver, web_server

EAGER = WebhookRules(allow_private=True, attempts=4, first_wait_s=0)
PAYLOAD = {"id": "job_1", "type": "job.completed", "data": {"prompt": "Käse 🧀"}}
SECRETS = ["plain secret", "whsec_c2VjcmV0IGJ5dGVz"]


@pytest.mark.parametrize("secret", SECRETS)
async def test_the_openai_client_verifies_the_signature(secret):
    receiver = Receiver(200)
    async with web_server(receiver.answer) as url:
        assert await deliver(f"{url}/hook", secret, PAYLOAD, EAGER)
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


async def test_a_failed_delivery_is_tried_again_under_the_same_id():
    receiver = Receiver(500, None, 429, 204)
    async with web_server(receiver.answer) as url:
        assert await deliver(url, "secret", PAYLOAD, EAGER)
    ids = {headers["webhook-id"] for headers, _ in receiver.received}
    assert (len(receiver.received), len(ids)) == (4, 1)


async def test_it_is_given_up_after_the_last_attempt():
    receiver = Receiver(*[500] * 10)
    async with web_server(receiver.answer) as url:
        assert not await deliver(url, "secret", PAYLOAD, EAGER)
    assert len(receiver.received) == 4
    assert not await deliver("http://127.0.0.1:1/", "secret", PAYLOAD, EAGER)


async def test_a_redirect_is_no_success_and_is_not_followed():
    receiver = Receiver(*[302] * 4)
    async with web_server(receiver.answer) as url:
        assert not await deliver(f"{url}/hook", "secret", PAYLOAD, EAGER)
    assert len(receiver.received) == 4


async def test_a_receiver_that_is_gone_is_not_asked_again():
    receiver = Receiver(410, 200)
    async with web_server(receiver.answer) as url:
        assert not await deliver(url, "secret", PAYLOAD, EAGER)
    assert len(receiver.received) == 1


async def test_the_waits_double_up_to_the_longest(monkeypatch):
    waits: list[float] = []

    async def sleep(wait_s: float) -> None:
        waits.append(wait_s)

    monkeypatch.setattr("serve_app.jobs.webhooks.asyncio.sleep", sleep)
    monkeypatch.setattr("serve_app.jobs.webhooks.random.uniform", lambda low, high: 1.0)
    rules = WebhookRules(allow_private=True, attempts=6, first_wait_s=1, max_wait_s=5)
    assert not await deliver("http://127.0.0.1:1/", "secret", PAYLOAD, rules)
    assert waits == [1, 2, 4, 5, 5]


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/", "https://[::1]/", "file:///x", "no url", "http://u:p@example.com/"]
)
def test_a_url_that_no_webhook_may_have_is_refused_at_the_door(url):
    with pytest.raises(InvalidRequestError, match="webhook_url"):
        check_webhook_url(url, WebhookRules())
    check_webhook_url("https://example.com/hook", WebhookRules())
