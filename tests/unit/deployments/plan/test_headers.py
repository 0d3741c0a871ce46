"""What the files of a component declare: in a folder, and at a hub, which is asked for no more than the headers."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import CheckpointError
from deployments.plan.headers import read_stored
from deployments.weights.files import DIFFUSERS_FILES, TRANSFORMERS_FILES

STEM = "diffusion_pytorch_model"
SHARDS = [f"{STEM}-0000{n}-of-00002.safetensors" for n in (1, 2)]
READ = (
    "import sys, json; from pathlib import Path; from deployments.plan.headers import read_stored; "
    "from deployments.weights.files import DIFFUSERS_FILES; stored = read_stored(Path(sys.argv[1]), DIFFUSERS_FILES); "
    "print(json.dumps([stored.num_bytes, stored.elements, stored.dtype]))"
)


def header(tensors: dict[str, tuple[str, list[int], int]]) -> bytes:
    """The beginning of a safetensors file: names -> dtype, shape, bytes."""
    entries: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


FILES = {
    f"transformer/{SHARDS[0]}": header({"a.weight": ("BF16", [3000, 4000], 24_000_000)}),
    f"transformer/{SHARDS[1]}": header({"b.weight": ("BF16", [100, 10], 2000), "b.bias": ("F32", [10], 40)}),
}


LISTED = [*FILES, f"transformer/{STEM}.safetensors.index.json", "model_index.json"]


class Hub(ThreadingHTTPServer):
    """Lists FILES as files of gigabytes, and gives only their first bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.asked: list[tuple[str, str | None]] = []


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Hub)
        path, asked = self.path.partition("?")[0], self.headers.get("range")
        self.server.asked.append((path, asked))
        if path == "/api/models/org/name/tree/abc":
            files = [{"type": "file", "path": name, "size": 10**10, "oid": "0"} for name in LISTED]
            self.answer(200, json.dumps(files).encode())
        elif (name := path.removeprefix("/org/name/resolve/abc/")) in FILES and asked:
            self.answer(206, FILES[name])
        else:
            self.answer(404, b"{}")

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def snapshot(root: Path) -> Path:
    """A component in a cache of the hub, as it is when only small files were fetched."""
    folder = root / "models--org--name" / "snapshots" / "abc" / "transformer"
    folder.mkdir(parents=True)
    index = {"weight_map": {"a.weight": SHARDS[0], "b.weight": SHARDS[1], "b.bias": SHARDS[1]}}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_hub_that_the_variable_names_is_asked_for_headers_alone(tmp_path: Path) -> None:
    with hub() as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        command = [sys.executable, "-c", READ, str(snapshot(tmp_path))]
        read = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert read.returncode == 0, read.stderr
    assert json.loads(read.stdout) == [24_002_040, {"BF16": 12_001_000, "F32": 10}, "BF16"]
    ranges = [asked for path, asked in server.asked if path.endswith(".safetensors")]
    assert len(ranges) == len(SHARDS)
    assert set(ranges) == {"bytes=0-100000"}


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="org/name: the Hugging Face hub says"):  # the tests' is switched off
        read_stored(snapshot(tmp_path), DIFFUSERS_FILES)


def test_a_folder_is_read_by_its_headers(tmp_path: Path) -> None:
    start = header({"w": ("F16", [5, 2], 20), "ids": ("I64", [4], 32)})
    (tmp_path / "model.safetensors").write_bytes(start + bytes(52))
    stored = read_stored(tmp_path, TRANSFORMERS_FILES)
    assert (stored.num_bytes, dict(stored.elements), stored.dtype) == (52, {"F16": 10, "I64": 4}, "F16")


def test_what_torch_save_wrote_counts_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(77))
    stored = read_stored(tmp_path, TRANSFORMERS_FILES)
    assert (stored.num_bytes, stored.dtype) == (77, None)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds none of"):
        read_stored(tmp_path, TRANSFORMERS_FILES)
