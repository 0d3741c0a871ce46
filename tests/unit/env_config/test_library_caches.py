"""How torch takes memory of a device: segments that grow, unless the user has said otherwise."""

from __future__ import annotations

import os

import pytest

from env_config.library_caches import ALLOCATOR_VARIABLES, set_allocator_settings


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # undone at the end, what the test has set too


@pytest.mark.parametrize("device", ["cuda", "rocm"])
def test_segments_grow_on_gpus(device: str) -> None:
    assert set_allocator_settings(device) == "expandable_segments:True"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert set_allocator_settings("cuda") is None
    assert {each: os.environ.get(each) for each in ALLOCATOR_VARIABLES if os.environ.get(each)} == {
        name: "max_split_size_mb:128"
    }


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "npu", "musa"])
def test_other_devices_are_left_as_they_are(device: str) -> None:
    assert set_allocator_settings(device) is None
    assert not any(name in os.environ for name in ALLOCATOR_VARIABLES)
