"""What a fuzzer sends: bodies that are nearly right, with values of any kind in any place, and broken addresses."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import hypothesis
from hypothesis import strategies as st
from PIL import Image

from deployments.messages import MediaKind, StageDescription, ValueType
from serve_app.requests.argument_values import has_json_form
from serve_app.requests.bodies import (
    FIELD_INSTEAD,
    AudioGenerationBody,
    GenerationBody,
    ImageGenerationBody,
    VideoGenerationBody,
)
from tests.support.model_in_process import ModelServer, describe

IMAGES, EDITS = "/v1/images/generations", "/v1/images/edits"
VIDEOS, VIDEO_JOBS = "/v1/videos/generations", "/v1/videos"
SOUNDS = "/v1/audio/generations"
BODIES: dict[MediaKind, type[GenerationBody]] = {
    "image": ImageGenerationBody,
    "video": VideoGenerationBody,
    "audio": AudioGenerationBody,
}
ADDRESSES = (
    "/v1/jobs/{}", "/v1/jobs/{}/events", "/v1/videos/{}", "/v1/videos/{}/content", "/v1/files/{}", "/v1/models/{}",
    "/v1/jobs?after={}", "/v1/videos?after={}", "/v1/jobs?limit={}",
)  # fmt: skip
WORDS = st.sampled_from(["a fox", "", " ", "x" * 300, "\0", "a\0b", "🦊", "\u202e", "nan", "1e300", "{", "/etc/passwd"])
NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 99, 0.5, -0.5, 1.5, 1e-300, 1e30, 1e300, -1e300, 2**31, 2**63, 10**400, 1000, 0.0, float("nan"),
     float("inf")]
)  # fmt: skip
LEAVES = st.none() | st.booleans() | NUMBERS | WORDS
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS | st.just("scale"), inner, max_size=2),
    max_leaves=4,
)
SMALL_INTEGERS, SMALL_NUMBERS = st.integers(-3, 9), st.floats(-3, 3) | st.sampled_from([0.0, 1.0, 7.5, 100.0, 999.0])
Good = st.SearchStrategy[tuple[str, dict[str, Any]]]
Change = st.SearchStrategy[Any]  # of functions that change a body
LONG_INTEGER = "123454321"  # stands for one of thousands of digits, which Python's own JSON does not write


@dataclass(frozen=True)
class HostileRequest:
    """One request, as httpx takes it."""

    method: str
    path: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Found:
    """What the answers were."""

    statuses: Counter[int] = field(default_factory=Counter)
    server_errors: list[str] = field(default_factory=list)  # what must not be: the request and its answer
    unclear: list[str] = field(default_factory=list)  # refusals that are not in OpenAI's shape

    @property
    def is_clean(self) -> bool:
        return not self.server_errors and not self.unclear


def attack(server: ModelServer, cases: int, derandomize: bool = False) -> Found:
    """Sends `cases` requests, and goes on after a server error: all of them are to be found in one run."""
    found = Found()

    @hypothesis.settings(
        max_examples=cases,
        derandomize=derandomize,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(hostile_requests(describe(server.handle.held["encoder"])))
    def send(request: HostileRequest) -> None:
        answer = server.ask(request.method, request.path, **request.arguments)
        found.statuses[answer.status_code] += 1
        if answer.status_code >= 500:
            found.server_errors.append(f"{answer.status_code} {answer.text[:400]} <- {str(request)[:1500]}")
        elif answer.status_code >= 400 and not is_clear(answer):
            found.unclear.append(f"{answer.status_code} {answer.text[:400]} <- {str(request)[:1500]}")

    send()
    return found


def is_clear(answer: httpx.Response) -> bool:
    """In OpenAI's shape, and nothing of this machine in it."""
    error = answer.json().get("error", {})
    return set(error) == {"message", "type", "param", "code"} and "Traceback" not in error["message"]


def hostile_requests(description: StageDescription) -> st.SearchStrategy[HostileRequest]:
    """Most are bodies; the others broken bytes and addresses."""
    good, change = good_bodies(description), changes(description)  # once: to make strategies takes longer than to draw
    kinds = [*[bodies(good, change)] * 7, forms(good, change), broken_bytes(good), st.builds(addressed, WORDS | LONG)]
    return st.sampled_from(range(len(kinds))).flatmap(kinds.__getitem__)


LONG = st.sampled_from(["a" * 2000, "9" * 5000, "..", "%2e%2e", "a/b"])


def addressed(word: str) -> HostileRequest:
    path = ADDRESSES[len(word) * 7 % len(ADDRESSES)]
    return HostileRequest("GET", path.format(httpx.QueryParams({"x": word}).__str__()[2:]))


@st.composite
def bodies(draw: st.DrawFn, good: Good, change: Change) -> HostileRequest:
    """A small good body, changed in one to three places."""
    path, body = draw(good)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        draw(change)(body)
    content = json.dumps(body).replace(str(10**400), "9" * 5000).replace('"' + LONG_INTEGER + '"', "9" * 5000)
    return HostileRequest("POST", path, {"content": content, "headers": {"Content-Type": "application/json"}})


@st.composite
def forms(draw: st.DrawFn, good: Good, change: Change) -> HostileRequest:
    path, body = draw(good)
    path = {IMAGES: EDITS, VIDEOS: VIDEO_JOBS}.get(path, path)
    draw(change)(body)
    fields: dict[str, Any] = {}
    for name, value in body.items():
        if name == "extra_args" and isinstance(value, dict):
            fields |= {f"extra_args[{key}]": _as_text(each) for key, each in value.items()}
        else:
            fields[name] = _as_text(value)
    return HostileRequest("POST", path, {"data": fields})


