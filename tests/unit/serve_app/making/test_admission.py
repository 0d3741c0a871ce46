"""What is let in, when, and what is said to the rest."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.errors import InvalidRequestError
from deployments.messages import GenerationRequest, Media, OutputFormat
from serve_app.api_keys import new_key
from serve_app.errors import OverloadedError
from serve_app.http.middleware.limits import BodySizeLimit, RoomForRequests
from serve_app.making import admission as admission_module
from serve_app.making.admission import Admission, AdmissionArgs, CostModel, size_of
from tests.support.in_process import TEXT_TO_IMAGE, Server, make_at_once, serving, until

SMALL, LARGE = (64, 64, 1), (128, 128, 1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


def request(**arguments: Any) -> GenerationRequest:
    return GenerationRequest("r", "flux", arguments, 0, OutputFormat("image", "png"))


def admission(step_s: float | None = None, **args: Any) -> Admission:
    """`step_s`: what a step at 32x32, the default size, was measured to take."""
    made = Admission(AdmissionArgs(**args))
    if step_s is not None:
        made.costs.learn((32, 32, 1), 1, {"denoiser_forwards": step_s})
    return made


# --- the prediction ---


def test_a_size_that_was_measured_is_predicted_from_its_steps():
    costs = CostModel(first_guess_s=5)
    costs.learn(SMALL, 10, {"denoiser_forwards": 2.0, "decode": 0.5, "encode_media": 0.1})
    assert costs.predict(SMALL, 10) == pytest.approx(2.6)
    assert costs.predict(SMALL, 20) == pytest.approx(4.6)


def test_another_size_is_predicted_from_the_nearest_by_its_pixels():
    costs = CostModel(first_guess_s=5)
    costs.learn(SMALL, 1, {"denoiser_forwards": 1.0})
    assert costs.predict(LARGE, 1) == pytest.approx(4.0)
    assert costs.predict((64, 64, 3), 1) == pytest.approx(3.0)
    costs.learn(LARGE, 1, {"denoiser_forwards": 9.0})
    assert costs.predict((128, 144, 1), 1) == pytest.approx(9.0 * 144 / 128)


def test_the_guess_counts_until_something_was_measured():
    assert CostModel(first_guess_s=5).predict(SMALL, 1000) == 5


def test_measurements_are_followed_when_the_machine_becomes_slower():
    costs = CostModel(first_guess_s=5)
    for seconds in (1.0, *[2.0] * 30):
        costs.learn(SMALL, 1, {"denoiser_forwards": seconds})
    assert costs.predict(SMALL, 1) == pytest.approx(2.0, rel=0.01)


def test_the_size_is_that_of_the_request_or_else_of_the_model():
    assert size_of(request(), TEXT_TO_IMAGE) == (32, 32, 1, 4)
    asked = request(width=64, height=16, num_frames=9, num_inference_steps=7)
    assert size_of(asked, TEXT_TO_IMAGE) == (64, 16, 9, 7)


# --- the queue ---


def test_the_queue_is_full_at_its_predicted_seconds_and_says_when_to_come_back():
    made = admission(1.0, max_queue_s=10)
    first = made.admit([request()], TEXT_TO_IMAGE)  # 4 steps: 4 s
    made.admit([request()], TEXT_TO_IMAGE)
    with pytest.raises(OverloadedError) as refused:
        made.admit([request()], TEXT_TO_IMAGE)
    assert refused.value.retry_after_s == 2
    first[0].close()
    made.admit([request()], TEXT_TO_IMAGE)


def test_n_pictures_are_let_in_together_or_not_at_all():
    made = admission(1.0, max_queue_s=10)
    made.admit([request()], TEXT_TO_IMAGE)
    with pytest.raises(OverloadedError):
        made.admit([request(), request()], TEXT_TO_IMAGE)
    assert made.num_pending == 1


def test_what_no_empty_queue_could_take_is_refused_with_the_limit():
    made = admission(1.0, max_queue_s=10)
    with pytest.raises(InvalidRequestError, match="about 11 s, at most 10 s") as refused:
        made.admit([request(num_inference_steps=11)], TEXT_TO_IMAGE)
    assert (refused.value.code, refused.value.param) == ("limit_exceeded", "num_inference_steps")


def test_one_caller_does_not_take_the_share_of_the_others():
    made = admission(1.0, max_queue_s=100, max_queue_s_per_key=5)
    made.admit([request()], TEXT_TO_IMAGE, key="anna")
    with pytest.raises(OverloadedError):
        made.admit([request()], TEXT_TO_IMAGE, key="anna")
    made.admit([request()], TEXT_TO_IMAGE, key="berta")


def test_the_number_of_pending_requests_is_bounded_too():
    made = admission(0.001, max_pending=2)
    made.admit([request(), request()], TEXT_TO_IMAGE)
    with pytest.raises(OverloadedError) as refused:
        made.admit([request()], TEXT_TO_IMAGE)
    assert refused.value.retry_after_s >= 1


def test_the_requests_that_there_is_no_room_for_are_counted_until_they_are_asked_for():
    made = admission(1.0, max_queue_s=10, max_queue_s_per_key=9, max_pending=3)
    made.admit([request()], TEXT_TO_IMAGE, key="anna")
    refused = [
        ([request(num_inference_steps=6)], "anna"),  # her own share is full
        ([request()] * 2, "berta"),  # the time is too short for them
        ([request(num_inference_steps=1)] * 3, "carla"),  # they are too many
    ]
    for requests, key in refused:
        with pytest.raises(OverloadedError):
            made.admit(requests, TEXT_TO_IMAGE, key=key)
    assert [made.take_refused(), made.take_refused()] == [2 + 3, 0]


def test_an_empty_queue_takes_what_is_only_guessed_to_be_too_long():
    made = admission(max_queue_s=1, first_guess_s=5)
    made.admit([request()], TEXT_TO_IMAGE)
    with pytest.raises(OverloadedError):
        made.admit([request()], TEXT_TO_IMAGE)


def test_a_ticket_is_closed_once():
    made = admission()
    one, other = made.admit([request(), request()], TEXT_TO_IMAGE)
    one.close()
    one.close()
    assert made.num_pending == 1
    other.close()
    assert (made.num_pending, made.queue_s()) == (0, 0)


def test_more_replicas_make_the_queue_shorter(monkeypatch):
    now = 0.0
    monkeypatch.setattr("serve_app.making.admission.time.monotonic", lambda: now)
    made = admission(1.0)
    seconds = {"denoiser_forwards": 4.0}
    for _ in range(20):  # two are done every 4 s
        tickets = made.admit([request()] * 4, TEXT_TO_IMAGE)
        for done in (tickets[:2], tickets[2:]):
            now += 4
            for ticket in done:
                ticket.learn(Media((), seconds))
            for ticket in done:
                ticket.close()
    made.admit([request()] * 4, TEXT_TO_IMAGE)
    assert made.queue_s() == pytest.approx(8, rel=0.35)  # and not 16


# --- jobs beside those who wait ---

FOUR_STEPS = (32, 32, 1, 4)


def test_jobs_fill_a_longer_queue_of_their_own_and_are_told_when_to_come_back():
    made = admission(1.0, max_queue_s=5, max_job_queue_s=10)
    made.admit([request()], TEXT_TO_IMAGE)  # 4 s
    first = made.admit_job([FOUR_STEPS], "")
    with pytest.raises(OverloadedError) as refused:
        made.admit_job([FOUR_STEPS], "")
    assert refused.value.retry_after_s == 2
    first[0].close()
    made.admit_job([FOUR_STEPS], "")


def test_jobs_that_wait_are_not_in_the_way_of_a_caller_and_those_that_run_are():
    made = admission(1.0, max_queue_s=5)
    [ticket] = made.admit_job([FOUR_STEPS], "")
    made.admit([request()], TEXT_TO_IMAGE)[0].close()
    ticket.is_waiting = False
    with pytest.raises(OverloadedError) as refused:
        made.admit([request()], TEXT_TO_IMAGE)
    assert refused.value.retry_after_s == 3


def test_a_job_that_a_caller_waits_for_finds_no_longer_queue_than_other_requests_do():
    made = admission(1.0, max_queue_s=5, max_job_queue_s=100)
    for _ in range(3):
        made.admit_job([FOUR_STEPS], "")
    made.admit_job([FOUR_STEPS], "", is_awaited=True)  # it goes before those that nobody waits for
    with pytest.raises(OverloadedError):
        made.admit_job([FOUR_STEPS], "", is_awaited=True)


def test_jobs_that_callers_wait_for_and_other_requests_share_one_bound_of_their_number():
    made = admission(0.001, max_pending=2)
    made.admit_job([(32, 32, 1, 4)], "a")  # nobody waits for it
    [awaited] = made.admit_job([(32, 32, 1, 4)], "a", is_awaited=True)
    made.admit([request()], TEXT_TO_IMAGE)
    with pytest.raises(OverloadedError):
        made.admit([request()], TEXT_TO_IMAGE)
    with pytest.raises(OverloadedError):
        made.admit_job([(32, 32, 1, 4)], "a", is_awaited=True)
    made.admit_job([(32, 32, 1, 4)], "a")
    awaited.close()
    made.admit_job([(32, 32, 1, 4)], "a", is_awaited=True)


def test_the_jobs_of_one_key_do_not_take_the_share_of_the_others():
    made = admission(1.0, max_job_queue_s=100, max_job_queue_s_per_key=5)
    made.admit_job([FOUR_STEPS], "anna")
    with pytest.raises(OverloadedError) as refused:
        made.admit_job([FOUR_STEPS], "anna")
    assert refused.value.retry_after_s == 3
    made.admit_job([FOUR_STEPS], "berta")


def test_a_job_that_no_empty_queue_could_take_is_refused_with_the_limit():
    made = admission(1.0, max_job_queue_s=10)
    with pytest.raises(InvalidRequestError, match="about 12 s, at most 10 s"):
        made.admit_job([FOUR_STEPS] * 3, "")


def test_jobs_do_not_count_among_the_pending_requests_of_callers():
    made = admission(0.001, max_pending=1)
    made.admit_job([FOUR_STEPS] * 5, "")
    made.admit([request()], TEXT_TO_IMAGE)
    with pytest.raises(OverloadedError):
        made.admit([request()], TEXT_TO_IMAGE)


def test_each_size_is_predicted_once_between_measurements_and_the_latest_sizes_are_remembered(monkeypatch):
    made, looked_up = admission(1.0), []
    look_up = admission_module._at
    monkeypatch.setattr(admission_module, "_at", lambda known, shape: looked_up.append(shape) or look_up(known, shape))
    for side in range(10):
        made.admit_job([(64 + side, 64, 1, 4)] * 3, "", is_awaited=True)
    for _ in range(5):
        made.jobs_are_behind()
    assert len(looked_up) == 2 * 10
    for width in range(1, 3 * admission_module.MOST_SIZES):
        made.costs.learn((width, 1, 1), 1, {"denoiser_forwards": float(width)})
    assert len(made.costs.step_s) == len(made.costs.decode_s) == admission_module.MOST_SIZES
    assert made.costs.predict((width, 1, 1), 2) == 2 * width


# --- over HTTP ---

IMAGES = "/v1/images/generations"


async def test_health_is_answered_when_no_more_requests_are_and_these_get_429():
    answered, let_go = [], asyncio.Event()

    async def ends_when_told(scope, receive, send):
        answered.append(scope["path"])
        if scope["path"] != "/health":
            await let_go.wait()

    room = RoomForRequests(ends_when_told, Admission(AdmissionArgs()).overloaded, max_requests=2)
    sent: list[dict[str, Any]] = []

    async def send(message):
        sent.append(message)

    async def ask(path: str) -> None:
        await room({"type": "http", "method": "GET", "path": path}, None, send)

    following = [asyncio.ensure_future(ask(f"/v1/jobs/{number}/events")) for number in range(2)]
    await until(lambda: len(answered) == 2)
    await ask(IMAGES)
    await ask("/health")
    assert answered == ["/v1/jobs/0/events", "/v1/jobs/1/events", "/health"]
    assert sent[0]["status"] == 429
    assert int(dict(sent[0]["headers"])[b"retry-after"]) >= 1
    assert json.loads(sent[1]["body"])["error"]["code"] == "rate_limit_exceeded"
    let_go.set()
    await asyncio.gather(*following)
    await ask(IMAGES)
    assert answered[-1] == IMAGES


async def test_large_bodies_at_once_get_429_and_their_bytes_are_free_again_at_the_end(server):
    let_go, held = asyncio.Event(), 0
    limited = BodySizeLimit(server, max_bytes_at_once=1000)

    async def post() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(limited), base_url="http://test") as client:
            return await client.post(IMAGES, json={"prompt": "x" * 600})

    async def make_later(given: GenerationRequest) -> Media:
        await let_go.wait()
        return await make_at_once(given)

    server.make = make_later
    first = asyncio.ensure_future(post())
    await until(lambda: len(server.requests) == 1)
    held = limited.num_bytes
    refused = await post()
    assert 600 < held < 1000
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert refused.headers["retry-after"] == "5"
    let_go.set()
    assert (await first).status_code == 200
    assert limited.num_bytes == 0
    assert (await post()).status_code == 200


async def test_too_many_requests_get_429_with_retry_after_and_the_others_their_picture(server):
    server.configure(admission=AdmissionArgs(max_queue_s=10, first_guess_s=5))
    let_go = asyncio.Event()

    async def make_later(given: GenerationRequest) -> Media:
        await let_go.wait()
        return await make_at_once(given)

    server.make = make_later
    asked = [asyncio.ensure_future(server.post("/v1/images/generations", json={"prompt": "x"})) for _ in range(6)]
    await until(lambda: sum(task.done() for task in asked) == 4)
    let_go.set()
    answers = await asyncio.gather(*asked)
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "5"
            assert answer.json()["error"]["code"] == "rate_limit_exceeded"
            assert answer.json()["error"]["type"] == "rate_limit_error"
    assert server.model.admission.num_pending == 0
    told = sum(envelope.refused_before for envelope in server.handle.envelopes)
    assert told + server.model.admission.take_refused() == 4


async def test_limits_per_key_count_by_the_label_of_the_key(server, tmp_path):
    (anna, anna_line), (berta, berta_line) = new_key("anna"), new_key("berta")
    (tmp_path / "keys").write_text(f"{anna_line}\n{berta_line}\n", encoding="utf-8")
    server.configure(
        api_keys_file=tmp_path / "keys",
        admission=AdmissionArgs(max_queue_s=100, max_queue_s_per_key=5, first_guess_s=5),
    )
    let_go = asyncio.Event()

    async def make_later(given: GenerationRequest) -> Media:
        await let_go.wait()
        return await make_at_once(given)

    server.make = make_later

    def ask(key: str) -> asyncio.Task[Any]:
        headers = {"authorization": f"Bearer {key}"}
        return asyncio.ensure_future(server.post("/v1/images/generations", json={"prompt": "x"}, headers=headers))

    first = ask(anna)
    await until(lambda: len(server.requests) == 1)
    assert (await ask(anna)).status_code == 429
    other = ask(berta)
    await until(lambda: len(server.requests) == 2)
    let_go.set()
    assert [(await first).status_code, (await other).status_code] == [200, 200]


async def test_failures_and_hung_up_callers_leave_the_queue_empty(server):
    async def fail(_: GenerationRequest) -> Media:
        raise RuntimeError

    server.make = fail
    assert (await server.post("/v1/images/generations", json={"prompt": "x", "n": 3})).status_code == 500
    assert server.model.admission.num_pending == 0

    async def never(_: GenerationRequest) -> Media:
        await asyncio.Event().wait()
        raise AssertionError

    server.make = never
    for body in ({"prompt": "x"}, {"prompt": "x", "stream": True}):
        asked = asyncio.ensure_future(server.post("/v1/images/generations", json=body))
        await until(lambda: server.model.admission.num_pending == 1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: server.model.admission.num_pending == 0)


async def test_answers_tell_the_seconds_of_waiting_and_of_computing(server):
    answer = await server.post("/v1/images/generations", json={"prompt": "x", "n": 2})
    assert float(answer.headers["x-compute-seconds"]) == pytest.approx(0.024)  # two of 0.012
    assert float(answer.headers["x-queue-seconds"]) >= 0
    refused = await server.post("/v1/images/generations", json={"prompt": ""})
    assert "x-compute-seconds" not in refused.headers
