"""Finds a checkpoint (a folder, `s3://`, the Hugging Face hub) and loads its components."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import accelerate
import boto3
import huggingface_hub
import torch
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    NoCredentialsError,
)
from botocore.exceptions import ConnectionError as ServerConnectionError
from diffusers import ModelMixin
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.models.modeling_utils import LegacyModelMixin, no_init_weights
from filelock import FileLock
from safetensors.torch import load as load_safetensors
from transformers import GenerationConfig, PreTrainedModel

from deployments.errors import CheckpointError

logger = logging.getLogger(__name__)

STREAMER_VARIABLE = "SGLANG_USE_RUNAI_MODEL_STREAMER"
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")  # configurations, tokenizers, indexes of shards
S3_WEIGHTS = "s3_weights.json"  # in a component's folder: its weights are to be streamed from S3
ETAGS = ".etags.json"  # in a folder pulled from S3: path -> ETag of the object it was made from
PROBE_TIMEOUTS_S = {"connect_timeout": 2, "read_timeout": 5}
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # in safetensors
LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format

ADDRESSING_HINT = (
    "a server that does not take the bucket in its host name needs RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING=0"
)

# Two streams from S3 in one process crash or lose tensors (runai-model-streamer 0.17), and both libraries
# switch the default dtype and torch's constructors for the whole process while they build a model.
one_load_at_a_time = threading.Lock()

TensorStream = Iterator[tuple[str, torch.Tensor]]
RangeReader = Callable[[int, int], bytes]  # (start, length)
ObjectOpener = Callable[[str], tuple[RangeReader, int]]  # location -> a reader, the size in bytes


# --------------------------------------------------------------------------------------------
# One component


def load_component(
    cls: type[torch.nn.Module],
    folder: Path | str,
    dtype: torch.dtype | None,
    device: torch.device | str,
    use_streamer: bool,
) -> Any:
    """The module that `cls.from_pretrained(folder)` returns, on `device`, in evaluation mode.

    With `use_streamer` the Run:ai streamer reads the weights, from the folder or from S3; otherwise
    from_pretrained maps the files into memory. Both leave the same numbers in the same dtypes. A quantised
    component is always read by its own quantiser. `dtype` None means what it means to from_pretrained.

    Raises CheckpointError, naming the folder and the cause.
    """
    folder = Path(folder)
    library = library_of(cls)
    quantised = is_quantised(folder)
    if quantised and use_streamer:
        logger.info("%s is quantised: its quantiser reads the files, not the Run:ai streamer", folder)
    streams = use_streamer and not quantised
    if not streams and (folder / S3_WEIGHTS).exists():
        raise CheckpointError(f"{folder}: its weights were left in S3; {STREAMER_VARIABLE}=false downloads them")
    load = library.stream if streams else library.map_files
    try:
        with one_load_at_a_time:
            module = load(cls, folder, dtype, torch.device(device))
        refuse_missing_weights(module)
        return module.to(device).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{cls.__name__} in {folder} cannot be loaded: {error}") from error


def is_quantised(folder: Path | str) -> bool:
    return "quantization_config" in read_json(Path(folder) / "config.json")


def stored_dtype(cls: type[torch.nn.Module], folder: Path | str) -> torch.dtype | None:
    """The dtype in which most of a component's weights are stored.

    From the headers of its files, or, where another process has these, from the configuration that transformers
    writes; None where neither says it.
    """
    num_elements: Counter[torch.dtype] = Counter()
    try:
        for file in weight_files(library_of(cls), Path(folder)).files:
            for entry in file.entries.values():
                if entry["dtype"] in FLOATING:
                    num_elements[FLOATING[entry["dtype"]]] += math.prod(entry["shape"])
    except CheckpointError:  # who loads it says what is wrong
        num_elements.clear()
    if num_elements:
        return max(num_elements, key=num_elements.__getitem__)
    config = read_json(Path(folder) / "config.json")
    named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return named if isinstance(named, torch.dtype) else None


def read_tensors(cls: type[torch.nn.Module], folder: Path | str, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The tensors of a component's files that have one of these names, without reading the others.

    Raises CheckpointError where the files are neither in the folder nor in S3.
    """
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(library_of(cls), Path(folder)).files:
        for name, entry in file.entries.items():
            if name in names:
                start, end = entry["data_offsets"]
                data = file.read(file.data_start + start, end - start)
                header = json.dumps({name: {**entry, "data_offsets": [0, end - start]}}).encode()
                found |= load_safetensors(struct.pack("<Q", len(header)) + header + data)
    return found


