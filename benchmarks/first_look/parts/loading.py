"""Part 7: weights from the page cache to the device, mapped and streamed: seconds, and the memory of the host."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.first_look.part import Findings, Setting, gb

SHARDS = 6
SHARD_BYTES = 4_000_000_000
LIMITS = (40_000_000_000, 4_000_000_000)  # bytes that the streamer may keep in the host's memory


def look(setting: Setting) -> Findings:
    findings = Findings()
    size = setting.pick(SHARD_BYTES, 4_000_000)
    with tempfile.TemporaryDirectory(dir=os.environ.get("FIRST_LOOK_FOLDER")) as folder:
        files = [str(Path(folder) / f"{number}.safetensors") for number in range(setting.pick(SHARDS, 2))]
        for file in files:
            save_file({"weight": torch.ones(size // 2, dtype=torch.bfloat16)}, file)
        total = size * len(files)
        ways = [("mapped", {})]
        if find_spec("runai_model_streamer"):
            ways += [(f"streamed, {gb(limit)}", {"RUNAI_STREAMER_MEMORY_LIMIT": str(limit)}) for limit in LIMITS]
        for way, variables in ways:
            command = [sys.executable, "-m", "benchmarks.first_look.parts.loading", way, setting.device.type, *files]
            ended = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
            if ended.returncode:
                findings.refuse_unless(False, f"loading {way} ended with {ended.returncode}: {ended.stderr[-300:]}")
                continue
            took, memory = json.loads(ended.stdout.splitlines()[-1])
            told = f"{gb(total)} {way}: {took:.2f} s, {total / took / 1e9:.1f} GB/s; the host's peak {gb(memory)}"
            findings.note(way, {"s": took, "host_peak": memory}, told)
    return findings


def load(way: str, device: str, files: list[str]) -> None:
    """Prints seconds and the peak of the process's memory beside what it had before."""
    torch.zeros(1, device=device)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held = []
    if way == "mapped":
        held = [load_file(file, device=device) for file in files]
    else:
        from runai_model_streamer import SafetensorsStreamer

        with SafetensorsStreamer() as streamer:
            streamer.stream_files(files)
            held = [{name: tensor.to(device, copy=True)} for name, tensor in streamer.get_tensors()]
    if device == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    assert held
    print(json.dumps([took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024]))


if __name__ == "__main__":
    load(sys.argv[1], sys.argv[2], sys.argv[3:])
