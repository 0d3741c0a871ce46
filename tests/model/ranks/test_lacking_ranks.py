"""A rank that lacks memory while the others compute: the group ends soon, and the next one begins with less."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deployments.errors import ReplicaUnfitError
from deployments.model import ModelArgs
from deployments.ranks.executor import RanksExecutor
from deployments.ranks.loss.lack import DEATHS, Lack, with_another
from deployments.ranks.place import Place
from deployments.stages.ranks import denoiser_rank
from tests.support.engine_parity import Stages, deviation
from tests.support.ranks import modules_on_ranks, run_denoiser_rank, stages_on_ranks
from tests.support.split_modules import flux, of_flux
from tests.support.tiny_models import checkpoint

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

LONG_S = 100.0  # of a collective: far beyond what the end of a group may take


class Record:
    """Of groups in this process."""

    def __init__(self, *lacks: Lack) -> None:
        self.lacks: Sequence[Lack] = lacks

    def known(self) -> Sequence[Lack]:
        return self.lacks

    def add(self, lack: Lack) -> None:
        self.lacks = with_another(self.lacks, lack)


def lack_memory_for_two(module: torch.nn.Module) -> torch.nn.Module:
    """In the middle of a forward, on one rank only."""

    def check(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if dist.get_rank() == 1 and len(kwargs["hidden_states"]) > 1:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")

    module.get_submodule("transformer_blocks.0").register_forward_pre_hook(check, with_kwargs=True)
    return module


def lacking_flux() -> torch.nn.Module:
    return lack_memory_for_two(flux())


def samples(number: int) -> dict[str, Any]:
    shared = ("img_ids", "txt_ids")
    one = of_flux(16, 8)
    return {n: v if n in shared else torch.cat([v] * number) for n, v in one.items()} | {"return_dict": False}


@torch.no_grad()
def run(executor: RanksExecutor, number: int) -> Any:
    return executor.run("flux", executor._modules["flux"], None, samples(number))


def test_the_group_ends_soon_by_name_and_the_next_one_knows_of_it() -> None:
    record, settings = Record(), {"ulysses": 2, "collective_timeout_s": LONG_S}
    with modules_on_ranks({"flux": lacking_flux}, None, record=record, **settings) as (group, executor):
        run(executor, 1)
        began = time.monotonic()
        with pytest.raises(ReplicaUnfitError, match=r"2 samples of 16x4 in flux: rank 1: .* 2 GiB"):
            run(executor, 2)
        assert time.monotonic() - began < LONG_S
        assert group.lost is not None
    assert record.lacks == (Lack("flux", "16x4", 2, deaths=1),)


@pytest.mark.rest
def test_what_ended_several_groups_one_after_another_is_refused() -> None:
    record = Record(Lack("flux", "16x4", 2, DEATHS))
    with modules_on_ranks({"flux": lacking_flux}, None, record=record, ulysses=2) as (group, executor):
        with pytest.raises(torch.OutOfMemoryError, match="2 groups of ranks ended by 2 samples of 16x4 in flux"):
            run(executor, 2)
        run(executor, 1)
        assert group.lost is None


def run_lacking_rank(place: Place, model: ModelArgs, variables: dict[str, str]) -> None:
    real = denoiser_rank.build_stage

    def lacking(*args: Any, **kwargs: Any) -> Any:
        stage = real(*args, **kwargs)
        lack_memory_for_two(stage.components["transformer"])
        return stage

    setattr(denoiser_rank, "build_stage", lacking)  # noqa: B010  (of a process of its own)
    run_denoiser_rank(place, model, variables)


@pytest.mark.rest
def test_requests_that_end_a_group_by_their_batch_end_well_on_the_next(checkpoints_root: Path) -> None:
    folder, record = checkpoint("flux", checkpoints_root), Record()
    before = Stages(folder)
    requests = [before.request(index, deterministic=False, steps=4) for index in range(2)]
    truths = [before.plain(request) for request in requests]
    before.close()
    settings = {"ulysses": 2, "collective_timeout_s": LONG_S}
    with (
        stages_on_ranks(folder, settings, run=run_lacking_rank, record=record) as stages,
        pytest.raises(ReplicaUnfitError, match="2 samples"),
    ):
        stages.together(requests)
    with stages_on_ranks(folder, settings, run=run_lacking_rank, record=record) as stages:
        for _ in range(2):
            for numbers, truth in zip(stages.together(requests), truths, strict=True):
                assert deviation(numbers, truth) <= 2e-5
        assert stages.denoiser.engine.statistics.merged == 0
