"""What a replica tells of its start is read by deployment, and a store that is away holds nobody up."""

from __future__ import annotations

from typing import Any

import pytest

from deployments import starting
from deployments.starting import tell_start, told_start
from tests.support.played_store import PlayedStore


def test_the_newest_text_of_a_deployment_is_told_until_it_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    store: Any = PlayedStore()
    monkeypatch.setattr(starting, "internal_kv", store)
    for text in ("step 1 of 4", "step 2 of 4"):
        tell_start("app", "Denoiser", text)
    tell_start("app", "VAE", "decoding")
    assert told_start("app", "Denoiser") == "step 2 of 4"
    assert told_start("other", "Denoiser") is None
    tell_start("app", "Denoiser", "")
    assert told_start("app", "Denoiser") is None
    assert told_start("app", "VAE") == "decoding"


def test_a_store_that_is_away_stops_no_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "internal_kv", None)
    tell_start("app", "Denoiser", "encoding")
    assert told_start("app", "Denoiser") is None
