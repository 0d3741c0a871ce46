"""Two cards: a forward on two ranks against one card, what is sent for it, the same bytes after the death of a rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import torch

from benchmarks.first_look.part import Findings, Setting

WAYS = ("ulysses", "batch")
MOST = 0.05  # deviation from one card, of the largest value: the cap of ranks in bfloat16
BOX_S = 140.0  # of each group; of three, all with the weights of FLUX.1
NUM_RANKS = 2


def look(setting: Setting) -> Findings:
    """Each group in a process of its own: where a rank dies, NCCL may take the others along."""
    findings = Findings()
    have = NUM_RANKS if setting.device.type == "cpu" else torch.cuda.device_count()
    findings.refuse_unless(have >= NUM_RANKS, f"it needs {NUM_RANKS} cards, and torch sees {have} here")
    if findings.wrong:
        return findings
    for way in WAYS:
        made = made_by_group(setting, way, kill=way == "ulysses")
        findings.figures[way] = made
        if made.get("error"):
            findings.refuse_unless(False, f"{way}: {made['error']}")
            return findings
        findings.lines.append(
            f"{way} of 2: {1000 * made['seconds']:.1f} ms a forward, one card {1000 * made['alone_s']:.1f} ms; "
            f"{made['sent'] / 1e6:.2f} MB sent; deviation {made['deviation']:.1e}"
        )
        findings.refuse_unless(made["by_ranks"], f"{way}: rank 0 made the forward alone: see the error stream")
        findings.refuse_unless(made["deviation"] <= MOST, f"{way} deviates by {made['deviation']:.1e} from one card")
        findings.refuse_unless(made["same_bytes"], f"{way} made other bytes the second time")
    if not findings.wrong:
        again = made_by_group(setting, "ulysses", kill=False)
        findings.figures["again"] = again
        findings.lines.append(f"rank 1 killed within a forward: {findings.figures['ulysses']['ended']}")
        same = again.get("digest") == findings.figures["ulysses"]["digest"]
        findings.refuse_unless(same, f"after the death of a rank the next group made other bytes: {again}")
    return findings


def made_by_group(setting: Setting, way: str, kill: bool) -> dict[str, Any]:
    """What `rank_0` tells; with `error` where it did not."""
    command = [sys.executable, "-m", f"{__name__}.rank_0", way, str(int(kill)), *words_of(setting)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(0), text=True, start_new_session=True)
    try:
        told, _ = process.communicate(timeout=BOX_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        told, _ = process.communicate()
    lines = told.splitlines()
    if not lines:
        return {"error": f"its process ended with the status {process.returncode} and told nothing"}
    made: dict[str, Any] = json.loads(lines[0])
    if kill:  # the second line comes after the death
        ended = json.loads(lines[1])["ended"] if len(lines) > 1 else None
        made["ended"] = ended or f"its process ended with the status {process.returncode}, as Serve would see it"
    return made


def words_of(setting: Setting) -> list[str]:
    return [setting.device.type, "small" if setting.is_small else "full"]


def environment(rank: int) -> dict[str, str]:
    """Of the process of a rank, which sees its own card alone, as Ray has it."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = seen.split(",") if seen else [str(number) for number in range(NUM_RANKS)]
    return {**os.environ, "CUDA_VISIBLE_DEVICES": cards[rank].strip() if rank < len(cards) else ""}