def map_diffusers(cls: Any, folder: Path, dtype: torch.dtype | None, device: torch.device) -> Any:
    return cls.from_pretrained(str(folder), torch_dtype=dtype, use_safetensors=True, local_files_only=True)


def map_transformers(cls: Any, folder: Path, dtype: torch.dtype | None, device: torch.device) -> Any:
    return cls.from_pretrained(str(folder), dtype=dtype, use_safetensors=True, local_files_only=True)


def stream_diffusers(cls: Any, folder: Path, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Tensor by tensor to the device, so that the host never holds the whole model."""
    model = construct_without_weights(cls, cls.load_config(folder), dtype)
    weights = weight_files(DIFFUSERS, folder)
    names = {name: name for name in weights.names}  # the model's name -> the file's
    if not weights.is_sharded:
        model._fix_state_dict_keys_on_load(names)  # attention blocks of old checkpoints
    name_in_model = {in_file: in_model for in_model, in_file in names.items()}
    expected = model.state_dict()
    report_unexpected(model, names.keys() - expected.keys(), folder)
    kept_in_fp32 = set(model._keep_in_fp32_modules or ())
    for name, tensor in stream_tensors(weights):
        name = name_in_model[name]
        if name in expected:
            wanted = dtype_in_model(name, tensor, expected[name].dtype, dtype, kept_in_fp32)
            assign(model, name, tensor.to(device=device, dtype=wanted, copy=True))
    model.register_to_config(_name_or_path=str(folder))
    return model


def stream_transformers(cls: Any, folder: Path, dtype: torch.dtype | None, device: torch.device) -> Any:
    """Renamed keys, tied weights and dtypes are from_pretrained's own doing: it gets the streamed tensors."""
    tensors = {name: tensor.clone() for name, tensor in stream_tensors(weight_files(TRANSFORMERS, folder))}
    config = cls.config_class.from_pretrained(folder)
    model = cls.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    model.config.name_or_path = str(folder)
    if model.can_generate():
        model.generation_config = read_generation_config(folder)
    return model


@dataclass(frozen=True)
class Library:
    """How the models of one library are stored and loaded."""

    model_class: type[torch.nn.Module]
    weights: tuple[str, ...]  # the file or the index of shards, in the order from_pretrained looks for them
    shards: str
    stream: Callable[..., Any]
    map_files: Callable[..., Any]

    @property
    def file_patterns(self) -> tuple[str, ...]:
        return (*(name for name in self.weights if name.endswith(".safetensors")), self.shards)


DIFFUSERS = Library(
    ModelMixin,
    ("diffusion_pytorch_model.safetensors.index.json", "diffusion_pytorch_model.safetensors"),
    "diffusion_pytorch_model-?????-of-?????.safetensors",
    stream_diffusers,
    map_diffusers,
)
TRANSFORMERS = Library(
    PreTrainedModel,
    ("model.safetensors", "model.safetensors.index.json"),
    "model-?????-of-?????.safetensors",
    stream_transformers,
    map_transformers,
)
LIBRARIES = (DIFFUSERS, TRANSFORMERS)


def library_of(cls: type[torch.nn.Module]) -> Library:
    for library in LIBRARIES:
        if issubclass(cls, library.model_class):
            return library
    raise CheckpointError(f"{cls.__name__} is neither a diffusers nor a transformers model")


def construct_without_weights(cls: Any, config: dict[str, Any], dtype: torch.dtype | None) -> Any:
    """As from_pretrained does: parameters on meta; buffers real, computed with `dtype` as the default."""
    if issubclass(cls, LegacyModelMixin):
        cls = _fetch_remapped_cls_from_config(config, cls)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype or default_dtype)
    try:
        with no_init_weights(), accelerate.init_empty_weights():
            return cls.from_config(config)
    finally:
        torch.set_default_dtype(default_dtype)


