"""Groups of ranks without Ray: rank 0 is the test's own process, the others are processes beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.executor import LocalExecutor
from deployments.model import ModelArgs
from deployments.ranks.args import ParallelArgs
from deployments.ranks.executor import RanksExecutor
from deployments.ranks.group import RankGroup
from deployments.ranks.member import Built, serve_rank
from deployments.ranks.place import Place
from deployments.stage_pipeline.sessions.denoise import call_directly
from deployments.stages.ranks.denoiser_rank import serve_denoiser_rank
from env_config.variables import EnvConfig
from tests.support.engine_parity import Stages
from tests.support.forked import forked_context
from tests.support.tiny_models import tiny_patches


class RankBeside:
    """A RankProcess: `run` and its arguments in a process of this machine."""

    def __init__(self, run: Callable[..., None], *args: Any) -> None:
        self.process = forked_context().Process(target=run, args=args, daemon=True)
        self.process.start()

    def end_reason(self) -> str | None:
        return None if self.process.exitcode is None else f"exit code {self.process.exitcode}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_denoiser_rank(place: Place, model: ModelArgs, variables: dict[str, str]) -> None:
    torch.set_num_threads(1)
    tiny_patches()
    serve_denoiser_rank(place, model, EnvConfig.from_environ({"SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"} | variables))


@contextmanager
def stages_on_ranks(
    folder: Path,
    parallel: dict[str, Any],
    model: dict[str, Any] | None = None,
    variables: dict[str, str] | None = None,
    run: Callable[..., None] = run_denoiser_rank,
    **denoising: Any,
) -> Iterator[Stages]:
    """An encoder stage, and a denoiser stage whose forwards ranks make; `model`: further ModelArgs; `run`: a rank."""
    args = ParallelArgs(**parallel)
    served = ModelArgs(path=str(folder), name=folder.name, parallel=args, **model or {})
    group = RankGroup(args, lambda place: RankBeside(run, place, served, variables or {}))
    stages = None
    try:
        precision = served.precision if isinstance(served.precision, str) else None
        stages = Stages(folder, variables, precision=precision, ranks=group, **denoising)
        yield stages
    finally:
        group.close()
        if stages is not None:
            stages.close()


def run_toy_rank(place: Place, build: Callable[[], torch.nn.Module]) -> None:
    torch.set_num_threads(1)
    serve_rank(place, lambda: Built({"toy": build()}, torch.device("cpu"), call_directly, lambda: None))


@contextmanager
def toy_on_ranks(build: Callable[[], torch.nn.Module], **parallel: Any) -> Iterator[tuple[RankGroup, RanksExecutor]]:
    """A module named toy on ranks, with samples along the first axis of `x` and of what it returns."""
    args = ParallelArgs(**parallel)
    group = RankGroup(args, lambda place: RankBeside(run_toy_rank, place, build))
    modules = {"toy": build()}
    try:
        group.open(modules, torch.device("cpu"))
        yield group, RanksExecutor(group, LocalExecutor(call_directly), modules, lambda component: TOY_AXES)
    finally:
        group.close()


TOY_AXES = BatchAxes({("x",): 0}, {(): 0})
