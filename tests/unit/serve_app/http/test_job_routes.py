"""The routes of jobs and videos in this process: headers, refusals, pages, whose they are."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from starlette.datastructures import Headers

from deployments.errors import GenerationFailedError, InvalidRequestError
from deployments.messages import GenerationRequest, Media, OutputFormat, RequestWarning
from serve_app.api_keys import hash_of
from serve_app.http.asked import how_asked
from serve_app.http.routes.videos import _remixed
from serve_app.jobs import runner, tables
from serve_app.making.admission import AdmissionArgs
from tests.support.in_process import Server, description, make_at_once, until
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.videos import make_video

IMAGES = "/v1/images/generations"
VIDEO = description("WanPipeline", "num_frames", "fps", media_kind="video")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_S", 0.02)


async def test_background_and_a_preference_both_make_a_job(tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"json": {"prompt": "x", "background": True}},
        {"json": {"prompt": "x"}, "headers": {"Prefer": "handling=lenient, respond-async"}},
    ]
    async with server_with_jobs(tmp_path) as (_, client):
        for way in ways:
            answer = await client.post(IMAGES, **way)
            assert (answer.status_code, answer.json()["object"]) == (202, "job")
            job = await ended(client, answer.json()["id"])
            assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
            assert (job["status"], job["progress"], job["upload"]) == ("completed", 100, "done")
            picture = await client.get(job["result"]["data"][0]["url"])
            assert picture.content.startswith(b"\x89PNG")


async def test_a_key_on_the_synchronous_route_is_answered_once_and_for_all(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (server, client):
        headers = {"Idempotency-Key": "k"}
        answers = await asyncio.gather(*(client.post(IMAGES, json={"prompt": "x"}, headers=headers) for _ in range(5)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.text for answer in answers}) == 1
        assert base64.b64decode(answers[0].json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
        assert len(server.requests) == 1


async def test_a_failed_job_answers_a_synchronous_caller_as_the_failure_would_have(tmp_path: Path) -> None:
    async def fail(request: GenerationRequest) -> Media:
        raise GenerationFailedError("the replicas died")

    async with server_with_jobs(tmp_path) as (server, client):
        server.make = fail
        plain = await client.post(IMAGES, json={"prompt": "x"})
        keyed = await client.post(IMAGES, json={"prompt": "x"}, headers={"Idempotency-Key": "k"})
        assert (keyed.status_code, keyed.json()) == (plain.status_code, plain.json())
        assert plain.status_code == 500


async def test_a_caller_who_waits_with_a_key_is_not_refused_for_the_jobs_that_nobody_waits_for(tmp_path: Path) -> None:
    held = asyncio.Event()

    async def make(request: GenerationRequest) -> Media:
        if request.arguments["prompt"] == "later":
            await held.wait()
        return await make_at_once(request)

    async with server_with_jobs(tmp_path, jobs={"max_queued": 1, "max_running": 1}) as (server, client):
        server.make = make
        later = {"json": {"prompt": "later", "background": True}}
        first = await client.post(IMAGES, **later)
        await until(lambda: bool(server.requests))
        await client.post(IMAGES, **later)
        assert (await client.post(IMAGES, **later)).status_code == 429
        keyed = await client.post(IMAGES, json={"prompt": "x"}, headers={"Idempotency-Key": "k"})
        assert keyed.status_code == 200, keyed.text
        held.set()
        await ended(client, first.json()["id"])


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({"background": True, "stream": True}, {}, "background"),
        ({"stream": True}, {"Prefer": "wait=1"}, "Prefer"),
        ({}, {"Idempotency-Key": "k" * 256}, "Idempotency-Key"),
        ({"webhook_url": "https://a.example/"}, {}, "webhook_url"),
        ({"webhook_url": "https://a.example/", "background": True}, {}, "webhook_url"),
        ({"background": "transparent"}, {}, "background"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    tmp_path: Path, body: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    async with server_with_jobs(tmp_path) as (server, client):
        answer = await client.post(IMAGES, json={"prompt": "x"} | body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert server.requests == []


async def test_first_frames_on_the_way_are_refused_where_there_is_no_job(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (server, client):
        server.configure(VIDEO)
        await server.open()
        server.service.start()
        answer = await client.post("/v1/videos/generations", json={"prompt": "x", "partial_images": 2})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "partial_images")
        assert "Prefer: respond-async" in answer.json()["error"]["message"]
        assert server.requests == []


def test_a_key_of_other_characters_is_refused() -> None:
    assert how_asked(Headers({"idempotency-key": "a-Z_9"})).idempotency_key == "a-Z_9"
    for key in ("", "a b", "ä", "a\n"):
        with pytest.raises(InvalidRequestError):
            how_asked(Headers({"idempotency-key": key}))


async def test_a_form_of_strings_makes_the_video_that_json_makes(tmp_path: Path) -> None:
    fields = {"prompt": "x", "seconds": "2", "fps": "4", "size": "32x32", "seed": "5", "num_inference_steps": "3"}
    async with server_with_jobs(tmp_path, describing=VIDEO) as (server, client):
        form_parts = {name: (None, value) for name, value in fields.items()}
        by_form = (await client.post("/v1/videos", files=form_parts)).json()
        await ended(client, by_form["id"])  # while it is made, the same again would share its work
        by_json = (await client.post("/v1/videos", json={**fields, "seconds": 2, "fps": 4, "seed": 5})).json()
        await ended(client, by_json["id"])
        form, plain = (
            next(each for each in server.requests if each.request_id == video["id"]) for video in (by_form, by_json)
        )
    assert (form.arguments, form.seed, form.output) == (plain.arguments, plain.seed, plain.output)
    assert (by_form["seconds"], by_form["size"], by_form["seed"]) == ("2", "32x32", 5)


async def test_pages_of_videos_are_those_of_their_owner(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name}:{hash_of(name)}\n" for name in ("ann", "bob")))
    ann, bob = ({"Authorization": f"Bearer {name}"} for name in ("ann", "bob"))
    async with server_with_jobs(tmp_path, describing=VIDEO, api_keys_file=keys) as (_, client):
        made = [(await client.post("/v1/videos", json={"prompt": "x"}, headers=ann)).json()["id"] for _ in range(3)]
        page = (await client.get("/v1/videos", params={"limit": 2, "order": "asc"}, headers=ann)).json()
        rest = (await client.get("/v1/videos", params={"after": page["last_id"], "order": "asc"}, headers=ann)).json()
        others = (await client.get("/v1/videos", headers=bob)).json()
        stolen = await client.get(f"/v1/videos/{made[0]}", headers=bob)
        deleted = await client.delete(f"/v1/jobs/{made[0]}", headers=bob)
        events = await client.get(f"/v1/jobs/{made[0]}/events", headers=bob)
    assert [video["id"] for video in page["data"]] == made[:2]
    assert ([video["id"] for video in rest["data"]], rest["has_more"]) == (made[2:], False)
    assert (page["has_more"], page["first_id"]) == (True, made[0])
    assert (others["data"], others["first_id"], others["last_id"]) == ([], None, None)
    assert [answer.status_code for answer in (stolen, deleted, events)] == [404, 404, 404]


async def test_jobs_are_listed_by_their_status_and_pages_of_them_follow_each_other(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (server, client):
        held = asyncio.Event()

        async def make(request: GenerationRequest) -> Media:
            if request.arguments["prompt"] == "fails":
                raise GenerationFailedError("the replicas died")
            if request.arguments["prompt"] == "waits":
                await held.wait()
            return await make_at_once(request)

        async def ids(**query: Any) -> list[str]:
            answer = (await client.get("/v1/jobs", params={"order": "asc", **query})).json()
            return [job["id"] for job in answer["data"]]

        server.make = make
        asked = [(await client.post(IMAGES, json={"prompt": p, "background": True})).json()["id"] for p in
                 ("a", "fails", "b", "waits")]  # fmt: skip
        for job_id in asked[:3]:
            await ended(client, job_id)
        assert await ids() == asked
        assert await ids(status="completed") == [asked[0], asked[2]]
        assert await ids(status=["failed", "in_progress"]) == [asked[1], asked[3]]
        assert await ids(status="completed", limit=1) == asked[:1]
        assert await ids(status="completed", after=asked[0]) == [asked[2]]
        assert await ids(status="cancelled") == []
        refused = await client.get("/v1/jobs", params={"status": "done"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "status")
        held.set()


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 101}, {"order": "up"}, {"after": "video_unknown"}])
async def test_a_page_that_cannot_be_is_refused(tmp_path: Path, query: dict[str, Any]) -> None:
    async with server_with_jobs(tmp_path, describing=VIDEO) as (_, client):
        answer = await client.get("/v1/videos", params=query)
    assert answer.status_code == (404 if "after" in query else 400)
    assert answer.json()["error"]["param"] == next(iter(query))


async def test_two_callers_who_ask_the_same_at_once_share_one_generation(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def wait(request: GenerationRequest) -> Media:
        await go.wait()
        return await make_at_once(request)

    async with server_with_jobs(tmp_path) as (server, client):
        server.make = wait
        body = {"prompt": "x", "seed": 3}
        asked = [asyncio.ensure_future(client.post(IMAGES, json=body)) for _ in range(3)]
        async with asyncio.timeout(60):
            while server.model.admission.num_pending < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        go.set()
        answers = await asyncio.gather(*asked)
        assert len(server.requests) == 1
    assert len({answer.json()["data"][0]["b64_json"] for answer in answers}) == 1


async def test_jobs_beyond_the_queue_get_429_with_the_time_that_it_needs(tmp_path: Path) -> None:
    let_go = asyncio.Event()

    async def make_later(given: GenerationRequest) -> Media:
        await let_go.wait()
        return await make_at_once(given)

    async with server_with_jobs(
        tmp_path, describing=VIDEO, admission=AdmissionArgs(max_job_queue_s=12, first_guess_s=5)
    ) as (server, client):
        server.make = make_later
        accepted = [await client.post("/v1/videos", json={"prompt": str(number)}) for number in range(2)]
        assert [answer.status_code for answer in accepted] == [200, 200]
        refused = await client.post("/v1/videos", json={"prompt": "2"}, headers={"Idempotency-Key": "k"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "3")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert (await client.delete(f"/v1/videos/{accepted[0].json()['id']}")).status_code == 200
        late = await client.post("/v1/videos", json={"prompt": "2"}, headers={"Idempotency-Key": "k"})
        again = await client.post("/v1/videos", json={"prompt": "2"}, headers={"Idempotency-Key": "k"})
        assert late.status_code == again.status_code == 200
        assert late.json()["id"] == again.json()["id"], "who asks again for what there is needs no room"
        let_go.set()


async def test_urls_lead_to_where_the_application_is_served(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (server, _):
        transport = httpx.ASGITransport(server, root_path="/pictures")
        async with httpx.AsyncClient(transport=transport, base_url="http://test/pictures") as client:
            stored = await client.post(IMAGES, json={"prompt": "x", "response_format": "url"})
            url = stored.json()["data"][0]["url"]
            assert url.startswith("http://test/pictures/v1/files/images/")
            assert (await client.get(url.removeprefix("/pictures"))).headers["content-type"] == "image/png"
            job = await client.post(IMAGES, json={"prompt": "x", "background": True})
            assert job.headers["location"] == f"/pictures/v1/jobs/{job.json()['id']}"
            done = await ended(client, job.json()["id"])
            assert done["result"]["data"][0]["url"].startswith("http://test/pictures/v1/files/images/")


async def test_a_video_is_asked_for_as_sglangs_benchmark_does(tmp_path: Path) -> None:
    fields = {"prompt": "x", "size": "32x32", "num_frames": "4", "fps": "4", "num_outputs_per_prompt": "2"}
    form = {**fields, "extra_body": '{"seed": 5, "num_inference_steps": 3}'}
    async with server_with_jobs(tmp_path, describing=VIDEO) as (server, client):
        info = (await client.get("/v1/model_info")).json()
        assert (info["model_path"], info["is_image_gen"], info["output_types"]) == ("flux", False, ["video"])
        parts = {name: (None, value) for name, value in form.items()}
        job = (await client.post("/v1/videos", files={**parts, "model": (None, info["model_path"])})).json()
        await ended(client, job["id"])
    assert [(request.seed, request.arguments["num_inference_steps"]) for request in server.requests] == [(5, 3), (6, 3)]


async def test_a_video_that_its_caller_waits_for_goes_before_the_others(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=VIDEO) as (server, client):
        server.make = make_video
        waiting = [{}, {"Prefer": "wait=0"}, {"Prefer": "respond-async"}, {"Prefer": "wait=60"}]
        videos = [(await client.post("/v1/videos", json={"prompt": "x"}, headers=each)).json() for each in waiting]
        remix = await client.post(
            f"/v1/videos/{videos[3]['id']}/remix", json={"prompt": "y"}, headers={"Prefer": "wait=60"}
        )
        awaited = await asyncio.to_thread(awaited_jobs, server)
        assert awaited == {videos[3]["id"], remix.json()["id"]}
        for each in videos:
            await ended(client, each["id"])


def awaited_jobs(server: Server) -> set[str]:
    with server.service.jobs.store._engine.begin() as connection:
        return set(connection.execute(sa.select(tables.jobs.c.id).where(tables.jobs.c.is_awaited)).scalars())


async def test_every_video_keeps_the_id_of_its_end_user(tmp_path: Path) -> None:
    editing = description("WanPipeline", "num_frames", "video", media_kind="video", tasks=("video_to_video",))
    async with server_with_jobs(tmp_path, describing=editing) as (server, client):
        server.make = make_video
        video = (await client.post("/v1/videos", json={"prompt": "x", "user": "u1"})).json()
        assert (await ended(client, video["id"]))["result"]["safety_identifier"] == "u1"
        edited = await client.post(
            "/v1/videos/edits", json={"prompt": "x", "video": {"id": video["id"]}, "safety_identifier": "u2"}
        )
        remix = await client.post(f"/v1/videos/{edited.json()['id']}/remix", json={"prompt": "y"})
        for each in (edited, remix):
            assert (await ended(client, each.json()["id"]))["result"]["safety_identifier"] == "u2"


async def test_a_remix_is_answered_again_by_its_key_once_the_original_is_gone(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=VIDEO) as (server, client):
        server.make = make_video
        video = (await client.post("/v1/videos", json={"prompt": "x"})).json()
        remix = {"url": f"/v1/videos/{video['id']}/remix", "json": {"prompt": "y"}, "headers": {"Idempotency-Key": "k"}}
        first = (await client.post(**remix)).json()
        await ended(client, first["id"])
        await client.delete(f"/v1/videos/{video['id']}")
        again = await client.post(**remix)
        assert (again.status_code, again.json().get("id")) == (200, first["id"])


@pytest.mark.parametrize("prompt", ["far too long", "   "])
async def test_the_prompt_of_a_remix_is_checked_as_every_other(tmp_path: Path, prompt: str) -> None:
    async with server_with_jobs(tmp_path, describing=VIDEO, limits={"max_prompt_chars": 5}) as (server, client):
        server.make = make_video
        video = (await client.post("/v1/videos", json={"prompt": "x"})).json()
        answer = await client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": prompt})
        assert (answer.status_code, answer.json().get("error", {}).get("param")) == (400, "prompt")
        await ended(client, video["id"])


@pytest.mark.parametrize(("model", "num_steps", "codes"), [("wan", 3, ["no_effect"]), ("wan-2", None, [])])
def test_a_remix_takes_over_only_what_holds_for_its_own_model(
    model: str, num_steps: int | None, codes: list[str]
) -> None:
    warnings = tuple(RequestWarning(code, "extra_args", "") for code in ("not_checked", "no_effect"))
    output = OutputFormat("video", "mp4")
    original = GenerationRequest("video_1", "wan", {"prompt": "x"}, 7, output, num_steps=3, warnings=warnings)
    remix = _remixed(original, model, "y", "video_2", 0)
    assert (remix.model, remix.arguments["prompt"], remix.seed) == (model, "y", 7)
    assert (remix.num_steps, [each.code for each in remix.warnings]) == (num_steps, codes)


async def previews_of(client: httpx.AsyncClient, job_id: str) -> list[int]:
    """The steps of the previews among the events of a job that ends."""
    answer = await client.get(f"/v1/jobs/{job_id}/events")
    return [json.loads(line[6:])["step"] for line in re.findall(r"event: preview\n(data: .*)", answer.text)]


async def make_later(request: GenerationRequest) -> Media:
    await asyncio.sleep(0.5)  # what was shown on the way is written down by then
    return await (make_video if request.output.kind == "video" else make_at_once)(request)


async def test_partial_images_of_a_job_come_as_events_of_it(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (server, client):
        server.make = make_later
        made = await client.post(IMAGES, json={"prompt": "x", "background": True, "partial_images": 2})
        assert await previews_of(client, made.json()["id"]) == [1, 2]


async def test_partial_images_of_a_video_come_as_events_of_it_and_of_its_remix(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=VIDEO) as (server, client):
        server.make = make_later
        video = (await client.post("/v1/videos", json={"prompt": "x", "partial_images": 2})).json()
        assert await previews_of(client, video["id"]) == [1, 2]
        remix = (await client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "y"})).json()
        assert await previews_of(client, remix["id"]) == [1, 2]
