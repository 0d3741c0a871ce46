"""load_component equals from_pretrained bit for bit; resolve_checkpoint names what is wrong."""

import os

os.environ["MKL_CBWR"] = "AUTO,STRICT"  # bits do not depend on where a tensor lies in memory
os.environ["HF_HUB_OFFLINE"] = "1"

import hashlib
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel

from deployments.errors import CheckpointError
from deployments.weights import load as weights
from deployments.weights.load import ETAGS, S3_WEIGHTS, load_component, read_tensors, resolve_checkpoint
from tests.support.s3_server import S3Server, s3_server
from tests.support.tiny_models import autoencoders, flux2, ltx, qwen_image, wan
from tests.support.tiny_models.flux import flux

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    build: Callable[[], torch.nn.Module]
    forward: Callable[[Any], torch.Tensor]


def ids(vocabulary: int = 200) -> torch.Tensor:
    return torch.randint(5, vocabulary, (1, 12), generator=torch.Generator().manual_seed(0))


def noise(*shape: int, like: Any) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)


def run_text_encoder(model: Any) -> torch.Tensor:
    return model(ids(), output_hidden_states=True).hidden_states[-1]


def run_image_autoencoder(model: Any) -> torch.Tensor:
    return model.decode(model.encode(noise(1, 3, 16, 16, like=model)).latent_dist.mean).sample


def run_video_autoencoder(model: Any) -> torch.Tensor:
    return model.decode(model.encode(noise(1, 3, 5, 32, 32, like=model)).latent_dist.mean).sample


