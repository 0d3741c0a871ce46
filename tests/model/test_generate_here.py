"""`triptych generate` without a server: the embedded model in a process of its own, and the bytes that it makes."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from serve_app.tools.command.main import run
from tests.support.model_in_process import model_served

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "ray_configs/serve_emoji_cpu.yaml"


@pytest.mark.rest
def test_the_bytes_are_those_of_the_served_stages_with_a_lora_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--seed", "1", "--steps", "3", "--size", "64x64", "--json"]
    assert run(["generate", str(CONFIG), "a red apple", "-o", "plain.png", *asked]) == 0
    assert run(["generate", str(CONFIG), "a red apple", "-o", "neon.png", "--lora", "neon:0.8", *asked]) == 0
    for line in capsys.readouterr().out.split("\n}\n")[:2]:
        assert json.loads(f"{line}\n}}")["steps"] == [3]
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "neon.png").read_bytes()
    body = {"prompt": "a red apple", "seed": 1, "num_inference_steps": 3, "size": "64x64"}
    with model_served(ROOT / "checkpoints/emoji-flux", tmp_path / "outputs") as server:
        answer = server.post("/v1/images/generations", json=body)
    assert (tmp_path / "plain.png").read_bytes() == base64.b64decode(answer.json()["data"][0]["b64_json"])