def dtype_in_model(
    name: str,
    tensor: torch.Tensor,
    constructed: torch.dtype,
    dtype: torch.dtype | None,
    kept_in_fp32: set[str],
) -> torch.dtype:
    """The rule of diffusers' load_model_dict_into_meta."""
    if dtype is None:
        return constructed
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if kept_in_fp32.intersection(name.split(".")) else dtype


def assign(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf)
    if old.shape != tensor.shape:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}, the configuration says {list(old.shape)}")
    if leaf in module._parameters:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[leaf] = tensor


def refuse_missing_weights(module: torch.nn.Module) -> None:
    missing = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(f"its files lack {len(missing)} weights: {', '.join(missing[:3])} ...")


def report_unexpected(model: Any, unexpected: Collection[str], folder: Path) -> None:
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    names = sorted(name for name in unexpected if not any(re.search(pattern, name) for pattern in ignored))
    if names:
        logger.warning("%s: %d weights are not used: %s ...", folder, len(names), ", ".join(names[:3]))


def read_generation_config(folder: Path) -> Any:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


# --------------------------------------------------------------------------------------------
# Files of weights


@dataclass(frozen=True)
class WeightFile:
    """A safetensors file: what its header declares, and a reader of byte ranges."""

    location: str  # a path or an s3:// address
    read: RangeReader
    entries: dict[str, dict[str, Any]]  # name -> dtype, shape, data_offsets
    data_start: int


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold one component."""

    files: tuple[WeightFile, ...]
    is_sharded: bool

    @property
    def names(self) -> list[str]:
        return [name for file in self.files for name in file.entries]

    @property
    def is_s3(self) -> bool:
        return self.files[0].location.startswith("s3://")


def weight_files(library: Library, folder: Path) -> WeightFiles:
    """Reads the headers, so every file is there, whole and readable when this returns."""
    in_s3 = read_json(folder / S3_WEIGHTS) if (folder / S3_WEIGHTS).exists() else None
    here = {path.name for path in folder.glob("*")} | set(in_s3["files"] if in_s3 else ())
    found = next((name for name in library.weights if name in here), None)
    if found is None:
        raise CheckpointError(f"{folder} holds none of {', '.join(library.weights)}")
    is_sharded = found.endswith(".json")
    names = sorted(set(read_json(folder / found)["weight_map"].values())) if is_sharded else [found]
    locations = [f"{in_s3['address']}/{name}" if in_s3 else str(folder / name) for name in names]
    open_object = object_opener() if in_s3 else open_local_file
    files = WeightFiles(tuple(open_weight_file(location, open_object) for location in locations), is_sharded)
    if len(files.names) != len(set(files.names)):
        raise CheckpointError(f"{folder}: a weight is in more than one of its files")
    return files


def open_weight_file(location: str, open_object: ObjectOpener) -> WeightFile:
    try:
        read, size = open_object(location)
        (header_size,) = struct.unpack("<Q", read(0, 8))
        if header_size > min(size, LARGEST_HEADER):
            raise ValueError(f"its header cannot have {header_size} bytes")
        entries: dict[str, dict[str, Any]] = json.loads(read(8, header_size))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{location} is not a safetensors file: {error}") from error
    entries.pop("__metadata__", None)
    data_size = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size != 8 + header_size + data_size:
        raise CheckpointError(f"{location} has {size} bytes, its header declares {8 + header_size + data_size}")
    return WeightFile(location, read, entries, 8 + header_size)


def open_local_file(path: str) -> tuple[RangeReader, int]:
    def read(start: int, length: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)

    return read, os.path.getsize(path)


def stream_tensors(weights: WeightFiles) -> TensorStream:
    """Each tensor once, valid until the next; raises CheckpointError if the stream does not bring all."""
    streamer_class, credentials = import_streamer(weights.is_s3)
    received = set()
    with streamer_class() as streamer:
        try:
            streamer.stream_files([file.location for file in weights.files], s3_credentials=credentials)
            for name, tensor in streamer.get_tensors():
                received.add(name)
                yield name, tensor
        except ValueError as error:  # all that the streamer raises; it names no cause
            hint = f"; boto3 could read it: {ADDRESSING_HINT}" if weights.is_s3 else ""
            raise CheckpointError(f"the stream of {weights.files[0].location} failed: {error}{hint}") from error
    lost = set(weights.names) - received
    if lost:
        raise CheckpointError(f"the stream of {weights.files[0].location} lost {len(lost)} weights: {min(lost)} ...")


def import_streamer(from_s3: bool) -> tuple[Any, Any]:
    """The streamer's class and the credentials it needs, those that boto3 finds."""
    for package in ("runai_model_streamer", *(["runai_model_streamer_s3"] if from_s3 else [])):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(
                f"{STREAMER_VARIABLE}=true (the default) needs a package that is not installed: "
                f"pip install 'runai-model-streamer[s3]>=0.17', or set {STREAMER_VARIABLE}=false"
            )
    from runai_model_streamer import SafetensorsStreamer

    return SafetensorsStreamer, streamer_credentials() if from_s3 else None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