def run_flux(model: Any) -> torch.Tensor:
    return model(
        hidden_states=noise(1, 16, model.config.in_channels, like=model),
        encoder_hidden_states=noise(1, 8, model.config.joint_attention_dim, like=model),
        pooled_projections=noise(1, model.config.pooled_projection_dim, like=model),
        timestep=torch.tensor([0.5], dtype=model.dtype),
        guidance=torch.tensor([3.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
    ).sample


def run_wan(model: Any) -> torch.Tensor:
    return model(
        hidden_states=noise(1, model.config.in_channels, 2, 4, 4, like=model),
        timestep=torch.tensor([500]),
        encoder_hidden_states=noise(1, 8, model.config.text_dim, like=model),
    ).sample


def component(pipeline: Callable[[], Any], name: str) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(pipeline()[0], name)


CASES = {
    "clip": Case(component(flux, "text_encoder"), run_text_encoder),
    "t5": Case(component(flux, "text_encoder_2"), run_text_encoder),
    "umt5": Case(component(wan.wan21, "text_encoder"), run_text_encoder),
    "qwen2.5-vl": Case(component(qwen_image.qwenimage, "text_encoder"), run_text_encoder),
    "flux transformer": Case(component(flux, "transformer"), run_flux),
    "wan transformer": Case(component(wan.wan21, "transformer"), run_wan),
    "autoencoder kl": Case(autoencoders.kl_autoencoder, run_image_autoencoder),
    "autoencoder with batch norm": Case(component(flux2.klein, "vae"), run_image_autoencoder),
    "video autoencoder with statistics": Case(component(ltx.ltx, "vae"), run_video_autoencoder),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[type, Path]]:
    """Saves a case's model once in a form; answers its class and folder."""
    root, made = tmp_path_factory.mktemp("components"), {}

    def save(name: str, **options: Any) -> tuple[type, Path]:
        key = (name, *options.values())
        if key not in made:
            folder = root / "-".join(str(part) for part in key)
            model = CASES[name].build()
            model.save_pretrained(folder, **options)
            made[key] = (type(model), folder)
        return made[key]

    return save


def from_pretrained(cls: Any, folder: Path, dtype: torch.dtype | None) -> Any:
    return cls.from_pretrained(str(folder), torch_dtype=dtype)


def assert_same_model(ours: Any, theirs: Any, forward: Callable[[Any], torch.Tensor]) -> None:
    assert type(ours) is type(theirs)
    for kind in ("named_parameters", "named_buffers"):  # buffers that no file holds included
        mine, other = (dict(getattr(m, kind)(remove_duplicate=False)) for m in (ours, theirs))
        assert mine.keys() == other.keys()
        for name, tensor in other.items():
            assert mine[name].dtype == tensor.dtype, name
            assert mine[name].device == tensor.device, name
            assert mine[name].requires_grad == tensor.requires_grad, name
            assert torch.equal(mine[name].nan_to_num(), tensor.nan_to_num()), name
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert shared_weights(ours) == shared_weights(theirs)
    assert ours.training == theirs.training
    assert dict(ours.config.to_dict() if hasattr(ours.config, "to_dict") else ours.config) == dict(
        theirs.config.to_dict() if hasattr(theirs.config, "to_dict") else theirs.config
    )
    with torch.no_grad():
        assert torch.equal(forward(ours), forward(theirs))


def shared_weights(model: torch.nn.Module) -> set[frozenset[str]]:
    """The groups of names that are one parameter."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


@pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "mapped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_loaded_component_is_the_one_from_pretrained_returns(saved, name, dtype, use_streamer):
    cls, folder = saved(name)
    ours = load_component(cls, folder, dtype, "cpu", use_streamer)
    assert_same_model(ours, from_pretrained(cls, folder, dtype), CASES[name].forward)


@pytest.mark.parametrize("name", ["t5", "qwen2.5-vl", "flux transformer"])
def test_a_component_in_shards_is_streamed_whole(saved, name):
    cls, folder = saved(name, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    ours = load_component(cls, folder, torch.bfloat16, "cpu", use_streamer=True)
    assert_same_model(ours, from_pretrained(cls, folder, torch.bfloat16), CASES[name].forward)


def test_clip_under_the_names_of_published_checkpoints_is_streamed(saved, tmp_path):
    cls, folder = saved("clip")
    published = shutil.copytree(folder, tmp_path / "clip")
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    ours = load_component(cls, published, torch.float32, "cpu", use_streamer=True)
    assert_same_model(ours, from_pretrained(cls, published, torch.float32), run_text_encoder)
    assert torch.equal(run_text_encoder(ours), run_text_encoder(from_pretrained(cls, folder, torch.float32)))


OLD_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def test_an_autoencoder_with_the_old_names_of_attention_is_streamed(saved, tmp_path):
    cls, folder = saved("autoencoder kl")
    old = shutil.copytree(folder, tmp_path / "vae")
    file = old / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if any(new in name for new in OLD_NAMES)]:
        (new,) = (new for new in OLD_NAMES if new in name)
        tensors[name.replace(new, OLD_NAMES[new])] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    ours = load_component(cls, old, torch.float32, "cpu", use_streamer=True)
    assert_same_model(ours, from_pretrained(cls, old, torch.float32), run_image_autoencoder)
    expected = run_image_autoencoder(from_pretrained(cls, folder, torch.float32))
    assert torch.equal(run_image_autoencoder(ours), expected)


def test_the_streamed_t5_shares_its_embedding_and_the_wan_transformer_keeps_its_float32_modules(saved):
    t5 = load_component(*saved("t5"), torch.bfloat16, "cpu", use_streamer=True)
    assert t5.shared.weight is t5.encoder.embed_tokens.weight
    transformer = load_component(*saved("wan transformer"), torch.bfloat16, "cpu", use_streamer=True)
    assert transformer.scale_shift_table.dtype == torch.float32
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("autoencoder with batch norm", "bn.running_mean"),
        ("video autoencoder with statistics", "latents_mean"),
        ("clip", "embeddings.token_embedding.weight"),
    ],
)
def test_single_tensors_are_read_without_the_rest(saved, name, buffer):
    cls, folder = saved(name)
    tensors = read_tensors(cls, folder, {buffer, "no such name"})
    stored = load_file(next(folder.glob("*.safetensors")))[buffer]
    assert tensors.keys() == {buffer}
    assert torch.equal(tensors[buffer], stored)


@pytest.fixture
def broken(saved, tmp_path: Path) -> Path:
    """A copy of the CLIP text encoder's folder, to be damaged."""
    return shutil.copytree(saved("clip")[1], tmp_path / "clip")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 100)


def write_garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not a tensor in sight" * 100)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def name_a_missing_shard(folder: Path) -> None:
    remove_weights(folder)
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def put_a_weight_in_two_shards(folder: Path) -> None:
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in names:
        shutil.copy(folder / "model.safetensors", folder / name)
    index = {"metadata": {}, "weight_map": dict(zip("ab", names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    remove_weights(folder)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (truncate, "its header declares"),
        (write_garbage, "is not a safetensors file: its header cannot have"),
        (remove_weights, r"holds none of model\.safetensors"),
        (name_a_missing_shard, "model-00001-of-00001.safetensors"),
        (put_a_weight_in_two_shards, "in more than one of its files"),
        (lambda folder: (folder / "config.json").unlink(), r"config\.json cannot be read"),
    ],
)
def test_a_damaged_component_is_refused_with_its_folder_and_the_cause(broken, damage, sentence):
    damage(broken)
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        load_component(CLIPTextModel, broken, torch.float32, "cpu", use_streamer=True)
    assert str(broken) in str(refusal.value)


@pytest.mark.parametrize("use_streamer", [True, False])
def test_files_that_lack_a_weight_are_refused_by_its_name(saved, tmp_path, use_streamer):
    cls, folder = saved("autoencoder kl")
    lacking = shutil.copytree(folder, tmp_path / "vae")
    file = lacking / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lack 1 weights: decoder\.conv_in\.bias"):
        load_component(cls, lacking, torch.float32, "cpu", use_streamer)


def test_a_weight_of_another_shape_is_refused_by_its_name(saved, tmp_path):
    cls, folder = saved("autoencoder kl")
    other = shutil.copytree(folder, tmp_path / "vae")
    file = other / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"decoder.conv_in.bias": torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.bias has the shape \[3\]"):
        load_component(cls, other, torch.float32, "cpu", use_streamer=True)


def test_a_weight_that_the_model_does_not_know_is_reported(saved, tmp_path, caplog):
    cls, folder = saved("autoencoder kl")
    other = shutil.copytree(folder, tmp_path / "vae")
    file = other / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"stranger": torch.zeros(3)}, file, metadata={"format": "pt"})
    load_component(cls, other, torch.float32, "cpu", use_streamer=True)
    assert "1 weights are not used: stranger" in caplog.text


