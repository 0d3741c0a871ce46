"""Rank 0 of a group of two: `python -m ...two_cards.rank_0 WAY KILL DEVICE small|full`; tells lines of JSON."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.first_look.models import flux_inputs, flux_transformer
from benchmarks.first_look.part import Setting, deviations, seconds
from benchmarks.first_look.parts.two_cards import environment, words_of
from deployments.engine.batching.axes import BatchAxes
from deployments.engine.executor import LocalExecutor
from deployments.errors import ReplicaUnfitError
from deployments.ranks.args import ParallelArgs
from deployments.ranks.channel import message_of
from deployments.ranks.executor import RanksExecutor, Split
from deployments.ranks.group import RankGroup
from deployments.ranks.place import Place, StartRank
from deployments.stage_pipeline.sessions.denoise import call_directly

BY_SAMPLE = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance")
AXES = BatchAxes({(name,): 0 for name in BY_SAMPLE}, {(0,): 0})
AFTER_S = 0.02  # into a forward; later forwards follow until it is noticed
FORWARDS_MOST = 500  # in which the death of a rank must be noticed


class RankProcess:
    """Of the interface of that name."""

    def __init__(self, place: Place, setting: Setting) -> None:
        told = json.dumps(asdict(place) | {"args": place.args.model_dump()})
        command = [sys.executable, "-m", "benchmarks.first_look.parts.two_cards.rank_1", told, *words_of(setting)]
        self._process = subprocess.Popen(command, stdout=sys.stderr, env=environment(place.rank))

    def end_reason(self) -> str | None:
        code = self._process.poll()
        return None if code is None else f"its status is {code}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the error stream from now on
    way, kill, device, size = sys.argv[1:]
    setting = Setting(torch.device(device), size == "small")
    torch.set_num_threads(1 if setting.is_small else torch.get_num_threads())
    for told in made(setting, way, kill == "1", lambda place: RankProcess(place, setting)):
        answer.write(json.dumps(told) + "\n")
        answer.flush()


@torch.no_grad()
def made(setting: Setting, way: str, kill: bool, start: StartRank) -> Iterator[dict[str, Any]]:
    """The figures of one group; with `kill` another line, of how it ended."""
    group = RankGroup(ParallelArgs(**{way: 2}), start)  # the other rank loads meanwhile
    try:
        module = flux_transformer(setting)
        inputs = flux_inputs(setting, module, setting.pick(1024, 64), 2 if way == "batch" else 1)
        alone_s = seconds(setting, lambda: module(**inputs))
        alone = module(**inputs)[0].cpu()
        group.open({"flux": module}, setting.device)
        executor = RanksExecutor(group, LocalExecutor(call_directly), {"flux": module}, lambda component: AXES)

        def forward() -> torch.Tensor:
            output: torch.Tensor = executor.run("flux", module, None, inputs)[0]
            return output

        first = forward().cpu()
        yield {
            "alone_s": alone_s,
            "seconds": seconds(setting, forward),
            "sent": bytes_of_forward(module, inputs, group.args.batch),
            "deviation": deviations(first, alone)[0],
            "by_ranks": any(each is not None for each in executor._ways.values()),
            "same_bytes": torch.equal(forward().cpu(), first),
            "digest": digest(first),
        }
        if kill:
            yield {"ended": ended_by_death(group, forward)}
    finally:
        group.close()


def ended_by_death(group: RankGroup, forward: Any) -> str:
    """Kills rank 1 within a forward; how rank 0 noticed."""
    timer = threading.Timer(AFTER_S, group.processes[1].kill)
    timer.start()
    try:
        for number in range(FORWARDS_MOST):
            try:
                forward()
            except ReplicaUnfitError as error:
                return f"noticed in forward {number + 1}: {error}".splitlines()[0]
    finally:
        timer.join()
    return f"not noticed in {FORWARDS_MOST} forwards"


def bytes_of_forward(module: torch.nn.Module, inputs: dict[str, Any], num_portions: int) -> int:
    """What the other rank is sent."""
    split = Split("flux", module, None, inputs)
    split.cut(AXES, num_portions)
    message = message_of(split.message(len(split.pieces) - 1) | {"number": 1, "uneven": False, "free": False})
    return sum(part.numel() for part in (*message.parts, message.header.view(torch.uint8)))


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