# --------------------------------------------------------------------------------------------
# Where a checkpoint is


def resolve_checkpoint(
    model: str, cache_root: Path, components: Collection[str] | None = None, use_streamer: bool = True
) -> Path:
    """The local folder of a checkpoint: `model` is a folder, `s3://bucket/prefix`, or a hub repository.

    Configurations and tokenizers of all components are brought there; weights only of `components` (None: of
    all). With `use_streamer`, weights in S3 stay there and load_component streams them. Hub repositories are
    kept in huggingface_hub's own cache.

    Raises CheckpointError, naming the cause.
    """
    if model.startswith("s3://"):
        folder = pull_from_s3(model.rstrip("/"), cache_root, components, use_streamer)
    elif Path(model).expanduser().is_dir():
        folder = Path(model).expanduser().absolute()
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        folder = pull_from_hub(model, components)
    else:
        raise CheckpointError(f"{model!r} is neither a folder here, nor s3://bucket/prefix, nor a hub repository")
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{model} has no model_index.json: it is not a checkpoint of a diffusers pipeline")
    return folder


def pull_from_hub(model: str, components: Collection[str] | None) -> Path:
    try:
        return Path(
            huggingface_hub.snapshot_download(model, allow_patterns=[*SMALL_FILES, *weight_patterns(components)])
        )
    except (OSError, ValueError) as error:  # HfHubHTTPError is an OSError
        raise CheckpointError(f"{model} is not a folder here, and the Hugging Face hub says: {error}") from error


def weight_patterns(components: Collection[str] | None) -> list[str]:
    folders = ["*"] if components is None else sorted(components)
    return [f"{folder}/{name}" for folder in folders for library in LIBRARIES for name in library.file_patterns]


def pull_from_s3(model: str, cache_root: Path, components: Collection[str] | None, use_streamer: bool) -> Path:
    bucket, _, prefix = model.removeprefix("s3://").partition("/")
    object_opener()(f"{model}/model_index.json")  # names the cause quickly if there is nothing to pull
    with naming_the_cause(model):
        client = s3_client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/".lstrip("/"))
        objects = {item["Key"].removeprefix(prefix).lstrip("/"): item["ETag"] for p in pages for item in p["Contents"]}
    patterns = SMALL_FILES if use_streamer else (*SMALL_FILES, *weight_patterns(components))
    wanted = {path: tag for path, tag in objects.items() if matches(path, patterns) and is_below(path)}
    folder = cache_root / "weights" / ("s3-streamed" if use_streamer else "s3-downloaded") / bucket / prefix
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), naming_the_cause(model):
        download_changed(client, f"{bucket}/{prefix}", wanted, folder)
        remove_gone(objects, folder)
        if use_streamer:
            note_weights_in_s3(model, objects, folder)
    return folder