def test_a_stream_that_loses_a_tensor_is_refused(saved, monkeypatch):
    from runai_model_streamer import SafetensorsStreamer

    whole = SafetensorsStreamer.get_tensors
    monkeypatch.setattr(SafetensorsStreamer, "get_tensors", lambda self: list(whole(self))[:-1])
    with pytest.raises(CheckpointError, match="lost 1 weights"):
        load_component(*saved("clip"), torch.float32, "cpu", use_streamer=True)


def test_without_the_streamers_package_the_refusal_says_how_to_install_it(saved, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    sentence = r"SGLANG_USE_RUNAI_MODEL_STREAMER=true .* pip install 'runai-model-streamer\[s3\]"
    with pytest.raises(CheckpointError, match=sentence):
        load_component(*saved("clip"), torch.float32, "cpu", use_streamer=True)
    load_component(*saved("clip"), torch.float32, "cpu", use_streamer=False)


def test_a_quantised_component_is_left_to_its_quantiser(broken, monkeypatch, caplog):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "new"}}))
    monkeypatch.setattr(weights, "stream_tensors", lambda files: pytest.fail("streamed"))
    with caplog.at_level("INFO"):
        load_component(CLIPTextModel, broken, torch.float32, "cpu", use_streamer=True)
    assert "is quantised: its quantiser reads the files, not the Run:ai streamer" in caplog.text


def test_a_model_of_neither_library_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Linear is neither a diffusers nor a transformers model"):
        load_component(torch.nn.Linear, tmp_path, torch.float32, "cpu", use_streamer=True)


# Where a checkpoint is


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "flux"
    flux()[0].save_pretrained(folder, max_shard_size="200KB")
    return folder


def test_a_folder_is_used_where_it_is(checkpoint, tmp_path):
    assert resolve_checkpoint(str(checkpoint), tmp_path) == checkpoint


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("no such folder", "neither a folder here, nor s3://bucket/prefix, nor a hub repository"),
        ("./nowhere", "neither a folder here"),
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
        from deployments.weights.load import resolve_checkpoint
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
    """Sets the variables by which boto3 and the streamer find the server; arguments override them."""

    def set_variables(**changes: str) -> None:
        settings = {
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
            "AWS_DEFAULT_REGION": server.region,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_CONFIG_FILE": os.devnull,
        }
        for name, value in (settings | changes).items():
            monkeypatch.setenv(name, value)

    set_variables()
    return set_variables


FLUX_MODELS = {
    "transformer": FluxTransformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}


@pytest.mark.parametrize("use_streamer", [True, False], ids=["streamed", "downloaded"])
def test_a_checkpoint_in_s3_loads_like_the_local_one(uploaded, aws, checkpoint, tmp_path, use_streamer):
    folder = resolve_checkpoint(uploaded, tmp_path, use_streamer=use_streamer)
    weights_here = {path.relative_to(folder) for path in folder.rglob("*.safetensors")}
    assert weights_here == (
        set() if use_streamer else {p.relative_to(checkpoint) for p in checkpoint.rglob("*.safetensors")}
    )
    pipeline = FluxPipeline.from_pretrained(
        folder,
        **{n: load_component(c, folder / n, torch.float32, "cpu", use_streamer) for n, c in FLUX_MODELS.items()},
    )
    local = FluxPipeline.from_pretrained(checkpoint)
    request = {**flux()[1], "output_type": "pt"}
    pictures = [p(**request, generator=torch.Generator().manual_seed(0)).images for p in (pipeline, local)]
    assert torch.equal(*pictures)


