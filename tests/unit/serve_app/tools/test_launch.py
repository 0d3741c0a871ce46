"""The launcher's answers to what a machine or a file may have wrong: one sentence with the file and the remedy."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from env_config.children import environment_of_children
from env_config.library_caches import check_cache_root
from env_config.section import EnvConfigError
from serve_app.app import locate
from serve_app.tools import launch
from serve_app.tools.check_config import check_config
from serve_app.tools.launch import (
    Address,
    LaunchError,
    address_in,
    cause_in,
    get_json,
    opened_log,
    refuse_taken,
    serve_status,
)

PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
APPLICATION = "{import_path: serve_app.app:build_app, args: {model: checkpoints/emoji-flux}}"


def write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


CONFIGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda file: None, "cannot be read: No such file or directory"),
    "a folder": (Path.mkdir, "cannot be read: Is a directory"),
    "0 bytes": (Path.touch, "is empty: write a Serve config into it"),
    "blank": (lambda file: write(file, b" \n\n"), "is empty: write a Serve config into it"),
    "a comment": (lambda file: write(file, b"# later\n"), "holds no Serve config"),
    "another encoding": (lambda file: write(file, "name: Bär".encode("latin-1")), "is not UTF-8 text (byte 7)"),
    "binary": (lambda file: write(file, b"PK\x03\x04\x00\x00"), "special characters are not allowed"),
    "too deep": (lambda file: write(file, b"[" * 600), "recursion"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_read_is_named_with_the_cause(case: str, tmp_path: Path) -> None:
    make, sentence = CONFIGS[case]
    file = tmp_path / "serve.yaml"
    make(file)
    [problem] = check_config(file)
    assert problem.startswith(f"{file}: ")
    assert sentence in problem


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("kind: RayService\nspec: {serveConfigV2: 'applications: []'}", "is for Kubernetes"),
        (f"applications: [{APPLICATION}]\n---\napplications: []", "holds 2 YAML documents"),
        ("applications: []", "has no application"),
    ],
)
def test_a_good_file_that_serve_run_cannot_serve_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(LaunchError, match=sentence) as refusal:
        address_in(file)
    assert str(file) in str(refusal.value)


@pytest.mark.parametrize(
    ("host", "port", "cause"),
    [
        ("127.0.0.1", 70000, "port must be"),
        ("no.such.host.invalid", 8000, ""),
        ("ä" * 80, 8000, ""),
        ("192.0.2.1", 0, ""),
    ],
    ids=["no port", "no name", "no name at all", "another machine's"],
)
def test_an_address_that_this_machine_cannot_listen_on_is_named(host: str, port: int, cause: str) -> None:
    with pytest.raises(
        LaunchError, match=rf"cannot listen on {host}, port {port} \(.*{cause}.*http_options"
    ) as refusal:
        refuse_taken(Address(host, port, ""), Path("serve.yaml"))
    assert "serve.yaml" in str(refusal.value)


def test_a_machine_that_was_too_busy_for_serve_is_not_told_to_correct_a_value() -> None:
    busy = str(launch.ended_error("a line\nTimeoutError: HTTP proxies not available after 60s."))
    assert "proxies not available" in busy
    assert "The machine was too busy" in busy
    assert "correct the value named above" in str(launch.ended_error("ValueError: model: no such folder"))


def test_who_uses_the_port_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=r"The process \d+ \(.+\) uses the port: end it \(kill \d+\)"):
            refuse_taken(Address("127.0.0.1", port, ""), Path("serve.yaml"))


def test_a_port_that_an_earlier_ray_holds_is_freed_by_rays_own_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setattr(launch.psutil.Process, "name", lambda self: "ray::ProxyActor")
        with pytest.raises(LaunchError, match=r"an earlier run has left it, and `.* stop` ends it"):
            refuse_taken(Address("127.0.0.1", other.getsockname()[1], ""), Path("serve.yaml"))


@pytest.mark.parametrize("in_the_way", ["outputs", "outputs/serve.log"])
def test_a_log_that_cannot_be_written_is_named(
    in_the_way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if in_the_way == "outputs":
        Path(in_the_way).touch()
    else:
        Path(in_the_way).mkdir(parents=True)
    with pytest.raises(LaunchError, match=rf"log outputs/serve\.log cannot be written in {tmp_path} \(.+\)\. Start in"):
        opened_log()


def test_a_working_folder_that_may_not_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(LaunchError, match=r"\(Permission denied\)\. Start in a folder that you may write to"):
        opened_log()


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_cache_root_that_cannot_be_written_is_named_by_its_variable(below: str, tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.touch()
    with pytest.raises(EnvConfigError, match=r"SGLANG_DIFFUSION_CACHE_ROOT = .*must be a folder that this process may"):
        check_cache_root(Path(f"{file}{below}"))
    check_cache_root(tmp_path / "new" / "folder")


@pytest.mark.parametrize("model", ["~unknown-user/x", "a\0b", "x" * 5000, "/proc/1/root/x", "org/name"])
def test_a_path_that_leads_nowhere_is_left_to_the_stages(model: str) -> None:
    assert locate(model) == model


MESSAGE = """Deployment 'Encoder' failed 3 times. Error:
\x1b[36mray::ServeReplica:toy:Encoder.initialize_and_get_metadata()\x1b[39m
Traceback (most recent call last):
  File "replica.py", line 3, in <module>
    raise CheckpointError("no")
deployments.errors.CheckpointError: /models/flux/vae/config.json cannot be read: it is empty"""


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        (MESSAGE, "CheckpointError: /models/flux/vae/config.json cannot be read: it is empty"),
        ("ValueError: first\n\nDuring handling:\nKeyError: 'b'", "KeyError: 'b'"),
        ("env_config.EnvConfigError: 2 variables:\n  A = 1\n  B = 2", "EnvConfigError: 2 variables:\n  A = 1\n  B = 2"),
        ("waits for a GPU", "waits for a GPU"),
    ],
)
def test_of_a_deployments_message_the_sentence_of_the_last_exception_is_told(message: str, cause: str) -> None:
    assert cause_in(message) == cause


# --- proxies ---


class Proxy(BaseHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.send_response(502)
        self.end_headers()

    do_CONNECT = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a proxy is asked that every variable names, as on a machine without NO_PROXY."""
    kind = type("OneProxy", (Proxy,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in PROXY_VARIABLES:
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return kind.asked


ASK = """if True:
    import sys, requests
    assert requests.get(sys.argv[-1]).ok
    print('applications: {toy: {status: DEPLOY_FAILED}}')
"""


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_health_and_the_status_of_a_local_application_are_asked_without_the_proxy(
    host: str, proxy: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer(Proxy):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"stages": {}}).encode())

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://{host}:{server.server_address[1]}"
        (tmp_path / "serve.log").write_text(f"View the dashboard at {url}\n")
        monkeypatch.setattr(launch, "LOG_FILE", tmp_path / "serve.log")
        monkeypatch.setattr(launch, "SERVE", [sys.executable, "-c", ASK])
        assert get_json(f"{url}/health") == (200, {"stages": {}})
        assert serve_status() == ({"toy": {"status": "DEPLOY_FAILED"}}, "")
        server.shutdown()
    assert proxy == []


def test_hosts_that_need_no_proxy_already_still_need_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.com, 10.0.0.0/8")
    monkeypatch.delenv("no_proxy", raising=False)
    environment = environment_of_children("192.0.2.7")
    assert environment["NO_PROXY"] == "example.com,10.0.0.0/8,localhost,127.0.0.1,::1,192.0.2.7"
    assert environment["no_proxy"] == environment["NO_PROXY"]
    assert environment["PYTHONUTF8"] == "1"


def test_a_stage_that_was_ready_and_loads_again_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    progress = launch.Progress()
    for words in ("reading weights", "warming up", "reading weights", "", "reading weights", ""):
        progress.show_stages({"VAE": {"ready": not words, "detail": words}})
    printed = [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()]
    assert printed == [
        f"VAE: {each}" for each in ("reading weights", "warming up", "ready", "reading weights", "ready")
    ]
