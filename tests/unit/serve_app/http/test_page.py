"""The page's routes: what is sent, to whom, with which headers; what it is told of the model and the cluster."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.api_keys import hash_of
from serve_app.errors import OverloadedError
from serve_app.http.playground import cluster
from serve_app.http.playground.cluster import ClusterWatch, short_name
from serve_app.http.playground.files import FOLDER, page_files
from tests.support.in_process import Server, description, serving
from tests.support.jobs_in_process import ended, server_with_jobs
from tests.support.played_page import INPAINTING, PageServer

MOST_BYTES = 200_000
ADDRESS = re.compile(r"https?://|(?<![\w:])//[a-z]", re.IGNORECASE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


async def test_the_page_and_each_of_its_files_are_sent_with_a_strict_policy_and_a_tag(folder: Path) -> None:
    with serving(folder) as server:
        async with server.client() as client:
            for path in ("/", *(f"/ui/{name}" for name in page_files())):
                answer = await client.get(path)
                policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
                assert (answer.status_code, policy["default-src"], policy["script-src"]) == (200, "'none'", "'self'")
                assert {policy[name] for name in ("frame-ancestors", "base-uri", "form-action")} == {"'none'"}
                assert answer.headers["x-content-type-options"] == "nosniff"
                again = await client.get(path, headers={"If-None-Match": answer.headers["etag"]})
                assert (again.status_code, again.content) == (304, b"")
                assert (await client.head(path)).status_code == 200
            assert (await client.get("/ui/nothing.js")).status_code == 404
            assert (await client.get("/ui/../routes.py")).status_code == 404
            assert "/ui/cluster" not in (await client.get("/openapi.json")).json()["paths"]


async def test_the_page_is_small_and_names_no_other_host() -> None:
    files = page_files()
    assert sum(len(file.data) for file in files.values()) < MOST_BYTES
    for name, file in files.items():
        text = file.data.decode().replace("http://www.w3.org/2000/svg", "")
        assert not ADDRESS.findall(text), name
        assert "innerHTML" not in text, name
        assert "style=" not in text, name


def test_every_file_that_the_page_refers_to_is_there_and_none_is_left_over() -> None:
    texts = {name: file.data.decode() for name, file in page_files().items()}
    named = set(re.findall(r'(?:href|src)="ui/([^"]+)"', texts["index.html"]))
    for name, text in texts.items():
        if name.endswith(".js"):
            named |= {str(Path(name).parent / each) for each in re.findall(r'from "\./([^"]+)"', text)}
    assert named == set(texts) - {"index.html"}
    ids = set(re.findall(r'id="([^"]+)"', texts["index.html"]))
    assert {each for text in texts.values() for each in re.findall(r'byId\("([\w-]+)"\)', text)} <= ids | {
        "field-prompt"
    }
    assert max(len(list(each.iterdir())) for each in (FOLDER, FOLDER / "js")) <= 12


async def test_where_it_is_off_its_routes_do_not_exist(folder: Path) -> None:
    with serving(folder) as server:
        server.configure(playground=False)
        async with server.client() as client:
            for path in ("/", "/ui/style.css", "/ui/cluster"):
                answer = await client.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_with_keys_the_page_is_open_and_what_it_asks_for_is_not(folder: Path) -> None:
    keys = folder / "keys"
    keys.write_text(f"me:{hash_of('sk-1')}\n")
    with serving(folder) as server:
        server.configure(api_keys_file=keys)
        async with server.client() as client:
            for path in ("/", *(f"/ui/{name}" for name in page_files())):
                assert (await client.get(path)).status_code == 200
            for path in ("/ui/cluster", "/ui/nothing", "/v1/models", "/docs", "/ui/"):
                assert (await client.get(path)).status_code == 401, path
        server.configure(api_keys_file=keys, playground=False)
        async with server.client() as client:
            assert (await client.get("/")).status_code == 401


async def test_a_host_that_is_not_the_servers_own_gets_no_page(folder: Path) -> None:
    with serving(folder) as server:
        async with server.client(headers={"Host": "evil.example"}) as client:
            assert (await client.get("/")).status_code == 403


async def test_under_a_prefix_the_page_is_found_and_refers_to_nothing_above_itself(folder: Path) -> None:
    server = PageServer(folder, prefix="/flux")
    try:
        async with server.client(follow_redirects=True) as client:
            answer = await client.get("/flux")
            assert (answer.status_code, answer.url.path) == (200, "/flux/")
            assert (await client.get("/flux/ui/js/app.js")).status_code == 200
            assert not re.findall(r'(?:href|src)="/', answer.text)
            assert (await client.get("/")).status_code == 404
    finally:
        server.close()


async def test_a_model_says_where_it_is_asked_and_with_what(folder: Path) -> None:
    with serving(folder) as server:
        server.configure(INPAINTING)
        async with server.client() as client:
            details = (await client.get("/v1/models/flux")).json()
            assert details["asked"] == {
                "makes": "image", "route": "/v1/images/generations", "tasks": ["text_to_image", "inpainting"],
                "size": {"default_width": 32, "default_height": 32, "multiple_of": 16, "max_side": 8192,
                         "max_pixels": 4_194_304},
                "max_n": 10, "output_formats": ["png", "jpeg", "webp"], "previews": 3,
            }  # fmt: skip
            media = {each["field"]: each["media"] for each in details["arguments"] if each["media"]}
            assert media == {"image": "picture", "mask_image": "picture", "control_video": "video", "voice": "sound"}


@pytest.mark.parametrize(
    ("kind", "changes", "asked"),
    [
        ("video", {"media_kind": "video"}, {"route": "/v1/videos", "previews": 3, "max_n": 10}),
        ("audio", {"media_kind": "audio"}, {"route": "/v1/audio/generations", "previews": 0}),
        ("tensors", {"media_kind": "tensors"}, {"route": "/v1/tensors/generations", "previews": 0}),
        ("image", {"tasks": ("image_to_image",)}, {"route": "/v1/images/edits", "tasks": ["image_to_image"]}),
    ],
)
async def test_each_kind_of_medium_has_its_route(
    folder: Path, kind: str, changes: dict[str, Any], asked: dict[str, Any]
) -> None:
    with serving(folder) as server:
        server.configure(description("SomePipeline", "images", **changes))
        async with server.client() as client:
            details = (await client.get("/v1/models/flux")).json()
    assert details["asked"] | asked == details["asked"]
    fields = [each["field"] for each in details["arguments"]]
    assert ("image" if asked["route"].endswith("edits") else "images") in fields


async def test_the_files_of_any_job_are_read_by_their_place_in_it(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (_, client):
        job = (await client.post("/v1/images/generations", json={"prompt": "x", "n": 2, "background": True})).json()
        await ended(client, job["id"])
        for index in (0, 1):
            answer = await client.get(f"/v1/jobs/{job['id']}/content", params={"index": index})
            assert answer.content.startswith(b"\x89PNG")
            assert (answer.headers["content-type"], answer.headers["accept-ranges"]) == ("image/png", "bytes")
        assert (await client.get(f"/v1/jobs/{job['id']}/content?index=2")).json()["error"]["param"] == "index"
        assert (await client.get("/v1/jobs/job_x/content")).status_code == 404


async def test_a_job_that_is_not_done_has_no_files(tmp_path: Path) -> None:
    async with server_with_jobs(tmp_path) as (server, client):
        held = asyncio.Event()
        server.make = lambda _: held.wait()
        job = (await client.post("/v1/images/generations", json={"prompt": "x", "background": True})).json()
        answer = await client.get(f"/v1/jobs/{job['id']}/content")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "output_not_ready")
        await client.post(f"/v1/jobs/{job['id']}/cancel")


# --- the cluster ---


async def watch_of(server: Server, **changes: Any) -> ClusterWatch:
    await server.open()
    service = server.service
    return ClusterWatch(service.models, service.jobs, look_s=0.01, **changes)


async def test_however_many_watch_each_replica_is_asked_once_a_look_and_by_nobody_when_they_have_left(
    folder: Path,
) -> None:
    server = PageServer(folder)
    try:
        watch = await watch_of(server, watch_s=60)
        watching = [watch.watch() for _ in range(10)]
        first = await asyncio.gather(*(anext(each) for each in watching))
        assert all(each == first[0] for each in first)
        assert server.denoiser.looks <= 2
        await asyncio.gather(*(each.aclose() for each in watching))
        await asyncio.sleep(0.05)
        looks = server.denoiser.looks
        await asyncio.sleep(0.1)
        assert server.denoiser.looks == looks
    finally:
        server.close()


async def test_a_look_shows_replicas_their_share_their_batches_and_their_requests_and_no_name_of_them(
    folder: Path,
) -> None:
    server = PageServer(folder)
    try:
        watch = await watch_of(server)
        server.denoiser.present["job-7"] = {
            "request_id": "job-7", "stage": "denoiser", "state": "running", "since_s": 1.0, "steps": 3, "num_steps": 8,
        }  # fmt: skip
        await watch.look()
        seen = await watch.look()
        encoder, denoiser, vae = seen["deployments"]
        assert [each["name"] for each in (encoder, denoiser, vae)] == ["Encoder", "Denoiser", "VAE"]
        assert [len(each["replicas"]) for each in (encoder, denoiser, vae)] == [2, 2, 2]
        replica = next(each for each in denoiser["replicas"] if each["stages"][0]["requests"])
        [stage] = replica["stages"]
        assert (stage["stage"], stage["present"]) == ("denoiser", 1)
        assert 0 < stage["busy"] <= 1  # by the time between the looks, however long it was
        assert replica["batches"] == [{"size": 1, "count": 1}, {"size": 4, "count": 3}]
        [request] = stage["requests"]
        assert (request["id"], request["steps"], request["num_steps"]) == (short_name("job-7"), 3, 8)
        assert seen["waiting"] == {"let_in": 0, "queue_s": 0, "jobs": {"queued": 0, "in_progress": 0}}
        text = json.dumps(seen)
        assert "job-7" not in text
        assert "#" not in text
    finally:
        server.close()


async def test_a_deployment_that_does_not_answer_is_said_to_be_silent_and_the_others_are_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ANSWER_S", 0.05)
    server = PageServer(folder)
    try:
        watch = await watch_of(server)

        class Silent:
            async def results_async(self, timeout_s: float) -> list[Any]:
                await asyncio.sleep(timeout_s)
                raise TimeoutError

        server.vae.broadcast = lambda *_: Silent()  # type: ignore[assignment,method-assign]
        seen = await watch.look()
        assert [bool(each["trouble"]) for each in seen["deployments"]] == [False, False, True]
    finally:
        server.close()


async def test_a_stream_ends_after_its_time_and_no_more_than_a_bound_may_watch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = PageServer(folder)
    try:
        watch = await watch_of(server, watch_s=0.1)
        assert [each async for each in watch.watch()]
        monkeypatch.setattr(cluster, "MOST_WATCHERS", 0)
        with pytest.raises(OverloadedError):
            watch.watch()
    finally:
        server.close()


async def test_the_route_streams_events_of_the_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ClusterWatch.__init__, "__defaults__", (0.01, 0.1))
    server = PageServer(folder)
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://test") as client:
            answer = await client.get("/ui/cluster")
        assert answer.headers["content-type"].startswith("text/event-stream")
        [head, data, *_] = answer.text.split("\n")
        assert head == "event: cluster"
        assert len(json.loads(data.removeprefix("data: "))["deployments"]) == 3
    finally:
        server.close()
