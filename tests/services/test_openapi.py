"""Answers are as /openapi.json says, whatever is sent, and never a 5xx; what it says of errors and of forms."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.documented_answers import check_answers
from tests.support.further import further
from tests.support.in_process import serving

# What most callers ask for: a body with many fields, a form, jobs, lists, files.
EVERY_TIME = "^/v1/(images|jobs|files|models)"
VIDEOS = "^/v1/videos"


@pytest.mark.parametrize(
    ("kind", "operations"),
    [
        ("image", ("--include-path-regex", EVERY_TIME)),
        further("image", ("--exclude-path-regex", f"{EVERY_TIME}|{VIDEOS}")),
        further("video", ("--include-path-regex", VIDEOS)),
    ],
)
def test_no_request_finds_an_answer_that_is_not_documented(
    kind: str, operations: tuple[str, ...], tmp_path: Path
) -> None:
    """Each operation once, with a model of the kind that it is for; tests/stress has all operations with both."""
    assert check_answers(kind, tmp_path, *operations, max_examples=4) >= 100


async def test_the_document_tells_of_our_errors_and_not_of_fastapis(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        async with server.client() as client:
            document = (await client.get("/openapi.json")).json()
            refused = await client.post("/v1/images/generations", json={"prompt": 1})
    assert "ValidationError" not in document["components"]["schemas"]
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert operations
    for operation in operations:
        assert "422" not in operation["responses"]
        assert {"4XX", "5XX"} <= set(operation["responses"])
    fields = document["components"]["schemas"]["Error"]["properties"]["error"]["properties"]
    assert set(refused.json()["error"]) == set(fields)


async def test_edits_are_documented_as_json_and_as_a_form(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        async with server.client() as client:
            document = (await client.get("/openapi.json")).json()
    content = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert content["multipart/form-data"]["schema"]["properties"]["image"]["format"] == "binary"
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/ImageEditBody"}
    assert "prompt" in document["components"]["schemas"]["ImageEditBody"]["properties"]
