"""What counts as the same work."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.messages import GenerationRequest, InputImage, OutputFormat, RequestWarning
from serve_app.making.layers.digest import work_digest

REQUEST = GenerationRequest(
    "a", "wan", {"prompt": "a cat", "image": InputImage(b"png")}, 7, OutputFormat("video", "mp4")
)


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        ({"request_id": "other"}, True),
        ({"arguments": {"image": InputImage(b"png"), "prompt": "a cat"}}, True),
        ({"warnings": (RequestWarning("not_checked", "extra_args", "no answer in time"),)}, True),
        ({"left_out": (RequestWarning("no_effect", "strength", "not read"),)}, False),
        ({"seed": 8}, False),
        ({"arguments": {"prompt": "a dog", "image": InputImage(b"png")}}, False),
        ({"arguments": {"prompt": "a cat", "image": InputImage(b"jpeg")}}, False),
        ({"arguments": {"prompt": "a cat", "image": [InputImage(b"png")]}}, False),
        ({"features": {"cache_dit": {}}}, False),
        ({"output": OutputFormat("video", "mp4", fps=24.0)}, False),
    ],
)
def test_work_is_the_same_if_only_the_id_differs(change: dict[str, Any], is_same: bool) -> None:
    assert (work_digest(REQUEST) == work_digest(GenerationRequest(**vars(REQUEST) | change))) is is_same
