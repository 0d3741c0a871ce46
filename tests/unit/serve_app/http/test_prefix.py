"""The prefix that the application is served under, as it stands in answers."""

from __future__ import annotations

import pytest
from serve_app.http.middleware.prefix import route_prefix, under_prefix


@pytest.mark.parametrize(
    ("prefix", "url", "seen"),
    [
        ("", "/v1/files/a", "/v1/files/a"),
        ("/flux", "/v1/files/a", "/flux/v1/files/a"),
        ("/flux", "https://pictures.example/v1/files/a", "https://pictures.example/v1/files/a"),
    ],
)
def test_only_a_path_of_this_server_is_put_under_the_prefix(prefix: str, url: str, seen: str) -> None:
    token = route_prefix.set(prefix)
    try:
        assert under_prefix(url) == seen
    finally:
        route_prefix.reset(token)
