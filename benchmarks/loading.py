"""How long weights take to load: Run:ai's streamer against safetensors by mmap, cold, warm, and from S3.

    python -m benchmarks.loading [--megabytes N] [--device D] [--rounds N]

A FLUX transformer with random weights is written to disk and to a real S3 server (SeaweedFS). Each load runs
in a process of its own and reads every weight once, since mmap alone reads nothing. Cold: the pages of the
files were dropped from the kernel's cache before. Writes docs/benchmarks/loading.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import boto3
import psutil
import torch
from boto3.s3.transfer import TransferConfig
from diffusers import FluxTransformer2DModel

from benchmarks import report
from deployments.weights.load import load_component
from deployments.weights.locate import resolve_checkpoint
from tests.support.s3_server import S3Server, s3_server

SOURCES = ("cold", "warm", "s3")
WAYS = {"streamer": True, "mmap": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--device", default="cpu", help="to load to, such as cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", nargs=3, metavar=("MODEL", "CACHE", "WAY"), help="one load, in this process")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_once(*options.load, device=options.device)))
        return
    with tempfile.TemporaryDirectory(prefix="triptych-loading-") as folder, s3_server() as server:
        model = Path(folder) / "model"
        num_bytes = write_model(model, options.megabytes)
        upload(server, model)
        caches = [Path(folder) / f"cache-{number}" for number in range(options.rounds)]
        runs = [run_all(model, server, cache, options.device) for cache in caches]
    rows = [
        {
            "source": source,
            "way": way,
            "seconds": statistics.median(run[source, way]["seconds"] for run in runs),
            "peak_bytes": statistics.median(run[source, way]["peak_bytes"] for run in runs),
        }
        for source in SOURCES
        for way in WAYS
    ]
    write({"machine": report.machine(), "bytes": num_bytes, "device": options.device, "rounds": options.rounds,
           "rows": rows})  # fmt: skip


def write_model(folder: Path, megabytes: int) -> int:
    """A checkpoint folder with a transformer of about this size in bfloat16; its bytes."""
    config = {"num_attention_heads": 8, "attention_head_dim": 128, "joint_attention_dim": 1024, "num_layers": 0}
    per_block = sum(p.numel() for p in FluxTransformer2DModel(**config, num_single_layers=1).parameters()) * 2
    torch.set_default_dtype(torch.bfloat16)
    transformer = FluxTransformer2DModel(**config, num_single_layers=max(1, megabytes * 1_000_000 // per_block))
    torch.set_default_dtype(torch.float32)
    transformer.save_pretrained(folder / "transformer")
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def upload(server: S3Server, model: Path) -> None:
    server.create_bucket("models")
    session = boto3.session.Session(server.access_key, server.secret_key, region_name=server.region)
    with closing(session.client("s3", endpoint_url=server.endpoint)) as client:  # it tries again, unlike the tests' own
        for file in (file for file in model.rglob("*") if file.is_file()):
            key = f"flux/{file.relative_to(model)}"
            client.upload_file(str(file), "models", key, Config=TransferConfig(max_concurrency=2))


def run_all(model: Path, server: S3Server, cache: Path, device: str) -> dict[tuple[str, str], dict[str, float]]:
    found = {}
    for way in WAYS:
        drop_from_page_cache(model)
        for source in ("cold", "warm"):
            found[source, way] = in_a_process(str(model), cache / way, way, device, {})
        found["s3", way] = in_a_process("s3://models/flux", cache / way, way, device, s3_environment(server))
    return found


def in_a_process(model: str, cache: Path, way: str, device: str, environment: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.loading", "--load", model, str(cache), way, "--device", device]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def load_once(model: str, cache: str, way: str, device: str) -> dict[str, float]:
    """From the name of a checkpoint to a module of which every weight has been read."""
    started = time.perf_counter()
    folder = resolve_checkpoint(model, Path(cache), ("transformer",), WAYS[way])
    module = load_component(FluxTransformer2DModel, folder / "transformer", None, device, WAYS[way])
    for parameter in module.parameters():
        parameter.view(torch.uint8).amax().item()  # waits for the device
    return {"seconds": time.perf_counter() - started, "peak_bytes": psutil.Process().memory_info().rss}


def drop_from_page_cache(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def s3_environment(server: S3Server) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": server.access_key,
        "AWS_SECRET_ACCESS_KEY": server.secret_key,
        "AWS_DEFAULT_REGION": server.region,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


SOURCE_WORDS = {"cold": "local disk, cold", "warm": "local disk, warm", "s3": "S3 on the same machine"}
WAY_WORDS = {
    ("s3", "mmap"): "download, then mmap (`false`)",
    **{(source, "streamer"): "streamer (`true`)" for source in SOURCES},
}


def write(result: dict[str, Any]) -> None:
    lines = [
        "# Loading weights: SGLANG_USE_RUNAI_MODEL_STREAMER",
        "",
        f"`python -m benchmarks.loading`: a transformer of {result['bytes'] / 1e6:.0f} MB in bfloat16 to "
        f"{result['device']}, on {result['machine']['cores']} cores, load average "
        f"{result['machine']['load_average'][0]:.1f}, medians of {result['rounds']} processes. From the name of the "
        "checkpoint until every weight has been read; imports are not counted. Memory is that of the process at the "
        "end, mapped pages of files included.",
        "",
        "| from | by | seconds | MB/s | memory of the process |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        way = WAY_WORDS.get((row["source"], row["way"]), "mmap (`false`)")
        speed = result["bytes"] / 1e6 / row["seconds"]
        lines.append(
            f"| {SOURCE_WORDS[row['source']]} | {way} | {row['seconds']:.2f} | {speed:.0f} | "
            f"{row['peak_bytes'] / 1e6:.0f} MB |"
        )
    report.write("loading", result, lines)


if __name__ == "__main__":
    main()
