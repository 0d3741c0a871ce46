"""URLs of outputs in answers: below the prefix that the application is served under."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.storage.local import LocalStorage
from serve_app.storage.outputs import OutputURLs

KEY = "images/2026/11/21/req-0.png"


@pytest.mark.parametrize(
    ("public_url", "prefix", "url"),
    [
        ("", "", f"/v1/files/{KEY}"),
        ("", "/flux", f"/flux/v1/files/{KEY}"),
        ("https://example.com/flux", "/flux", f"https://example.com/flux/v1/files/{KEY}"),
    ],
)
def test_a_path_gets_the_prefix_and_a_whole_url_stays_as_it_is(
    public_url: str, prefix: str, url: str, tmp_path: Path
) -> None:
    assert OutputURLs(LocalStorage(tmp_path, public_url), prefix).of(KEY) == url
