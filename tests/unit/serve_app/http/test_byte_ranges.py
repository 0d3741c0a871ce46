"""Ranges of a file as RFC 9110, section 14, has them."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from serve_app.http.byte_ranges import file_answer

DATA = bytes(range(100))


@pytest.mark.parametrize(
    ("asked", "status", "content", "place"),
    [
        ("", 200, DATA, None),
        ("bytes=0-9", 206, DATA[:10], "bytes 0-9/100"),
        ("bytes=90-", 206, DATA[90:], "bytes 90-99/100"),
        ("bytes=90-500", 206, DATA[90:], "bytes 90-99/100"),
        ("bytes=-7", 206, DATA[-7:], "bytes 93-99/100"),
        ("bytes=-700", 206, DATA, "bytes 0-99/100"),
        ("bytes=99-99", 206, DATA[99:], "bytes 99-99/100"),
        ("bytes=100-", 416, b"", "bytes */100"),
        ("bytes=-0", 416, b"", "bytes */100"),
        ("bytes=5-2", 200, DATA, None),  # not a range: it is ignored
        ("bytes=-", 200, DATA, None),
        ("bytes=0-1,5-6", 200, DATA, None),  # several: the whole file may be sent
        ("lines=0-1", 200, DATA, None),
    ],
)
def test_a_range_is_answered_as_the_standard_says(
    asked: str, status: int, content: bytes, place: str | None
) -> None:
    answer = file_answer(Headers({"range": asked} if asked else {}), DATA, "video/mp4", "a.mp4")
    assert (answer.status_code, answer.body) == (status, content)
    assert answer.headers.get("content-range") == place
    assert answer.headers["accept-ranges"] == "bytes"


def test_a_range_of_an_older_file_gets_the_whole_new_one() -> None:
    tag = file_answer(Headers({}), DATA, "video/mp4", "a.mp4").headers["etag"]
    for known, status in ((tag, 206), ('"older"', 200)):
        answer = file_answer(Headers({"range": "bytes=0-9", "if-range": known}), DATA, "video/mp4", "a.mp4")
        assert answer.status_code == status


def test_a_caller_who_has_the_file_gets_no_second_copy() -> None:
    tag = file_answer(Headers({}), DATA, "video/mp4", "a.mp4").headers["etag"]
    answer = file_answer(Headers({"if-none-match": tag}), DATA, "video/mp4", "a.mp4")
    assert (answer.status_code, answer.body) == (304, b"")
