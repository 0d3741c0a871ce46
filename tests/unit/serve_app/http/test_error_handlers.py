"""Errors as the OpenAI client meets them, and what a wrapped error of a replica must not give away."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from fastapi import FastAPI, HTTPException
from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from deployments.errors import (
    CheckpointError,
    DeviceFullError,
    FeedsBackError,
    GenerationFailedError,
    InvalidRequestError,
    ModelNotFoundError,
    NotSupportedError,
    StageUnavailableError,
    StorageError,
    TooLargeForDeviceError,
)
from deployments.messages import GenerationRequest, Media
from serve_app.errors import ObjectNotFoundError, report_error
from serve_app.http.errors import install_error_handlers
from serve_app.http.middleware.limits import BodySizeLimit
from serve_app.requests.bodies import ImageGenerationBody
from tests.support.in_process import serving

SECRET = "/srv/secret/path.py"
TRACEBACK = f'Traceback (most recent call last):\n  File "{SECRET}", line 1'


def from_replica(cause: Exception) -> Exception:
    """What the caller of a replica catches when it raised `cause` there."""
    return RayTaskError("Encoder.encode", TRACEBACK, cause).as_instanceof_cause()


def deployment_unavailable() -> DeploymentUnavailableError:
    return DeploymentUnavailableError(DeploymentID("Encoder", "app"))


class Raises:
    """An application whose one route raises what the test says."""

    def __init__(self) -> None:
        self.error: Exception = RuntimeError()
        self.app = FastAPI()
        install_error_handlers(self.app)
        self.app.add_middleware(BodySizeLimit, max_body_bytes=10_000)

        @self.app.post("/v1/images/generations")
        async def generate(body: ImageGenerationBody) -> dict[str, Any]:
            raise self.error

        @self.app.get("/v1/models")
        async def models(limit: int = 1) -> dict[str, Any]:
            return {"object": "list", "data": []}

    def client(self) -> httpx.AsyncClient:
        # A server answers an unexpected error and raises it on: this client only looks at the answer.
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    async def post(self, error: Exception, **headers: str) -> httpx.Response:
        self.error = error
        async with self.client() as client:
            return await client.post("/v1/images/generations", json={"prompt": "x"}, headers=headers)


@pytest.fixture
def server() -> Raises:
    return Raises()


# --- kinds of errors ---


@pytest.mark.parametrize("wrap", [lambda error: error, from_replica], ids=["raised here", "raised in a replica"])
@pytest.mark.parametrize(
    ("error", "status", "type", "param", "code"),
    [
        (InvalidRequestError("no", "size"), 400, "invalid_request_error", "size", "invalid_value"),
        (NotSupportedError("no", "strength"), 400, "invalid_request_error", "strength", "not_supported"),
        (ModelNotFoundError("no"), 404, "invalid_request_error", "model", "model_not_found"),
        (ObjectNotFoundError("no"), 404, "invalid_request_error", "key", "file_not_found"),
        (StageUnavailableError("no"), 503, "server_error", None, "stage_unavailable"),
        (DeviceFullError("no"), 503, "server_error", None, "device_full"),
        (TooLargeForDeviceError("no"), 400, "invalid_request_error", "size", "too_large_for_device"),
        (StorageError("no"), 502, "server_error", None, "storage_failed"),
        (GenerationFailedError("no"), 500, "server_error", None, "generation_failed"),
        (FeedsBackError("no"), 500, "server_error", None, "generation_failed"),
        (CheckpointError("no"), 500, "server_error", None, "generation_failed"),
    ],
)
async def test_each_kind_of_error_has_its_status_and_says_its_own_sentence(
    server, wrap, error, status, type, param, code
):
    answer = await server.post(wrap(error))
    assert answer.status_code == status
    assert answer.json() == {"error": {"message": "no", "type": type, "param": param, "code": code}}


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("no", "size", "limit_exceeded"),
        NotSupportedError("no", "size"),
        ModelNotFoundError("no"),
        ObjectNotFoundError("no"),
        StorageError("no"),
        DeviceFullError("no"),
        TooLargeForDeviceError("no"),
    ],
)
def test_errors_survive_the_way_from_one_process_to_another(error):
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there), vars(there)) == (type(error), "no", vars(error))


async def test_an_error_that_two_replicas_passed_on_is_still_the_first_one(server):
    answer = await server.post(from_replica(from_replica(InvalidRequestError("no", "size"))))
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "no")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BackPressureError(7, 5), 429, "rate_limit_exceeded"),
        (from_replica(BackPressureError(7, 5)), 429, "rate_limit_exceeded"),
        (deployment_unavailable(), 503, "stage_unavailable"),
        (RayServeException(f"upstream actor died {SECRET}"), 503, "stage_unavailable"),
        (ActorUnavailableError(SECRET, None), 503, "stage_unavailable"),
        (from_replica(ActorDiedError()), 503, "stage_unavailable"),
        (OutOfMemoryError(SECRET), 503, "stage_unavailable"),
    ],
)
async def test_what_ray_raises_is_told_in_our_words(server, error, status, code):
    answer = await server.post(error)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "try again" in answer.json()["error"]["message"]
    assert SECRET not in answer.text


async def test_a_full_device_says_when_to_come_back(server):
    answer = await server.post(from_replica(DeviceFullError("the device has 1.0 GB free")))
    assert answer.headers["Retry-After"] == "5"


@pytest.mark.parametrize(("retry_after_s", "header"), [(None, "1"), (2.2, "3"), (30, "30")])
async def test_an_overloaded_stage_says_when_to_come_back(server, retry_after_s, header):
    answer = await server.post(BackPressureError(7, 5, 429, retry_after_s))
    assert answer.headers["Retry-After"] == header


@pytest.mark.parametrize("error", [BackPressureError(7, 5), deployment_unavailable()])
async def test_serves_own_errors_keep_our_shape_because_serve_finds_nowhere_to_put_its_handlers(
    error: Exception, tmp_path: Path
) -> None:
    async def fail(_: GenerationRequest) -> Media:
        raise error

    with serving(tmp_path) as server:
        app = await server.open()
        assert not hasattr(app, "add_exception_handler")  # ray.serve puts its handlers into what has it
        server.make = fail
        answer = await server.post("/v1/images/generations", json={"prompt": "x"})
    assert answer.json()["error"]["type"] in ("rate_limit_error", "server_error")


@pytest.mark.parametrize("error", [RuntimeError(SECRET), from_replica(ValueError(SECRET)), KeyError(SECRET)])
async def test_an_unexpected_error_gives_nothing_away_but_a_request_id_that_the_log_has(server, error, caplog):
    with caplog.at_level(logging.ERROR):
        answer = await server.post(error, **{"x-request-id": "req-42"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "req-42" in answer.json()["error"]["message"]
    for inside in (SECRET, "Traceback", "RuntimeError", "ValueError", "KeyError", "Encoder"):
        assert inside not in answer.text
    assert "req-42" in caplog.text
    assert SECRET in caplog.text


def test_an_error_without_a_request_gets_an_id_of_its_own(caplog):
    first, second = (report_error(RuntimeError()).message for _ in range(2))
    assert first != second


# --- bodies ---


@pytest.mark.parametrize(
    ("body", "param", "code", "says"),
    [
        (b"{", None, "invalid_json", "not valid JSON: .* at position 1"),
        (b"", None, "missing_required_parameter", "must be a JSON object"),
        (b"[1]", None, "invalid_value", "must be a JSON object"),
        (b'"text"', None, "invalid_value", "must be a JSON object"),
        (b"\xff\xfe\x00", None, None, "body"),
        (b'{"prompt": "x", "n": 0}', "n", "invalid_value", "^n: .*greater than or equal to 1, got 0$"),
        (b'{"prompt": "x", "n": "many"}', "n", "invalid_value", "valid integer.*, got 'many'$"),
        (b'{"prompt": "x", "size": "big"}', "size", "invalid_value", "^size: must be WIDTHxHEIGHT, .*, got 'big'$"),
        (
            b'{"prompt": "x", "output_format": "tiff"}',
            "output_format",
            "invalid_value",
            "^output_format: .*'png', 'jpeg', 'webp' or 'gif', got 'tiff'$",
        ),
        (b'{"prompt": ["x"]}', "prompt", "invalid_value", "^prompt: Input should be a valid string$"),
        (b'{"width": 64}', "width", "unknown_parameter", "unknown field 'width': use 'size'"),
        (b'{"prompt": "x", "image": "no base64!"}', "image", "invalid_value", "^image: .*base64"),
        (b'{"prompt": "\\ud800"}', "prompt", "invalid_value", "lone surrogate"),
        (b'{"\\ud800": 1}', "\\ud800", "unknown_parameter", "unknown field"),
        (b'{"prompt": "x", "extra_body": 3}', "extra_body", "invalid_value", "^extra_body must be an object"),
        (b'{"n": 1, "extra_body": {"n": 2}}', "extra_body", "invalid_value", "^extra_body: 'n' is given twice$"),
        (b'{"extra_body": {"steps": 1}}', "steps", "unknown_parameter", "use 'num_inference_steps'"),
        (b'{"prompt": "x", "size": "\\ud800"}', "size", "invalid_value", "^size"),
        (b'{"prompt": "x", "output_format": "\\ud800"}', "output_format", "invalid_value", "^output_format"),
        (b'{"prompt": "x", "extra_args": {"eta": NaN}}', "extra_args.eta", "invalid_value", "finite"),
        (b'{"prompt": "x", "extra_args": {"\\ud800": 1}}', "extra_args", "invalid_value", "surrogate"),
        (b'{"prompt": "x", "seed": NaN}', "seed", "invalid_value", "^seed: .*got nan"),
    ],
)
async def test_a_bad_body_is_a_400_that_names_the_field(server, body, param, code, says):
    async with server.client() as client:
        answer = await client.post("/v1/images/generations", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert code is None or error["code"] == code
    assert httpx.codes.is_client_error(answer.status_code)
    assert re.search(says, error["message"]), error["message"]


async def test_several_bad_fields_are_told_at_once(server):
    async with server.client() as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "x", "n": 0, "seed": -1})
    message = answer.json()["error"]["message"]
    assert "n: " in message
    assert "seed: " in message


async def test_a_huge_wrong_value_is_not_sent_back(server):
    async with server.client() as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "x", "size": "x" * 9000})
    assert answer.status_code == 400
    assert len(answer.content) < 1000


async def chunks(count: int) -> Any:
    for _ in range(count):
        yield b" " * 1000


@pytest.mark.parametrize("content", [b" " * 10_001, chunks(11)], ids=["announced", "in chunks"])
async def test_a_body_beyond_the_limit_is_a_413_and_the_next_request_is_served(server, content):
    async with server.client() as client:
        answer = await client.post("/v1/images/generations", content=content)
        assert answer.status_code == 413
        assert answer.json()["error"] == {
            "message": "the body may have at most 10000 bytes",
            "type": "invalid_request_error",
            "param": None,
            "code": "request_too_large",
        }
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_body_within_the_limit_passes(server):
    server.error = InvalidRequestError("reached the route")
    async with server.client() as client:
        body = b'{"prompt": "x"}' + b" " * 9_985
        for content in (body, _pieces(body)):
            answer = await client.post(
                "/v1/images/generations", content=content, headers={"Content-Type": "application/json"}
            )
            assert answer.json()["error"]["message"] == "reached the route"


async def _pieces(body: bytes) -> Any:
    for start in range(0, len(body), 1000):
        yield body[start : start + 1000]


# --- routes ---


async def test_a_route_that_is_not_there_and_a_wrong_method_have_openais_shape(server):
    async with server.client() as client:
        missing = await client.get("/v1/nothing")
        wrong = await client.delete("/v1/models")
        query = await client.get("/v1/models?limit=x")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert "GET /v1/nothing" in missing.json()["error"]["message"]
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["Allow"] == "GET"
    assert (query.status_code, query.json()["error"]["param"]) == (400, "limit")


async def test_an_http_exception_of_a_route_keeps_its_status_and_headers(server):
    answer = await server.post(HTTPException(503, "draining", {"Retry-After": "5"}))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert answer.json()["error"]["message"] == "draining"
    assert answer.json()["error"]["type"] == "server_error"


# --- the OpenAI client ---


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequestError("width must be a multiple of 16", "size"), openai.BadRequestError),
        (ModelNotFoundError("no such model"), openai.NotFoundError),
        (BackPressureError(7, 5), openai.RateLimitError),
        (StageUnavailableError("loading"), openai.InternalServerError),
        (RuntimeError(SECRET), openai.InternalServerError),
    ],
)
async def test_the_openai_client_raises_its_own_error_with_our_words(server, error, expected):
    server.error = error
    transport = httpx2.ASGITransport(server.app, raise_app_exceptions=False)
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        openai.AsyncOpenAI(api_key="k", base_url="http://test/v1", http_client=http, max_retries=0) as client,
    ):
        with pytest.raises(expected) as caught:
            await client.images.generate(prompt="x")
    assert caught.value.code is not None
    assert caught.value.type is not None
    if isinstance(error, InvalidRequestError):
        assert caught.value.param == error.param
        assert error.message in str(caught.value)