def test_only_the_components_a_process_needs_are_downloaded(uploaded, aws, tmp_path):
    folder = resolve_checkpoint(uploaded, tmp_path, components=["vae"], use_streamer=False)
    assert {path.parent.name for path in folder.rglob("*.safetensors")} == {"vae"}
    assert {path.parent.name for path in folder.rglob("config.json")} == set(FLUX_MODELS)
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


def test_single_tensors_are_read_from_s3(uploaded, aws, checkpoint, tmp_path):
    folder = resolve_checkpoint(uploaded, tmp_path)
    name = "x_embedder.weight"
    tensors = read_tensors(FluxTransformer2DModel, folder / "transformer", [name])
    assert torch.equal(
        tensors[name], FluxTransformer2DModel.from_pretrained(checkpoint / "transformer").x_embedder.weight
    )


def test_two_components_loaded_at_once_from_s3_are_both_whole(uploaded, aws, checkpoint, tmp_path):
    folder = resolve_checkpoint(uploaded, tmp_path)

    def load(name: str) -> Any:
        return load_component(FLUX_MODELS[name], folder / name, torch.float32, "cpu", use_streamer=True)

    with ThreadPoolExecutor(4) as threads:
        loaded = dict(zip(FLUX_MODELS, threads.map(load, FLUX_MODELS), strict=True))
    for name, cls in FLUX_MODELS.items():
        expected = cls.from_pretrained(checkpoint / name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded[name].state_dict().items())


@pytest.mark.parametrize(
    ("model", "changes", "cause"),
    [
        ("s3://no-such-bucket/x", {}, "the bucket does not exist"),
        ("s3://models/nothing-here", {}, "there is no such object"),
        ("s3://models/tiny/flux", {"AWS_SECRET_ACCESS_KEY": "s3cr3t"}, "AWS_SECRET_ACCESS_KEY is wrong"),
        (
            "s3://models/tiny/flux",
            {"AWS_ACCESS_KEY_ID": "who"},
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


def test_a_silent_server_is_given_up_on(aws, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        aws(AWS_ENDPOINT_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(CheckpointError, match="the server cannot be reached: Read timeout"):
            resolve_checkpoint("s3://models/tiny/flux", tmp_path)


def test_a_truncated_object_is_refused_before_it_is_streamed(bucket, uploaded, aws, checkpoint, tmp_path):
    whole = (checkpoint / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    folder = resolve_checkpoint(uploaded, tmp_path)
    key = "tiny/flux/vae/diffusion_pytorch_model.safetensors"
    bucket.put_object(Bucket="models", Key=key, Body=whole[:-50])
    try:
        with pytest.raises(CheckpointError, match="its header declares"):
            load_component(AutoencoderKL, folder / "vae", torch.float32, "cpu", use_streamer=True)
    finally:
        bucket.put_object(Bucket="models", Key=key, Body=whole)


def test_weights_left_in_s3_are_refused_without_the_streamer(uploaded, aws, tmp_path):
    folder = resolve_checkpoint(uploaded, tmp_path, use_streamer=True)
    assert (folder / "vae" / S3_WEIGHTS).exists()
    with pytest.raises(CheckpointError, match="SGLANG_USE_RUNAI_MODEL_STREAMER=false downloads them"):
        load_component(AutoencoderKL, folder / "vae", torch.float32, "cpu", use_streamer=False)


def test_a_server_known_by_a_name_is_streamed_from_when_told_how_it_is_addressed(
    server, uploaded, aws, monkeypatch, tmp_path
):
    aws(AWS_ENDPOINT_URL=server.endpoint.replace("127.0.0.1", "localhost"))
    folder = resolve_checkpoint(uploaded, tmp_path)
    with pytest.raises(CheckpointError, match="RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING=0"):
        load_component(AutoencoderKL, folder / "vae", torch.float32, "cpu", use_streamer=True)
    monkeypatch.setenv("RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING", "0")
    load_component(AutoencoderKL, folder / "vae", torch.float32, "cpu", use_streamer=True)
