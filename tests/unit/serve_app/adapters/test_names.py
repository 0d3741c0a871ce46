"""What a LoRA may not be called, because a model is."""

from __future__ import annotations

import pytest

from serve_app.adapters.names import check_no_clash, model_called


@pytest.mark.parametrize(
    ("adapter", "taken"),
    [("flux", "flux"), ("sora-2", "sora-2"), ("neon", "flux:neon"), ("wan", "wan"), ("ink", None), ("dusk", None)],
)
def test_no_lora_is_called_as_a_model_alone_or_behind_its_own(adapter: str, taken: str | None) -> None:
    own = ("flux", "sora-2", "flux:neon")
    assert model_called(adapter, own, (*own, "wan", "wan:dusk")) == taken


def test_a_configured_lora_is_refused_by_its_name_and_that_of_the_model() -> None:
    check_no_clash({"ink"}, ["flux", "flux:neon"])
    with pytest.raises(ValueError, match="adapters: 'neon' is taken: a model is called 'flux:neon'"):
        check_no_clash({"ink", "neon"}, ["flux", "flux:neon"])
