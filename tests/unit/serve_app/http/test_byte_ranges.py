"""Files as answers: conditions and ranges as RFC 9110, sections 13 and 14, has them."""

from __future__ import annotations

import email
from collections.abc import AsyncIterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Response
from starlette.datastructures import Headers

from serve_app.http.byte_ranges import file_answer
from tests.support.jobs_in_process import server_with_jobs

DATA = bytes(range(100))
STORED_AT = 1_700_000_000.5
BEFORE, THEN, AFTER = (formatdate(int(STORED_AT) + seconds, usegmt=True) for seconds in (-1, 0, 1))
OLDER = '"older"'


def asked(**headers: str) -> Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return file_answer(Headers(named), DATA, "video/mp4", "a.mp4", STORED_AT)


TAG = asked().headers["etag"]


@pytest.mark.parametrize(
    ("range", "status", "content", "place"),
    [
        ("", 200, DATA, None),
        ("bytes=0-9", 206, DATA[:10], "bytes 0-9/100"),
        ("Bytes=0-9", 206, DATA[:10], "bytes 0-9/100"),
        ("bytes= 0-9 ", 206, DATA[:10], "bytes 0-9/100"),
        ("bytes=,0-9,", 206, DATA[:10], "bytes 0-9/100"),
        ("bytes=90-", 206, DATA[90:], "bytes 90-99/100"),
        ("bytes=90-500", 206, DATA[90:], "bytes 90-99/100"),
        ("bytes=90-" + 5000 * "9", 206, DATA[90:], "bytes 90-99/100"),
        ("bytes=-7", 206, DATA[-7:], "bytes 93-99/100"),
        ("bytes=-700", 206, DATA, "bytes 0-99/100"),
        ("bytes=99-99", 206, DATA[99:], "bytes 99-99/100"),
        ("bytes=0-9,5-19,20-29", 206, DATA[:30], "bytes 0-29/100"),  # those that touch are one
        ("bytes=100-,0-1", 206, DATA[:2], "bytes 0-1/100"),  # what lies beyond is left out
        ("bytes=100-", 416, b"", "bytes */100"),
        ("bytes=100-,200-300", 416, b"", "bytes */100"),
        ("bytes=" + 5000 * "9" + "-", 416, b"", "bytes */100"),
        ("bytes=-0", 416, b"", "bytes */100"),
        ("bytes=5-2", 200, DATA, None),  # no list of ranges: it is ignored
        ("bytes=5-2,0-1", 200, DATA, None),
        ("bytes=-", 200, DATA, None),
        ("bytes=,", 200, DATA, None),
        ("bytes=0-9;10", 200, DATA, None),
        ("bytes=" + ",".join(f"{2 * n}-{2 * n}" for n in range(50)), 200, DATA, None),  # too many
        ("lines=0-1", 200, DATA, None),
    ],
)
def test_a_range_is_answered_as_the_standard_says(range: str, status: int, content: bytes, place: str | None) -> None:
    answer = asked(range=range) if range else asked()
    assert (answer.status_code, answer.body) == (status, content)
    assert answer.headers.get("content-range") == place
    assert answer.headers["accept-ranges"] == "bytes"


def test_an_empty_file_has_no_range() -> None:
    for range in ("bytes=0-", "bytes=-1"):
        answer = file_answer(Headers({"range": range}), b"", "video/mp4", "a.mp4", STORED_AT)
        assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */0")


def test_several_ranges_come_as_parts_in_the_order_they_were_asked_for() -> None:
    answer = asked(range="bytes=50-59, 0-9, -5")
    assert answer.status_code == 206
    head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
    parts: Any = email.message_from_bytes(head + bytes(answer.body)).get_payload()
    assert [part["Content-Range"] for part in parts] == ["bytes 50-59/100", "bytes 0-9/100", "bytes 95-99/100"]
    assert [part.get_content_type() for part in parts] == ["video/mp4"] * 3
    assert [part.get_payload(decode=True) for part in parts] == [DATA[50:60], DATA[:10], DATA[95:]]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"if_none_match": TAG}, 304),
        ({"if_none_match": f"W/{TAG}"}, 304),
        ({"if_none_match": f"{OLDER}, {TAG}"}, 304),
        ({"if_none_match": "*"}, 304),
        ({"if_none_match": OLDER}, 200),
        ({"if_none_match": OLDER, "if_modified_since": AFTER}, 200),  # the tag decides
        ({"if_modified_since": BEFORE}, 200),
        ({"if_modified_since": THEN}, 304),
        ({"if_modified_since": "yesterday"}, 200),
        ({"if_match": TAG}, 200),
        ({"if_match": f"{OLDER}, {TAG}"}, 200),
        ({"if_match": "*"}, 200),
        ({"if_match": OLDER}, 412),
        ({"if_match": f"W/{TAG}"}, 412),
        ({"if_match": TAG, "if_unmodified_since": BEFORE}, 200),
        ({"if_unmodified_since": BEFORE}, 412),
        ({"if_unmodified_since": THEN}, 200),
        ({"if_match": OLDER, "if_none_match": TAG}, 412),
        ({"if_none_match": TAG, "range": "bytes=0-9"}, 304),
        ({"range": "bytes=0-9", "if_range": TAG}, 206),
        ({"range": "bytes=0-9", "if_range": THEN}, 206),
        ({"range": "bytes=0-9", "if_range": AFTER}, 200),
        ({"range": "bytes=0-9", "if_range": OLDER}, 200),
        ({"range": "bytes=0-9", "if_range": f"W/{TAG}"}, 200),
        ({"range": "bytes=500-", "if_range": OLDER}, 200),
    ],
)
def test_conditions_are_judged_in_the_order_of_the_standard(headers: dict[str, str], status: int) -> None:
    answer = asked(**headers)
    assert answer.status_code == status
    assert (answer.headers["etag"], answer.headers["last-modified"]) == (TAG, THEN)
    assert bool(answer.body) == (status in (200, 206))


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with server_with_jobs(tmp_path) as (_, client):
        yield client


async def test_a_stored_file_is_answered_with_ranges_and_validators(client: httpx.AsyncClient) -> None:
    body = {"prompt": "x", "response_format": "url"}
    [item] = (await client.post("/v1/images/generations", json=body)).json()["data"]
    whole = await client.get(item["url"])
    part = await client.get(item["url"], headers={"range": "bytes=-8", "if-range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, whole.content[-8:])
    for name, validator in (("if-none-match", "etag"), ("if-modified-since", "last-modified")):
        known = await client.get(item["url"], headers={name: whole.headers[validator]})
        assert (known.status_code, known.content) == (304, b"")
