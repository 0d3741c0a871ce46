"""A checkpoint is found in a folder, on the hub or in S3, and what is wrong is named."""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from deployments.errors import CheckpointError
from deployments.weights.files import S3_WEIGHTS
from deployments.weights.locate import ETAGS, resolve_checkpoint, resolve_files, resolve_part, weights_to_fetch
from deployments.weights.s3 import PROBE_TIMEOUTS_S
from tests.support.s3_server import S3Server, s3_server

ROOT = Path(__file__).parents[2]

WEIGHTS = {
    "transformer": [
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model-00002-of-00002.safetensors",
    ],
    "vae": ["diffusion_pytorch_model.safetensors"],
    "text_encoder": ["model.safetensors"],
    "text_encoder_2": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that a saved pipeline has, and tensors of a few bytes."""
    folder = tmp_path_factory.mktemp("checkpoint") / "flux"
    for component, names in WEIGHTS.items():
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps({"a": component}))
        for name in names:
            save_file({name: np.arange(10, dtype=np.float32)}, folder / component / name)
        if len(names) > 1:
            index = f"{names[0].partition('-00001')[0]}.safetensors.index.json"
            (folder / component / index).write_text(json.dumps({"weight_map": {name: name for name in names}}))
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "spiece.model", "chat_template.jinja"):
        (folder / "tokenizer" / name).write_text(f'"{name}"')
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return folder


def test_a_folder_is_used_where_it_is(checkpoint, tmp_path):
    assert resolve_checkpoint(str(checkpoint), tmp_path) == checkpoint


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("no such folder", "neither a folder here, nor s3://bucket/prefix, nor a hub repository"),
        ("./nowhere", "neither a folder here"),
        ("~unknown-user/x", "no home folder is known for '~unknown-user'"),
        ("x" * 5000, "cannot be used: File name too long"),
        ("a\0b", "neither a folder here"),
        ("nobody/has-this", "nobody/has-this is not a folder here, and the Hugging Face hub says"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(model, sentence, tmp_path):
    with pytest.raises(CheckpointError, match=sentence):
        resolve_checkpoint(model, tmp_path)


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        resolve_checkpoint(str(tmp_path), tmp_path)


class Hub(BaseHTTPRequestHandler):
    """The answers of the Hugging Face hub that huggingface_hub needs to download a repository."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"
    downloaded: list[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/flux/tree/"):
            files = [file for file in self.folder.rglob("*") if file.is_file()]
            body = json.dumps([self.entry(file) for file in files]).encode()
        elif path.startswith("/api/models/org/flux"):
            siblings = [{"rfilename": self.name(file)} for file in self.folder.rglob("*") if file.is_file()]
            body = json.dumps({"id": "org/flux", "sha": self.commit, "siblings": siblings}).encode()
        else:
            name = path.removeprefix(f"/org/flux/resolve/{self.commit}/")
            body = (self.folder / name).read_bytes()
            if with_body:
                self.downloaded.append(name)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def name(self, file: Path) -> str:
        return str(file.relative_to(self.folder))

    def entry(self, file: Path) -> dict[str, Any]:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        return {"type": "file", "path": self.name(file), "size": file.stat().st_size, "oid": digest}

    def log_message(self, *_: Any) -> None:
        pass


def test_only_the_needed_weights_of_a_hub_repository_are_downloaded(checkpoint, tmp_path):
    repository = shutil.copytree(checkpoint, tmp_path / "repository")
    (repository / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant")
    (repository / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (repository / "flux1.safetensors").write_bytes(b"all in one file")
    (repository / "README.md").write_text("words")
    hub = type("OneHub", (Hub,), {"folder": repository, "downloaded": []})
    program = """if True:
        import sys, pathlib
        from deployments.weights.locate import resolve_checkpoint
        print(resolve_checkpoint("org/flux", pathlib.Path(sys.argv[1]), components=["transformer", "vae"]))
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), hub) as server:
        Thread(target=server.serve_forever).start()
        environ = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-c", program, str(tmp_path / "cache")]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, cwd=ROOT)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    wanted = {p.relative_to(checkpoint) for p in checkpoint.rglob("*") if p.is_file()}
    wanted = {p for p in wanted if p.suffix != ".safetensors" or p.parent.name in ("transformer", "vae")}
    assert {p.relative_to(folder) for p in folder.rglob("*") if p.is_file()} == wanted
    assert sorted(hub.downloaded) == sorted(str(path) for path in wanted)


FORMS: dict[str, tuple[list[str], str | None, set[str]]] = {
    "plain beside others": (
        ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"],
        None,
        {"model.safetensors"},
    ),
    "the variant asked for": (["model.safetensors", "model.fp16.safetensors"], "fp16", {"model.fp16.safetensors"}),
    "a variant alone": (
        ["diffusion_pytorch_model.bf16.safetensors"],
        None,
        {"diffusion_pytorch_model.bf16.safetensors"},
    ),
    "pickled": (["pytorch_model.bin", "readme.bin"], None, {"pytorch_model.bin"}),
    "shards of a variant": (
        ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors", "other.safetensors"],
        None,
        {"model.fp16-00001-of-00002.safetensors"},
    ),
    "no weights": (["vocab.json"], None, set()),
}


@pytest.mark.parametrize("case", FORMS)
def test_of_each_component_the_form_that_is_read_is_fetched(case, tmp_path):
    names, variant, wanted = FORMS[case]
    (tmp_path / "part").mkdir()
    index = {"weight_map": {"a": "model.fp16-00001-of-00002.safetensors"}}
    (tmp_path / "part" / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    paths = ["model_index.json", "all.safetensors", *(f"part/{name}" for name in names), "else/model.safetensors"]
    assert set(weights_to_fetch(paths, tmp_path, ["part"], variant)) == {f"part/{name}" for name in wanted}


def test_the_weights_of_a_component_at_the_top_of_a_repository_or_deeper_are_fetched(tmp_path):
    name = "diffusion_pytorch_model.safetensors"
    paths = [name, "config.json", f"vae/{name}", f"models/net/{name}", "models/net/a.bin"]
    assert set(weights_to_fetch(paths, tmp_path, ["."], None)) == {name}
    assert set(weights_to_fetch(paths, tmp_path, ["models/net"], None)) == {f"models/net/{name}"}


def test_a_part_that_is_nowhere_is_refused_by_what_it_was_called(checkpoint, tmp_path):
    assert resolve_part(str(checkpoint), "vae", tmp_path, True, False, None) == (checkpoint / "vae").resolve()
    with pytest.raises(CheckpointError, match="has no folder 'vea'"):
        resolve_part(str(checkpoint), "vea", tmp_path, True, False, None)
    with pytest.raises(CheckpointError, match=r"has no file a\.bin"):
        resolve_files(str(checkpoint), ["model_index.json", "a.bin"], tmp_path, False)
    for address in ("nowhere", str(checkpoint / "model_index.json"), "../up"):
        with pytest.raises(CheckpointError, match="is neither a folder here"):
            resolve_part(address, "", tmp_path, True, False, None)


# S3, with a real server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def bucket(server: S3Server) -> Iterator[Any]:
    """A client of the bucket `models`."""
    server.create_bucket("models")
    with closing(server.client()) as client:
        yield client


@pytest.fixture(scope="module")
def uploaded(bucket: Any, checkpoint: Path) -> str:
    """The checkpoint's address."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), "models", f"tiny/flux/{file.relative_to(checkpoint)}")
    return "s3://models/tiny/flux"


@pytest.fixture
def aws(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables by which boto3 finds the server; arguments override them."""

    def set_variables(**changes: str) -> None:
        for name, value in (server.environment | changes).items():
            monkeypatch.setenv(name, value)

    set_variables()
    return set_variables


@pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "downloaded"])
def test_a_checkpoint_in_s3_is_pulled_whole_but_for_weights_that_are_streamed(
    uploaded, aws, checkpoint, tmp_path, use_streamer
):
    folder = resolve_checkpoint(uploaded, tmp_path, use_streamer=use_streamer)
    here = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    there = {path.relative_to(checkpoint): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    if use_streamer:
        notes = {path: json.loads(here.pop(path)) for path in list(here) if path.name == S3_WEIGHTS}
        assert {str(path.parent): note["address"] for path, note in notes.items()} == {
            name: f"{uploaded}/{name}" for name in WEIGHTS
        }
        there = {path: data for path, data in there.items() if path.suffix != ".safetensors"}
    assert {path: data for path, data in here.items() if path.name not in (ETAGS, ".lock")} == there


def test_only_the_components_a_process_needs_are_downloaded(uploaded, aws, tmp_path):
    folder = resolve_checkpoint(uploaded, tmp_path, components=["vae"], use_streamer=False)
    assert {path.parent.name for path in folder.rglob("*.safetensors")} == {"vae"}
    assert {path.parent.name for path in folder.rglob("config.json")} == set(WEIGHTS)
    resolve_checkpoint(uploaded, tmp_path, components=["transformer"], use_streamer=False)
    assert {path.parent.name for path in folder.rglob("*.safetensors")} == {"vae", "transformer"}


def test_a_second_start_pulls_only_what_changed(bucket, uploaded, aws, tmp_path):
    folder = resolve_checkpoint(uploaded, tmp_path, use_streamer=False)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*") if path.suffix in (".json", ".safetensors")}
    bucket.put_object(Bucket="models", Key="tiny/flux/vae/notes.txt", Body=b"new")
    bucket.put_object(Bucket="models", Key="tiny/flux/vae/gone.txt", Body=b"old")
    resolve_checkpoint(uploaded, tmp_path, use_streamer=False)
    bucket.put_object(Bucket="models", Key="tiny/flux/vae/notes.txt", Body=b"newer")
    bucket.delete_object(Bucket="models", Key="tiny/flux/vae/gone.txt")
    resolve_checkpoint(uploaded, tmp_path, use_streamer=False)
    assert (folder / "vae" / "notes.txt").read_bytes() == b"newer"
    assert not (folder / "vae" / "gone.txt").exists()
    kept = [path for path in before if path.name != ETAGS]
    assert [path.stat().st_mtime_ns for path in kept] == [before[path] for path in kept]


@pytest.mark.parametrize(
    ("model", "changes", "cause"),
    [
        ("s3://no-such-bucket/x", {}, "the bucket does not exist"),
        ("s3://models/nothing-here", {}, "there is no such object"),
        ("s3://models/tiny/flux", {"AWS_SECRET_ACCESS_KEY": "s3cr3t"}, "AWS_SECRET_ACCESS_KEY is wrong"),
        (
            "s3://models/tiny/flux",
            {"AWS_ACCESS_KEY_ID": "stranger"},
            "AWS_ACCESS_KEY_ID is not known to the server",
        ),
        ("s3://models/tiny/flux", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "the server cannot be reached"),
    ],
)
def test_an_address_in_s3_that_cannot_be_read_is_refused_with_the_cause(uploaded, aws, tmp_path, model, changes, cause):
    aws(**changes)
    with pytest.raises(CheckpointError, match=cause) as refusal:
        resolve_checkpoint(model, tmp_path)
    assert f"{model}/model_index.json" in str(refusal.value)
    assert "s3cr3t" not in str(refusal.value)


def test_without_credentials_the_refusal_names_the_variables(uploaded, aws, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(CheckpointError, match=r"no credentials were found \(AWS_ACCESS_KEY_ID"):
        resolve_checkpoint(uploaded, tmp_path)


def test_a_silent_server_is_given_up_on(aws, monkeypatch, tmp_path):
    assert max(PROBE_TIMEOUTS_S.values()) <= 5
    monkeypatch.setitem(PROBE_TIMEOUTS_S, "read_timeout", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        aws(AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(CheckpointError, match="the server cannot be reached: Read timeout"):
            resolve_checkpoint("s3://models/tiny/flux", tmp_path)


@pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "downloaded"])
def test_in_s3_a_variant_is_streamed_and_what_torch_save_wrote_is_downloaded(
    bucket, checkpoint, aws, tmp_path, use_streamer
):
    files = {
        "model_index.json": b"{}",
        "vae/config.json": b"{}",
        "vae/diffusion_pytorch_model.fp16.safetensors": b"variant",
        "text_encoder/config.json": b"{}",
        "text_encoder/pytorch_model.bin": b"pickled",
    }
    for name, data in files.items():
        bucket.put_object(Bucket="models", Key=f"tiny/forms/{name}", Body=data)
    folder = resolve_checkpoint("s3://models/tiny/forms", tmp_path, use_streamer=use_streamer)
    assert (folder / "text_encoder" / "pytorch_model.bin").read_bytes() == b"pickled"
    assert (folder / "vae" / S3_WEIGHTS).exists() == use_streamer
    assert (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").exists() == (not use_streamer)
    assert not (folder / "text_encoder" / S3_WEIGHTS).exists()


@pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "downloaded"])
@pytest.mark.parametrize("subfolder", ["", "deep/net"])
def test_one_component_in_s3_is_pulled_without_its_neighbours(bucket, aws, tmp_path, subfolder, use_streamer):
    place = f"nets/{subfolder}/".replace("//", "/")
    name = "diffusion_pytorch_model.safetensors"
    for key in (f"{place}config.json", f"{place}{name}", f"{place}other/{name}", f"{place}adapter.bin"):
        bucket.put_object(Bucket="models", Key=key, Body=b"{}")
    folder = resolve_part("s3://models/nets", subfolder, tmp_path, True, use_streamer, None)
    assert (folder / "config.json").is_file()
    assert (folder / name).exists() == (not use_streamer)
    assert not (folder / "other" / name).exists()
    if use_streamer:
        assert json.loads((folder / S3_WEIGHTS).read_text())["address"] == f"s3://models/{place}".rstrip("/")
    path = "/".join(part for part in (subfolder, "adapter.bin") if part)
    [adapter] = resolve_files("s3://models/nets", [path], tmp_path, use_streamer)
    assert adapter.read_bytes() == b"{}"
    with pytest.raises(CheckpointError, match="there is no such object"):
        resolve_part("s3://models/nothing", "", tmp_path, True, use_streamer, None)