def download_changed(client: Any, root: str, wanted: Mapping[str, str], folder: Path) -> None:
    """The objects whose ETag differs from what was pulled before, each put in place whole."""
    bucket, _, prefix = root.partition("/")
    pulled = read_etags(folder)
    for path, tag in wanted.items():
        if pulled.get(path) != tag or not (folder / path).exists():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            partial = folder / f"{path}.partial"
            client.download_file(bucket, f"{prefix}/{path}".lstrip("/"), str(partial))
            partial.replace(folder / path)
            pulled[path] = tag
            write_json(folder / ETAGS, pulled)


def remove_gone(objects: Collection[str], folder: Path) -> None:
    pulled = read_etags(folder)
    for path in pulled.keys() - set(objects):
        (folder / path).unlink(missing_ok=True)
    write_json(folder / ETAGS, {path: tag for path, tag in pulled.items() if path in objects})


def read_etags(folder: Path) -> dict[str, str]:
    return dict(read_json(folder / ETAGS)) if (folder / ETAGS).exists() else {}


def note_weights_in_s3(model: str, objects: Collection[str], folder: Path) -> None:
    for component in {PurePosixPath(path).parent for path in objects if path.endswith(".safetensors")}:
        if (folder / component).is_dir():
            files = [PurePosixPath(path).name for path in objects if PurePosixPath(path).parent == component]
            write_json(folder / component / S3_WEIGHTS, {"address": f"{model}/{component}", "files": files})


def matches(path: str, patterns: Collection[str]) -> bool:
    return any(PurePosixPath(path).match(pattern) for pattern in patterns)


def is_below(path: str) -> bool:
    return not path.endswith("/") and ".." not in PurePosixPath(path).parts


def write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


# --------------------------------------------------------------------------------------------
# S3

S3_CAUSES = {
    "NoSuchBucket": "the bucket does not exist",
    "NoSuchKey": "there is no such object",
    "InvalidRange": "the object is empty",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known to the server",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is wrong",
    "AccessDenied": "the credentials may not read it",
}


def object_opener() -> ObjectOpener:
    """Opens objects of S3 with short time-outs.

    It asks for the first bytes rather than sending a HEAD, whose answers have no body to name the cause.
    """
    client = s3_client(**PROBE_TIMEOUTS_S, retries={"total_max_attempts": 1})

    def open_object(address: str) -> tuple[RangeReader, int]:
        bucket, _, key = address.removeprefix("s3://").partition("/")

        def get(start: int, length: int) -> Any:
            return client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")

        def read(start: int, length: int) -> bytes:
            with naming_the_cause(address):
                return bytes(get(start, length)["Body"].read()) if length else b""

        with naming_the_cause(address):
            first = get(0, 1)
            first["Body"].read()
        return read, int(first["ContentRange"].rpartition("/")[2])

    return open_object


def s3_client(**options: Any) -> Any:
    """With the endpoint and the credentials that boto3 finds (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID ...)."""
    return boto3.session.Session().client("s3", config=Config(**options))


def streamer_credentials() -> Any:
    from runai_model_streamer.s3_utils.s3_utils import S3Credentials

    session = boto3.session.Session()
    found = session.get_credentials().get_frozen_credentials()
    endpoint = s3_client().meta.endpoint_url
    return S3Credentials(
        access_key_id=found.access_key,
        secret_access_key=found.secret_key,
        session_token=found.token,
        region_name=session.region_name,
        endpoint=None if endpoint.endswith(".amazonaws.com") else endpoint,
    )


@contextmanager
def naming_the_cause(address: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = error.response["Error"]["Code"]
        cause = S3_CAUSES.get(code, f"the server answers {code}")
    except NoCredentialsError:
        cause = "no credentials were found (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    except (HTTPClientError, ServerConnectionError) as error:
        cause = f"the server cannot be reached: {error}"
    except BotoCoreError as error:
        cause = str(error)
    else:
        return
    raise CheckpointError(f"{address} cannot be read: {cause}")
