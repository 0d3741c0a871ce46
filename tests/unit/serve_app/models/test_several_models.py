"""Two models behind one endpoint: which of them a request means, who may use it, and what is told of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
from pydantic import ValidationError

from deployments.errors import StageUnavailableError
from deployments.messages import GenerationRequest, Media, MediaFile
from serve_app.api_keys import new_key
from serve_app.http.playground.cluster import ClusterWatch
from serve_app.service import ServiceArgs
from tests.support.in_process import Server, description, make_at_once, picture, serving, until
from tests.support.jobs_in_process import ended
from tests.support.played_stages import Method

IMAGES, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
FLUX = description("FluxPipeline", "flow_shift", takes_adapters=True)
WAN = description("WanPipeline", "num_frames", media_kind="video", tasks=("text_to_video",), takes_adapters=True)
EDITING = description("QwenImageEditPipeline", "image", tasks=("image_to_image",))
ALIASES = {"gpt-image-1": "flux", "sora-2": "wan"}


async def make(request: GenerationRequest) -> Media:
    if request.output.kind == "image":
        return await make_at_once(request)
    file = MediaFile(b"a video", "video/mp4", 32, 32, 9, 16.0)
    return Media((file,), {"denoise": 0.02, "denoiser_forwards": 0.01, "decode": 0.001, "encode_media": 0.001})


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "out") as server:
        server.make = make
        serve(server)
        yield server


def serve(server: Server, **args: Any) -> None:
    server.configure(several={"flux": FLUX, "wan": WAN}, **{"aliases": ALIASES, **args})


def makers(server: Server) -> dict[str, int]:
    """How many requests came as far as the stages of each model."""
    return {name: len(handle.requests) for name, handle in server.handles.items()}


async def call(server: Server, method: str, path: str, key: str = "", **arguments: Any) -> httpx.Response:
    async with server.client(headers={"authorization": f"Bearer {key}"} if key else {}) as client:
        return await client.request(method, path, **arguments)


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


# --- which model ---


@pytest.mark.parametrize(
    ("route", "model", "maker"),
    [
        (IMAGES, "flux", "flux"),
        (IMAGES, "gpt-image-1", "flux"),
        (IMAGES, None, "flux"),
        ("/v1/videos/generations", "sora-2", "wan"),
        ("/v1/videos/generations", None, "wan"),
    ],
)
async def test_the_body_chooses_the_model_or_what_it_asks_for_does(
    server: Server, route: str, model: str | None, maker: str
) -> None:
    answer = await server.post(route, json={"prompt": "a fox"} | ({"model": model} if model else {}))
    assert (answer.status_code, answer.json()["model"]) == (200, maker), answer.text
    assert makers(server) == {"flux": 0, "wan": 0} | {maker: 1}
    [request] = server.handles[maker].requests
    assert request.model == maker


async def test_a_moving_picture_at_the_route_of_pictures_is_made_by_the_model_of_videos(server: Server) -> None:
    await server.post(IMAGES, json={"prompt": "a fox", "output_format": "gif"})
    assert makers(server) == {"flux": 0, "wan": 1}


async def test_an_edit_goes_to_the_model_that_takes_pictures(server: Server) -> None:
    server.configure(several={"flux": FLUX, "wan": WAN, "qwen": EDITING})
    form = {"files": {"image": ("a.png", picture(), "image/png")}, "data": {"prompt": "a hat"}}
    assert (await server.post(EDITS, **form)).json()["model"] == "qwen"
    assert (await server.post(IMAGES, json={"prompt": "a fox"})).json()["model"] == "flux"


async def test_a_default_goes_before_the_order_but_not_where_it_cannot_make_it(server: Server) -> None:
    second = description("StableDiffusion3Pipeline")
    server.configure(several={"flux": FLUX, "sd3": second, "qwen": EDITING}, defaults={"image": "sd3", "edit": "sd3"})
    assert (await server.post(IMAGES, json={"prompt": "a fox"})).json()["model"] == "sd3"
    form = {"files": {"image": ("a.png", picture(), "image/png")}, "data": {"prompt": "a hat"}}
    assert (await server.post(EDITS, **form)).json()["model"] == "qwen"


async def test_a_model_of_another_kind_says_where_it_is_asked(server: Server) -> None:
    answer = await server.post(IMAGES, json={"prompt": "a fox", "model": "wan"})
    assert error_of(answer) == (400, "not_supported", "model")
    assert "/v1/videos" in answer.json()["error"]["message"]


async def test_what_no_model_makes_is_refused_with_what_is_there(server: Server) -> None:
    answer = await server.post("/v1/audio/generations", json={"prompt": "rain"})
    assert error_of(answer) == (404, "model_not_found", "model")
    assert "'flux', 'wan'" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["nothing", "flux:none", "nothing:sketch", "wan:", ":", ""])
async def test_an_unknown_model_is_a_404_that_lists_what_is_there(server: Server, name: str) -> None:
    for answer in (
        await server.post(IMAGES, json={"prompt": "a fox", "model": name}),
        await server.post(VIDEOS, json={"prompt": "a fox", "model": name}),
    ):
        assert error_of(answer) == (404, "model_not_found", "model")
        assert name == "flux:none" or "this server has 'flux' and 'wan'" in answer.json()["error"]["message"]
    assert makers(server) == {"flux": 0, "wan": 0}


async def test_a_model_that_loads_is_not_passed_over_and_stops_none_that_is_named(server: Server) -> None:
    async def describe() -> None:
        raise StageUnavailableError("it is loading")

    server.configure(several={"flux": FLUX, "sd3": description("StableDiffusion3Pipeline")})
    server.handles["flux"].describe = Method(describe)
    answer = await server.post(IMAGES, json={"prompt": "a fox"})
    assert error_of(answer)[:2] == (503, "stage_unavailable")
    assert "'flux' is ready" in answer.json()["error"]["message"]
    assert (await server.post(IMAGES, json={"prompt": "a fox", "model": "sd3"})).status_code == 200
    health = (await call(server, "GET", "/health")).json()
    assert (health["missing"], health["models"]) == (["Played-flux"], {"flux": "loading", "sd3": "ready"})
    states = {each["id"]: each["state"] for each in (await call(server, "GET", "/v1/models")).json()["data"]}
    assert states == {"flux": "loading", "sd3": "ready"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # OpenAI's own videos end; the client says so
async def test_openais_client_makes_a_picture_and_a_video_from_one_base_url(server: Server) -> None:
    await server.open()
    server.service.start()
    http = httpx.AsyncClient(transport=httpx.ASGITransport(server), base_url="http://test")
    client = openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http)
    pictures = await client.images.generate(model="gpt-image-1", prompt="a fox")
    assert pictures.data is not None
    assert pictures.data[0].b64_json
    video = await client.videos.create_and_poll(model="sora-2", prompt="a fox", poll_interval_ms=20)
    assert (video.status, video.model) == ("completed", "wan")
    assert (await client.videos.download_content(video.id)).content == b"a video"


# --- what is told ---


async def test_the_list_has_every_model_with_its_kind_state_and_other_names(server: Server) -> None:
    data = (await call(server, "GET", "/v1/models")).json()["data"]
    told = [(each["id"], each["kind"], each["state"], each["alias_of"]) for each in data]
    assert told == [
        ("flux", "image", "ready", None),
        ("gpt-image-1", "image", "ready", "flux"),
        ("wan", "video", "ready", None),
        ("sora-2", "video", "ready", "wan"),
    ]
    details = {name: (await call(server, "GET", f"/v1/models/{name}")).json() for name in ("flux", "wan", "sora-2")}
    assert [each["asked"]["makes"] for each in details.values()] == ["image", "video", "video"]
    taken = {name: {each["name"] for each in about["arguments"]} for name, about in details.items()}
    assert "num_frames" in taken["wan"]
    assert "num_frames" not in taken["flux"]
    assert (await call(server, "GET", "/v1/model_info?model=wan")).json()["output_types"] == ["video"]


async def test_the_openapi_document_tells_whose_each_field_is(server: Server) -> None:
    kept = description("FluxPipeline", "flow_shift", "true_scale")
    server.configure(several={"flux": FLUX, "second": kept, "wan": WAN})
    schemas = (await call(server, "GET", "/openapi.json")).json()["components"]["schemas"]
    fields = schemas["ImageGenerationBody"]["properties"]
    assert fields["true_scale"]["description"].startswith("second")
    assert fields["flow_shift"]["description"].startswith("flux, second")
    assert "flow_shift" not in schemas["VideoGenerationBody"]["properties"]


class Nobody:
    """The answers of no replica."""

    async def results_async(self, timeout_s: float | None = None) -> list[Any]:
        return []


async def test_the_cluster_view_tells_whose_each_deployment_is(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for handle in server.handles.values():
        monkeypatch.setattr(handle, "broadcast", lambda *_: Nobody())
    await server.open()
    seen = await ClusterWatch(server.service.models, server.service.jobs).look()
    assert [(each["name"], each["model"]) for each in seen["deployments"]] == [
        ("Played-flux", "flux"),
        ("Played-wan", "wan"),
    ]


# --- keys, limits, LoRAs ---


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    made = {label: new_key(label) for label in ("anna", "berta")}
    (tmp_path / "keys").write_text("\n".join(line for _, line in made.values()))
    return {label: key for label, (key, _) in made.items()}


async def test_for_a_key_that_may_not_use_a_model_it_is_not_there(
    server: Server, tmp_path: Path, keys: dict[str, str]
) -> None:
    models = {"flux": {}, "wan": {"model_keys": ["berta"], "adapters": {"slow": "o/slow"}}}
    serve(server, models=models, api_keys_file=tmp_path / "keys")
    for name in ("wan", "sora-2", "wan:slow"):
        answer = await call(server, "POST", VIDEOS, keys["anna"], json={"prompt": "a fox", "model": name})
        assert error_of(answer) == (404, "model_not_found", "model")
        assert "this server has 'flux'" in answer.json()["error"]["message"]
        assert (await call(server, "GET", f"/v1/models/{name}", keys["anna"])).status_code == 404
    listed = (await call(server, "GET", "/v1/models", keys["anna"])).json()["data"]
    assert [each["id"] for each in listed] == ["flux", "gpt-image-1"]
    assert (await call(server, "GET", "/v1/loras", keys["anna"])).json()["data"] == []
    assert (await call(server, "GET", "/v1/loras/slow", keys["anna"])).status_code == 404
    answer = await call(server, "POST", "/v1/videos/generations", keys["berta"], json={"prompt": "a fox"})
    assert (answer.status_code, answer.json()["model"]) == (200, "wan")
    answer = await call(server, "POST", "/v1/videos/generations", keys["anna"], json={"prompt": "a fox"})
    assert error_of(answer)[0] == 400, "the only one that she may use makes pictures"


async def test_each_model_has_limits_and_a_queue_of_its_own(server: Server) -> None:
    held = asyncio.Event()

    async def wait(request: GenerationRequest) -> Media:
        if request.model == "flux":
            await held.wait()
        return await make(request)

    server.make = wait
    models = {"flux": {"limits": {"max_steps": 3}, "admission": {"max_pending": 1}}, "wan": {}}
    serve(server, models=models)
    few, many = {"prompt": "a fox", "num_inference_steps": 2}, {"prompt": "a fox", "num_inference_steps": 9}
    assert error_of(await server.post(IMAGES, json=many)) == (400, "limit_exceeded", "num_inference_steps")
    first = asyncio.create_task(server.post(IMAGES, json=few))
    await until(lambda: bool(server.handles["flux"].requests))
    assert (await server.post(IMAGES, json=few | {"seed": 2})).status_code == 429
    assert (await server.post("/v1/videos/generations", json=many)).status_code == 200
    held.set()
    assert (await first).status_code == 200


async def test_a_body_beyond_the_limit_of_its_model_is_a_413(server: Server) -> None:
    serve(server, models={"flux": {"limits": {"max_body_bytes": 1000}}, "wan": {}})
    long = {"prompt": "a fox " * 300}
    assert (await server.post(IMAGES, json=long)).status_code == 413
    assert (await server.post("/v1/videos/generations", json=long)).status_code == 200


async def test_a_lora_belongs_to_its_model(server: Server) -> None:
    both = {"both": "o/both"}
    models = {"flux": {"adapters": {"sketch": "o/sketch"} | both}, "wan": {"adapters": both}}
    serve(server, models=models)
    listed = {each["id"] for each in (await call(server, "GET", "/v1/loras")).json()["data"]}
    assert listed == {"flux:sketch", "flux:both", "wan:both"}
    assert (await server.post(IMAGES, json={"prompt": "a fox", "model": "flux:sketch"})).status_code == 200
    assert (await server.post(IMAGES, json={"prompt": "a fox", "model": "gpt-image-1:sketch"})).status_code == 200
    answer = await server.post(VIDEOS, json={"prompt": "a fox", "model": "wan:sketch"})
    assert error_of(answer) == (404, "model_not_found", "model")
    assert (await call(server, "GET", "/v1/loras/sketch")).json()["parent"] == "flux"
    assert (await call(server, "GET", "/v1/loras/wan:both")).json()["parent"] == "wan"
    assert error_of(await call(server, "GET", "/v1/loras/both"))[::2] == (400, "name")
    added = await server.post("/v1/loras", json={"name": "new", "path": "a"})
    assert error_of(added) == (400, "missing_required_parameter", "model")


# --- jobs ---


async def test_one_store_keeps_the_jobs_of_all_models_and_each_makes_its_own(server: Server) -> None:
    await server.open()
    server.service.start()
    async with server.client() as client:
        background = {"prompt": "a fox", "background": "true"}
        asked = [
            (await client.post(IMAGES, json=background)).json(),
            (await client.post(VIDEOS, json={"prompt": "a fox"})).json(),
        ]
        jobs = [await ended(client, each["id"]) for each in asked]
        assert [(each["model"], each["status"]) for each in jobs] == [("flux", "completed"), ("wan", "completed")]
        remixed = (await client.post(f"{VIDEOS}/{asked[1]['id']}/remix", json={"prompt": "a dog"})).json()
        assert remixed["model"] == "wan"
    assert makers(server)["flux"] == 1


async def test_a_model_that_is_away_or_busy_holds_up_no_job_of_another(server: Server) -> None:
    async def away(request: GenerationRequest) -> Media:
        if request.model == "wan":
            raise StageUnavailableError("its stages are not there")
        return await make(request)

    server.make = away
    serve(server, jobs={"max_running": 1, "max_queued": 1})
    await server.open()
    server.service.start()
    async with server.client() as client:
        await client.post(VIDEOS, json={"prompt": "a fox"})
        await until(lambda: makers(server)["wan"] >= 1)
        await client.post(VIDEOS, json={"prompt": "a cat"})
        made = (await client.post(IMAGES, json={"prompt": "a fox", "background": "true"})).json()
        assert (await ended(client, made["id"]))["status"] == "completed"


async def test_jobs_are_listed_by_their_kind_and_their_model_also_one_that_is_no_longer_served(server: Server) -> None:
    ids = [
        (await server.post(IMAGES, json={"prompt": "a fox", "background": True})).json()["id"],
        (await server.post(VIDEOS, json={"prompt": "a fox"})).json()["id"],
    ]

    async def listed(query: str) -> list[str]:
        return [each["id"] for each in (await call(server, "GET", f"/v1/jobs?{query}")).json()["data"]]

    for query, expected in (
        ("model=flux", ids[:1]),
        ("model=sora-2", ids[1:]),
        ("model=nothing", []),
        ("kind=video", ids[1:]),
        ("kind=video&model=flux", []),
    ):
        assert await listed(query) == expected, query
    server.configure(several={"flux": FLUX})
    assert await listed("model=wan") == ids[1:]
    assert error_of(await call(server, "GET", "/v1/jobs?kind=poem")) == (400, "invalid_value", "kind")
    assert (await call(server, "DELETE", f"{VIDEOS}/{ids[1]}")).json()["deleted"] is True
    assert await listed("model=wan") == []


# --- names ---

NAMES = {"black-forest-labs/FLUX.1-dev": "flux", "a b": "flux", "x:y": "wan"}


async def test_a_name_with_slashes_spaces_or_colons_is_one_everywhere(server: Server, tmp_path: Path) -> None:
    adapters = {"flux": {"adapters": {"sketch": "a.safetensors"}}, "wan": {"adapters": {"neon": "b.safetensors"}}}
    serve(server, aliases=NAMES, models=adapters)
    for name, model in NAMES.items():
        adapter = next(iter(adapters[model]["adapters"]))
        for address in (quote(name), quote(name, safe="")):
            assert (await call(server, "GET", f"/v1/models/{address}")).json()["alias_of"] == model
            assert (await call(server, "GET", f"/v1/models/{address}:{adapter}")).json()["parent"] == model
            assert (await call(server, "GET", f"/v1/loras/{address}:{adapter}")).json()["id"] == f"{model}:{adapter}"
            refused = await call(server, "DELETE", f"/v1/loras/{address}:{adapter}")
            assert error_of(refused) == (409, "lora_configured", "name")
        route = IMAGES if model == "flux" else VIDEOS
        assert (await server.post(route, json={"prompt": "a fox", "model": f"{name}:{adapter}"})).status_code == 200
    missing = await call(server, "GET", "/v1/loras/nothing")
    assert error_of(missing) == (404, "lora_not_found", "name")
    assert missing.json()["error"]["message"].endswith("there are flux:sketch, wan:neon")


async def test_where_a_model_is_named_no_lora_is_meant(server: Server, tmp_path: Path) -> None:
    places = {"adapter_places": (str(tmp_path),), "aliases": {"wan:taken": "flux", "glow": "wan"}}
    serve(server, models={"flux": {"adapters": {"sketch": "a.safetensors"}}, "wan": {}}, **places)
    for name in ("FLUX", "flux:", "flux:sketch", "flux:nothing"):
        answer = await server.post("/v1/loras", json={"name": "new", "path": "a", "model": name})
        assert error_of(answer) == (404, "model_not_found", "model"), name
    for name, status in (("flux", 200), ("flux:sketch", 200), ("flux:nothing", 404), ("nothing", 404)):
        assert (await call(server, "GET", f"/v1/model_info?model={name}")).status_code == status, name
    for name in ("taken", "glow"):  # of the models wan:taken and glow
        answer = await server.post("/v1/loras", json={"name": name, "path": "a", "model": "wan"})
        assert error_of(answer) == (409, "name_taken", "name"), name


@pytest.mark.parametrize("alias", ["", " ", "a\n", " a", "a\x00b", "a" * 129])
@pytest.mark.parametrize("place", ["aliases", "model_aliases", "model_name"])
def test_a_name_that_no_address_can_have_is_refused(place: str, alias: str) -> None:
    args: dict[str, Any] = {
        "aliases": {"models": {"flux": {}}, "aliases": {alias: "flux"}},
        "model_aliases": {"model_name": "flux", "model_aliases": (alias,)},
        "model_name": {"model_name": alias},
    }[place]
    with pytest.raises(ValidationError, match=place):
        ServiceArgs(**args)
