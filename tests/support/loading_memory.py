"""Load a component in a process of its own, as test_loading_memory.py asks, and tell the peak of the host's memory.

    python -m tests.support.loading_memory denoiser|encoder FOLDER streamed|mapped [HOST_BYTES]

The denoiser goes to the meta device, which takes nothing, tensor by tensor, each in the time of a copy to a GPU.
The encoder stays on the CPU. Only anonymous memory counts: mapped pages of files are the kernel's to drop.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import T5EncoderModel

from deployments.weights import stream
from deployments.weights.files import DIFFUSERS_FILES, weight_files
from deployments.weights.load import load_component
from deployments.weights.reading.mapped import map_tensors

COPY_S = 0.01  # a weight of 16 MiB to a busy GPU


def main(kind: str, folder: Path, way: str, host_bytes: int | None = None) -> None:
    stream.HOST_BYTES = host_bytes or stream.HOST_BYTES
    memory = Memory()
    started = time.perf_counter()
    kept = (send_away if kind == "denoiser" else load_encoder)(folder, way == "streamed")
    report = {"seconds": time.perf_counter() - started, "peak": memory.peak(), "at_the_end": memory.grown()}
    print(
        json.dumps(report | {"file": sum(f.stat().st_size for f in folder.glob("*.safetensors")), "kept": bool(kept)})
    )


def send_away(folder: Path, is_streamed: bool) -> Any:
    tensors = stream.stream_tensors if is_streamed else map_tensors
    for _, tensor in tensors(weight_files(DIFFUSERS_FILES, folder), False):
        tensor.sum()  # every page is read, as by a copy
        tensor.to("meta")
        time.sleep(COPY_S)
    return True


def load_encoder(folder: Path, is_streamed: bool) -> Any:
    return load_component(T5EncoderModel, folder, torch.bfloat16, "cpu", is_streamed)


class Memory:
    """The growth of this process's anonymous memory, looked at every few milliseconds."""

    def __init__(self) -> None:
        self._start = self._peak = anonymous_bytes()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, anonymous_bytes())
            time.sleep(0.003)

    def peak(self) -> int:
        return self._peak - self._start

    def grown(self) -> int:
        return anonymous_bytes() - self._start


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:]))
