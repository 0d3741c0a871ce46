"""Requests with LoRAs on ranks against one process: each rank puts the same file into its own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.messages import GenerationRequest
from deployments.model import ModelArgs
from deployments.ranks.args import ParallelArgs
from tests.support.engine_parity import assert_same_bits, deviation, handed_over
from tests.support.lora_parity import LoraModel, Used
from tests.support.ranks import group_of
from tests.support.three_stages import ThreeStages

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.timeout(600)]

DEVIATION = 2e-5  # of the largest value, in float32, after all steps
NONE: Used = []
A: Used = [("a", 0.7)]
C: Used = [("c", 0.9)]
OF_ALL_LAYERS: Used = [("b", 0.8)]  # of the one too at which the parts of the sequence are gathered
Numbers = list[torch.Tensor]


@pytest.fixture(scope="module")
def model(checkpoints_root: Path, tmp_path_factory: pytest.TempPathFactory) -> LoraModel:
    return LoraModel("flux", checkpoints_root, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def truths(model: LoraModel) -> dict[str, Numbers]:
    """What one process makes of requests with each of these: before a group is there."""
    stages = model.new_stages()
    try:
        cases = {"none": NONE, "a": A, "c": C, "all layers": OF_ALL_LAYERS}
        made = {name: made_by(stages, model.request(used)) for name, used in cases.items()}
    finally:
        stages.close()
    assert deviation(made["a"], made["none"]) > 100 * DEVIATION, "they show"
    assert deviation(made["c"], made["a"]) > 100 * DEVIATION
    return made


def made_by(stages: ThreeStages, request: GenerationRequest) -> Numbers:
    return handed_over(stages.hand_off(request), stages.held["denoiser"])


@contextmanager
def on_ranks(model: LoraModel, **parallel: int) -> Iterator[ThreeStages]:
    served = ModelArgs(path=str(model.checkpoint), name=model.name, parallel=ParallelArgs(**parallel))
    group = group_of(served)
    stages = None
    try:
        stages = ThreeStages(model.checkpoint, ranks=group)
        yield stages
    finally:
        group.close()
        if stages is not None:
            stages.close()


def kinds(stages: ThreeStages) -> dict[bool, int]:
    """How many kinds of forwards with LoRAs the ranks make, and how many rank 0 makes alone."""
    executor: Any = stages.denoiser.engine.executor
    ways = [way is not None for kind, way in executor._ways.items() if kind[0][-1]]
    return {True: sum(ways), False: len(ways) - sum(ways)}


@pytest.mark.rest
def test_the_sequence_of_requests_with_loras_is_split(model: LoraModel, truths: dict[str, Numbers]) -> None:
    with on_ranks(model, ulysses=2) as stages:
        first = {name: made_by(stages, model.request(used)) for name, used in {"a": A, "c": C, "none": NONE}.items()}
        for name, numbers in first.items():
            assert deviation(numbers, truths[name]) <= DEVIATION, name
        assert kinds(stages) == {True: 2, False: 0}
        for name, used in {"c": C, "a": A}.items():
            assert_same_bits(made_by(stages, model.request(used)), first[name])
        assert deviation(made_by(stages, model.request(OF_ALL_LAYERS)), truths["all layers"]) <= DEVIATION
        assert stages.denoiser.ranks is not None
        assert stages.denoiser.ranks.lost is None


@pytest.mark.rest
def test_samples_of_one_batch_with_other_loras_each_are_split(model: LoraModel, truths: dict[str, Numbers]) -> None:
    with on_ranks(model, batch=2) as stages:
        requests = [model.request(used) for used in (A, NONE, C)]
        for _ in range(2):
            made = stages.hand_off_together(requests)
            for inputs, name in zip(made, ("a", "none", "c"), strict=True):
                assert deviation(handed_over(inputs, stages.held["denoiser"]), truths[name]) <= DEVIATION, name
        assert kinds(stages)[True] > 0
        assert kinds(stages)[False] == 0


@pytest.mark.rest
def test_a_rank_that_cannot_have_a_lora_leaves_its_forwards_to_rank_0(
    model: LoraModel, truths: dict[str, Numbers], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is gone when the other ranks look for it."""
    with on_ranks(model, ulysses=2) as stages:
        request = model.request(A)
        executor: Any = stages.denoiser.engine.executor
        real = executor._adapters.uses

        def uses() -> dict[str, Any]:
            return {name: replace(use, path="/nowhere/a.safetensors") for name, use in real().items()}

        monkeypatch.setattr(executor._adapters, "uses", uses)
        assert_same_bits(made_by(stages, request), truths["a"])
        assert kinds(stages) == {True: 0, False: 0}
        assert deviation(made_by(stages, model.request(NONE)), truths["none"]) <= DEVIATION
