"""Where the milliseconds of one request go, part by part, against the same pipeline called in this process.

    python -m benchmarks.stages [--config FILE] [--model FOLDER] [--steps N ...] [--rounds N] [--port N]

On an accelerator, with a checkpoint of real size (benchmarks/real_size.py), which it holds twice:

    python -m benchmarks.stages --config ray_configs/serve_flux1_dev_h100.yaml --model FOLDER --steps 4 50

The application stores in a real S3 server (SeaweedFS) and logs its stages. Requests come one after another;
between them the whole pipeline runs here, with a clock at each of its components. Both sides use one thread.
Writes docs/benchmarks/stages.md.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.served import ONE_THREAD, Served, served

os.environ.update(ONE_THREAD)  # before torch is imported

import httpx
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks import report
from benchmarks.request_parts import as_table, attribute, describe, ms
from deployments.media.files import FileToWrite, write_file
from deployments.messages import GenerationRequest, OutputFormat
from serve_app.storage.keys import object_key
from serve_app.storage.s3 import S3Storage
from tests.support.s3_server import S3Server, s3_server

PROMPT = "a big fox on an orange background"
BUCKET = "pictures"
WARM_UPS = 2
WRONG_PICTURE = 2.0  # levels of 255, the mean difference from which on it is another picture
# component of a pipeline, by the beginning of its name -> the part of a request that it is the work of
WORK = {"text_encoder": "encoder", "image_encoder": "encoder", "transformer": "forwards", "unet": "forwards"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("ray_configs/serve_emoji_cpu.yaml"))
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--model", type=Path, help="a checkpoint folder, in place of that of the config")
    parser.add_argument("--port", type=int, default=0, help="of the application; default: a free one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="triptych-stages-") as folder, s3_server() as s3:
        s3.create_bucket(BUCKET)
        with served(options.config, Path(folder), options.port, options.model, **s3_variables(s3)) as application:
            pipeline = TimedPipeline(application.model, torch.device(application.device))
            rows = [measure(application, s3, pipeline, steps, options.rounds) for steps in options.steps]
    result = {"machine": report.machine(), "config": options.config.name, "rows": rows}
    report.write("stages", result, as_markdown(result))


def s3_variables(s3: S3Server) -> dict[str, str]:
    return {
        "SGLANG_CLOUD_STORAGE_TYPE": "s3",
        "SGLANG_S3_BUCKET_NAME": BUCKET,
        "SGLANG_S3_ENDPOINT_URL": s3.endpoint,
        "SGLANG_S3_ACCESS_KEY_ID": s3.access_key,
        "SGLANG_S3_SECRET_ACCESS_KEY": s3.secret_key,
    }


class TimedPipeline:
    """The unsplit pipeline, with a clock at each component that computes."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        self.pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True).to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.seconds: dict[str, float] = {}
        for name, component in self.pipeline.components.items():
            part = next((part for start, part in WORK.items() if name.startswith(start)), None)
            if part is not None and isinstance(component, torch.nn.Module):
                self._time_forwards(component, part)
        self.pipeline.vae.decode = self._timed(self.pipeline.vae.decode, "vae")

    def make(self, arguments: dict[str, Any], seed: int) -> tuple[Image.Image, bytes, dict[str, float]]:
        """A picture, its file as the server writes it, and the seconds of each part; `loop` is all between them."""
        self.seconds = dict.fromkeys(("encoder", "forwards", "vae"), 0.0)
        torch.manual_seed(seed)
        started = self._now()
        with torch.no_grad():
            picture = self.pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(seed), **arguments).images[0]
        called = time.perf_counter()
        data = write_file(FileToWrite("png", [np.asarray(picture)], {"prompt": PROMPT, "seed": seed} | arguments)).data
        media_s = time.perf_counter() - called
        loop_s = called - started - sum(self.seconds.values())
        return picture, data, self.seconds | {"media": media_s, "loop": loop_s}

    def _time_forwards(self, module: torch.nn.Module, part: str) -> None:
        began: list[float] = []

        def note(*_: Any) -> None:
            self.seconds[part] += self._now() - began.pop()

        module.register_forward_pre_hook(lambda *_: began.append(self._now()))
        module.register_forward_hook(note)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self._now()
            output = function(*args, **kwargs)
            self.seconds[part] += self._now() - started
            return output

        return timed

    def _now(self) -> float:
        """The time when what the device was given is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def measure(application: Served, s3: S3Server, pipeline: TimedPipeline, steps: int, rounds: int) -> dict[str, Any]:
    """Requests and calls by turns; RuntimeError where the pictures differ."""
    arguments = application.default_arguments | {"num_inference_steps": steps}
    parts, alone, uploads_s = [], [], []
    storage = S3Storage(s3.cloud_storage(BUCKET))
    with httpx.Client(timeout=300) as client, closing(storage):
        for seed in range(WARM_UPS + rounds):
            picture, data, seconds = pipeline.make(arguments, seed)
            upload_s = seconds_of_upload(storage, data, f"alone-{steps}-{seed}")
            request, stored = ask(client, application, arguments, seed)
            refuse_another_picture(stored, picture, application.device)
            if seed >= WARM_UPS:
                parts.append(request)
                alone.append(seconds)
                uploads_s.append(upload_s)
    row = {"steps": steps, **describe(parts, alone), "upload_alone_s": statistics.median(uploads_s)}
    print(row, flush=True)
    return row


def refuse_another_picture(stored: Image.Image, picture: Image.Image, device: str) -> None:
    """On a CPU the bits are the same; elsewhere two processes may choose other kernels."""
    difference = np.abs(np.asarray(stored, np.int16) - np.asarray(picture, np.int16)).mean()
    if difference > (0 if device == "cpu" else WRONG_PICTURE):
        raise RuntimeError(f"the served picture is not the pipeline's: {difference:.2f} levels of 255 in the mean")


def ask(
    client: httpx.Client, application: Served, arguments: dict[str, Any], seed: int
) -> tuple[dict[str, float], Image.Image]:
    """The parts of one request, and its stored picture."""
    body = {"prompt": PROMPT, "size": f"{arguments['width']}x{arguments['height']}", "seed": seed}
    body |= {"num_inference_steps": arguments["num_inference_steps"], "deterministic": True, "response_format": "url"}
    started = time.perf_counter()
    answer = client.post(f"{application.url}/v1/images/generations", json=body)
    client_s = time.perf_counter() - started
    answer.raise_for_status()
    url = answer.json()["data"][0]["url"]
    stored = Image.open(io.BytesIO(client.get(url).raise_for_status().content))
    line = application.lines("requests.jsonl")[-1]
    if line["request_id"] not in url:
        raise RuntimeError("the last line of the log is of another request")
    if len(line["stages"]) > 3:  # the first of its kind was also encoded in small; it is a warm-up
        return {}, stored
    return attribute(client_s, answer.headers["server-timing"], line), stored


def seconds_of_upload(storage: S3Storage, data: bytes, name: str) -> float:
    """From this process, with the same client."""
    request = GenerationRequest(name, "alone", {}, 0, OutputFormat("image", "png"))
    started = time.perf_counter()
    asyncio.run(storage.store(object_key(request, 0, "image/png"), data, "image/png", {}))
    return time.perf_counter() - started


def as_markdown(result: dict[str, Any]) -> list[str]:
    lines = [
        f"# Where the milliseconds go ({result['config']}, S3, one thread, load average "
        f"{result['machine']['load_average'][0]:.1f})",
        "",
        "`python -m benchmarks.stages`: one request at a time, by turns with the unsplit pipeline in this process. "
        "The parts are means of the middle half of the requests by their whole time, so that they add up; the ratios "
        "are medians of those of neighbours. Compute alone is the sum of the pipeline's components (text encoders, "
        "forwards, decoding) and of writing the file: the floor. A hop or transfer is from the end of one side to the "
        "begin of the other, bytes included.",
    ]
    for row in result["rows"]:
        kinds = ", ".join(f"{kind} {ms(seconds)}" for kind, seconds in row["kinds_s"].items())
        lines += [
            "",
            f"## {row['steps']} steps, {row['requests']} requests",
            "",
            f"Served {ms(row['served_s'])} ms, in process {ms(row['in_process_s'])} ms, compute alone "
            f"{ms(row['compute_alone_s'])} ms: **{row['ratio_to_compute_alone']:.3f}** times the floor, "
            f"{row['ratio_to_in_process']:.3f} times the pipeline in process. By kind (ms): {kinds}. "
            f"The same upload from this process: {ms(row['upload_alone_s'])} ms.",
            "",
            *as_table(row),
        ]
    return lines


if __name__ == "__main__":
    main()
