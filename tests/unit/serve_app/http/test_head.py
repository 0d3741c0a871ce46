"""HEAD is answered wherever GET is: what GET would say, without the content."""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import quote

import httpx
import openai
import pytest

from tests.support.in_process import description
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.videos import make_video

VIDEO = description("WanPipeline", "num_frames", media_kind="video")
OF_THE_MOMENT = ("openai-poll-after-ms",)


async def test_head_of_every_get_route_has_the_headers_of_get_and_no_content(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path, describing=VIDEO) as (server, client):
        server.make = make_video
        job = (await client.post("/v1/videos", json={"prompt": "x"})).json()
        [url] = [httpx.URL(each).path for each in (await finished(client, job["id"]))["urls"]]
        values = {
            "video_id": job["id"],
            "job_id": job["id"],
            "key": url.removeprefix("/v1/files/"),
            "model": "flux",
            "name": "x",
        }
        paths = (await client.get("/openapi.json")).json()["paths"]
        routes = [path.format(**values) for path, methods in paths.items() if "get" in methods]
        assert len(routes) > 8
        for route in [*routes, "/docs", "/openapi.json", "/model_info", "/v1/nothing", "/v1/models/nothing"]:
            by_get, by_head = await client.get(route), await client.head(route, headers={"range": "bytes=0-1"})
            assert (by_head.status_code, by_head.content) == (by_get.status_code, b""), route
            assert headers_of(by_head) == headers_of(by_get), route


async def test_head_of_events_does_not_wait_for_the_end_of_the_job(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (server, client):
        never = asyncio.Event()

        async def make(_: object) -> None:
            await never.wait()

        server.make = make  # type: ignore[assignment]
        body = {"prompt": "x", "background": True}
        job = (await client.post("/v1/images/generations", json=body)).json()
        answer = await client.head(f"/v1/jobs/{job['id']}/events")
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, "text/event-stream")


async def test_a_route_without_get_refuses_head_and_one_with_get_names_it(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (_, client):
        assert (await client.head("/v1/images/generations")).status_code == 405
        answer = await client.put("/v1/models")
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("name", ["black-forest-labs/FLUX.1-dev", "a/b/c", "Ein Modell/ü %2F"])
async def test_a_model_id_with_slashes_is_found_however_it_is_written(tmp_path: Path, name: str) -> None:
    async with server_with_jobs(tmp_path, model_name=name) as (_, client):
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == name
        with_openai = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=client)
        assert (await with_openai.models.retrieve(name)).id == name
        for safe in ("/", ""):
            answer = await client.get(f"/v1/models/{quote(name, safe=safe)}")
            assert (answer.status_code, answer.json().get("id")) == (200, name)
        assert (await client.get("/v1/models/a/other")).json()["error"]["code"] == "model_not_found"
        made = await client.post("/v1/images/generations", json={"prompt": "x", "model": name})
        assert made.json()["model"] == name


async def finished(client: httpx.AsyncClient, job_id: str) -> dict[str, list[str]]:
    await ended(client, job_id)
    video: dict[str, list[str]] = (await client.get(f"/v1/videos/{job_id}")).json()
    return video


def headers_of(answer: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in OF_THE_MOMENT}
