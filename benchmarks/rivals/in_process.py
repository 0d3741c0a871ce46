"""diffusers with nothing around it: one process with one pipeline, which makes one picture after another.

    python -m benchmarks.rivals.in_process MODEL DEVICE

Reads a request per line from standard input, a JSON object with the arguments of `generate`, and writes the PNG file
as a line of base64. A pipeline must not be called by two threads at once (they would share its scheduler), so
concurrent callers wait for each other. Threads of arithmetic: OMP_NUM_THREADS.
"""

import base64
import io
import json
import sys
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image


def main() -> None:
    pipeline = load(sys.argv[1], sys.argv[2])
    print("ready", flush=True)
    for line in sys.stdin:
        print(base64.b64encode(png_of(generate(pipeline, **json.loads(line)))).decode(), flush=True)


def load(model: str, device: str) -> Any:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    pipeline = DiffusionPipeline.from_pretrained(model, local_files_only=True, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, prompt: str, seed: int, side: int, steps: int, text_tokens: int) -> Image.Image:
    """A picture of `side` x `side` pixels; the only call of a pipeline in all the rivals."""
    output = pipeline(
        prompt,
        height=side,
        width=side,
        num_inference_steps=steps,
        max_sequence_length=text_tokens,
        generator=torch.Generator("cpu").manual_seed(seed),
    )
    picture: Image.Image = output.images[0]
    return picture


def png_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