@st.composite
def broken_bytes(draw: st.DrawFn, good: Good) -> HostileRequest:
    path, body = draw(good)
    content = bytearray(json.dumps(body | {"seed": 12}).encode())
    place = draw(st.integers(0, len(content)))
    content[place : place + draw(st.integers(0, 3))] = draw(
        st.sampled_from([b"", b"\xff", b"\0", b"[", b"9" * 5000, b"}"])
    )
    return HostileRequest("POST", path, {"content": bytes(content), "headers": {"Content-Type": "application/json"}})


def good_bodies(description: StageDescription) -> Good:
    """Requests that the model makes quickly."""
    side = 4 * description.size_multiple if description.size_multiple > 8 else 32
    body: dict[str, Any] = {"seed": 1} | ({"prompt": "a fox"} if description.takes("prompt") else {})
    if description.takes("num_inference_steps"):
        body["num_inference_steps"] = 2  # some schedules of one step divide by 0
    if description.takes("max_sequence_length"):
        body["max_sequence_length"] = 16
    if description.takes("width"):
        body["size"] = f"{side}x{side}"
    if description.media_kind == "video":
        body |= {"num_frames": 5, "response_format": "b64_json"}
    if description.takes("mask_image"):
        body["mask_image"] = data_url(side, side, "white")
    if description.media_kind == "audio":
        body["seconds"] = 2
    pictures_path = EDITS if description.takes("image") else IMAGES
    path = {"image": pictures_path, "video": VIDEOS, "audio": SOUNDS}[description.media_kind]
    if not description.takes("image"):
        return st.builds(lambda: (path, dict(body)))
    image = st.just(data_url(side, side))
    given = st.sampled_from([image, image, image, image, pictures(side)]).flatmap(lambda chosen: chosen)
    return given.map(lambda given: (path, body | {"image": given}))


FIELDS_OF_ANY_MODEL = ["guidance_scale", "true_cfg_scale", "strength", "num_inference_steps"]


def changes(description: StageDescription) -> Change:
    """Functions that change a body."""
    own = {"prompt", "image", "mask_image"}
    kind = BODIES[description.media_kind]
    names = sorted(name for name in description.parameters.keys() - own if "callback" not in name)
    sendable = [name for name in names if has_json_form(description.type_of(name)) and name not in FIELD_INSTEAD]
    put = {name: _with if name in kind.field_names() else _with_argument for name in sendable}
    each = {name: st.builds(put[name], st.just(name), values(description.type_of(name))) for name in sendable}
    arguments = st.sampled_from(sendable).flatmap(each.__getitem__)
    others = st.builds(_with_argument, st.sampled_from(names), ANYTHING)
    fields = sorted(set(kind.field_names()) - {"webhook_url", "stream", "background", "n", "partial_images", *own})
    kinds = [
        *[arguments] * 4,
        *[st.builds(_with, st.sampled_from(FIELDS_OF_ANY_MODEL), SMALL_INTEGERS | SMALL_NUMBERS)] * 2,
        others,
        st.builds(_with, st.sampled_from([*fields, "promt"]), ANYTHING | SMALL_NUMBERS | SMALL_INTEGERS),
        st.builds(_with, st.sampled_from(sorted(own)), pictures(32) | ANYTHING),
        st.builds(_with, st.just("n"), st.sampled_from([0, 1, 2, True, 10**400, "1", 1e300])),
        st.builds(_with, st.just("extra_args"), ANYTHING),
        st.builds(_with, st.just("cache_dit"), st.dictionaries(CACHE_KNOBS, LEAVES, max_size=3)),
    ]
    return st.sampled_from(range(len(kinds))).flatmap(kinds.__getitem__)


CACHE_KNOBS = st.sampled_from(["enable", "residual_diff_threshold", "Fn_compute_blocks", "warmup", "scm_preset", "x"])


def values(wanted: ValueType) -> st.SearchStrategy[Any]:
    """Values that are of the type, most of them without sense."""
    match wanted.kind:
        case "union":
            return st.one_of(*map(values, wanted.of))
        case "list" | "row":
            return st.lists(values(wanted.of[0]), max_size=4)
        case "tuple":
            return st.tuples(*map(values, wanted.of)).map(list)
        case "dict":
            return st.dictionaries(st.sampled_from(["scale", "image_embeds", "ip_hidden_states"]), ANYTHING, max_size=2)
        case "choice":
            return st.sampled_from(wanted.choices)
        case "picture":
            return pictures(32)
        case kind:
            return PLAIN.get(kind, ANYTHING)


PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "none": st.none(),
    "bool": st.booleans(),
    "int": SMALL_INTEGERS,
    "float": SMALL_NUMBERS,
    "str": WORDS,
}


def pictures(side: int) -> st.SearchStrategy[Any]:
    """One or several, of any size and mode, and what is none."""
    sizes = [(1, 1), (3, 7), (31, 33), (side, side), (2 * side, side)]
    urls = [data_url(*size, mode=mode) for size in sizes for mode in ("RGB", "L", "RGBA", "1")]
    return st.sampled_from(urls) | st.lists(st.sampled_from(urls), max_size=3) | WORDS


def data_url(width: int, height: int, color: str = "red", mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.new(mode, (width, height), color if mode in ("RGB", "RGBA") else 1).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _with(name: str, value: Any) -> Any:
    return lambda body: body.__setitem__(name, value)


def _with_argument(name: str, value: Any) -> Any:
    def change(body: dict[str, Any]) -> None:
        if isinstance(body.setdefault("extra_args", {}), dict):
            body["extra_args"][name] = value

    return change


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [str(each)[:3000] for each in value]
    return value if isinstance(value, str) else json.dumps(value)
