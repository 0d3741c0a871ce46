"""Serve's proxies are wrapped by default, and as the user says where the user says it."""

import os

import pytest

from env_config.ray_proxy import AROUND_PROXY, VARIABLE, wrap_serve_proxies


def test_a_wrapper_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {VARIABLE: "mine:wrapper"})
    assert wrap_serve_proxies() == "mine:wrapper"


def test_the_processes_that_are_started_from_here_inherit_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    assert wrap_serve_proxies() == os.environ[VARIABLE] == AROUND_PROXY
