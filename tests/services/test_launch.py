"""`python -m serve_app.tools.launch`: what it says, and that it ends all that `serve run` has started.

Here `serve` is played; tests/served and tests/stress launch the real one.
"""

import os
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from serve_app.tools import launch
from serve_app.tools.launch import (
    Address,
    LaunchError,
    Progress,
    deployment_messages,
    ready_message,
)
from tests.support.launching import config_file, launched, output, still_running, wait_for_output
from tests.support.served_application import free_port


def test_sigterm_while_it_loads_leaves_no_process(tmp_path: Path) -> None:
    with launched(config_file(tmp_path, free_port(), load_s=600), tmp_path) as launcher:
        wait_for_output(launcher, tmp_path, "Encoder: loading weights")
        started = psutil.Process(launcher.pid).children(recursive=True)

        launcher.terminate()
        wait_for_output(launcher, tmp_path, "Stopping")
        launcher.terminate()

        assert launcher.wait(90) == 0
        assert still_running(started) == []


def test_a_stage_that_cannot_start_ends_it_with_the_reason_and_what_to_do(tmp_path: Path) -> None:
    with launched(config_file(tmp_path, free_port(), refused="fa9"), tmp_path) as launcher:
        assert launcher.wait(120) == 1
    text = output(tmp_path)
    assert "application 'toy' failed to deploy" in text
    assert "Encoder: " in text
    assert "SGLANG_DIFFUSION_ATTENTION_BACKEND='fa9' is not allowed" in text
    assert "What to do: " in text


def test_the_death_of_serve_run_ends_it_and_all_it_started(tmp_path: Path) -> None:
    with launched(config_file(tmp_path, free_port()), tmp_path) as launcher:
        wait_for_output(launcher, tmp_path, "Ready:")
        started = psutil.Process(launcher.pid).children(recursive=True)
        serve_run = psutil.Process(launcher.pid).children()[0]

        serve_run.kill()

        assert launcher.wait(90) == 1
        assert still_running(started) == []
    assert "`serve run` ended" in output(tmp_path)


@pytest.mark.rest
def test_a_port_that_is_taken_is_named_and_nothing_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with launched(config_file(tmp_path, port), tmp_path) as launcher:
            assert launcher.wait(90) == 1
    text = output(tmp_path)
    assert f"cannot listen on 127.0.0.1, port {port} (Address already in use)" in text
    assert "Starting Ray" not in text


@pytest.mark.rest
def test_a_config_with_a_mistake_is_refused_by_name_and_nothing_starts(tmp_path: Path) -> None:
    with launched(config_file(tmp_path, free_port(), lod_s=3), tmp_path) as launcher:
        assert launcher.wait(90) == 1
    text = output(tmp_path)
    assert "applications[toy].args.lod_s: unknown key; did you mean 'load_s'?" in text
    assert "Starting Ray" not in text


@pytest.mark.parametrize(
    ("kind", "route", "name", "prompt"),
    [
        ("image", "images", "picture.png", "a red apple"),
        ("video", "videos", "video.mp4", "a fox moving left on a blue background"),
    ],
)
def test_the_curl_line_writes_the_file_of_the_answer(
    kind: str, route: str, name: str, prompt: str, tmp_path: Path
) -> None:
    """The line itself, with a `curl` that answers as the server does and keeps what it was asked."""
    curl = tmp_path / "curl"
    curl.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > asked\necho \'{"data": [{"b64_json": "UE5H"}]}\'\n')
    curl.chmod(0o755)
    message = ready_message(Address("0.0.0.0", 8123, "/toy"), ["image", "video"])
    [line] = [line for line in message.splitlines() if line.strip().startswith("curl") and f"/{kind}s/" in line]

    subprocess.run(line, shell=True, check=True, cwd=tmp_path, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})

    assert (tmp_path / name).read_bytes() == b"PNG"
    asked = (tmp_path / "asked").read_text().splitlines()
    assert f"http://127.0.0.1:8123/toy/v1/{route}/generations" in asked
    assert f'{{"prompt": "{prompt}", "response_format": "b64_json"}}' in asked
    assert 'base_url="http://127.0.0.1:8123/toy/v1"' in message


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line.split("] ", 1)[1] for line in capsys.readouterr().out.splitlines()]


def test_the_progress_tells_of_each_stage_what_is_news_and_the_same_words_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, reading, ready = (
        {"ready": False, "detail": ""}, {"ready": False, "detail": "reading weights"}, {"ready": True, "detail": "Flux"}
    )  # fmt: skip
    progress = Progress()
    progress.show_stages({"Encoder": loading, "Denoiser": loading, "VAE": loading})
    progress.show_stages({"Encoder": loading, "Denoiser": loading, "VAE": loading})
    progress.show_stages({"Encoder": ready, "Denoiser": reading, "VAE": ready})
    progress.show_stages({"Encoder": ready, "Denoiser": loading, "VAE": ready})
    assert printed(capsys) == ["Encoder, Denoiser, VAE: loading", "Encoder, VAE: ready; Denoiser: reading weights"]
    monkeypatch.setattr(launch, "REPEAT_PERIOD_S", 0.0)  # nothing was printed for so long
    progress.show_stages({"Encoder": ready, "Denoiser": loading, "VAE": ready})
    assert printed(capsys) == ["still Denoiser: loading"]


def test_the_same_progress_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for line in ("one", "one", "two", "one"):
        progress.show(line)
    assert printed(capsys) == ["one", "two"]


def test_a_failed_build_is_told_when_no_deployment_says_more() -> None:
    failed = {"toy": {"status": "DEPLOY_FAILED", "message": "Traceback\nValueError: no model", "deployments": {}}}
    with pytest.raises(LaunchError, match="ValueError: no model"):
        deployment_messages(failed)


def test_a_deployment_that_waits_for_a_resource_is_told() -> None:
    waiting = {"Encoder": {"message": "Resources required: GPU"}, "Ingress": {"message": ""}}
    applications = {"toy": {"status": "DEPLOYING", "message": "", "deployments": waiting}}
    assert deployment_messages(applications) == ["Encoder: Resources required: GPU"]
