"""Checkpoints are copies; those that are not this request's are refused; they are made as often as they are cheap."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.denoising import checkpoint as checkpoint_module
from deployments.denoising.checkpoint import CheckpointInterval, digest, make_checkpoint
from deployments.errors import CannotResumeError
from deployments.messages import Checkpoint, GenerationRequest, Packed
from deployments.tensors.packing import pack, unpack
from tests.support.engine_parity import CACHE_DIT, CACHED_STEPS, Stages, assert_same_bits
from tests.support.further import all_but
from tests.support.tiny_models import checkpoint as checkpoint_folder

STEPS = 6


@pytest.fixture(scope="module")
def stages(checkpoints_root: Path) -> Iterator[Stages]:
    stages = Stages(checkpoint_folder("flux", checkpoints_root))
    yield stages
    stages.close()


@pytest.fixture(scope="module")
def request_(stages: Stages) -> GenerationRequest:
    return stages.request(0, deterministic=True, steps=STEPS)


@pytest.fixture(scope="module")
def half(stages: Stages, request_: GenerationRequest) -> Checkpoint:
    return stages.alone(request_)[1][STEPS // 2]


def resume(stages: Stages, request: GenerationRequest, checkpoint: Checkpoint) -> int:
    """The step that it went on from."""
    _, denoising = stages.denoiser.denoise(request, stages.encode(request), checkpoint)
    return denoising.session.resumed_at


def damaged(half: Checkpoint) -> Checkpoint:
    buffers = [buffer.copy() for buffer in half.content.buffers]
    largest = max(buffers, key=len)
    largest[len(largest) // 2] ^= 1
    return dataclasses.replace(half, content=dataclasses.replace(half.content, buffers=tuple(buffers)))


def with_another_tree(half: Checkpoint) -> Checkpoint:
    tree: Any = half.content.tree
    return dataclasses.replace(half, content=dataclasses.replace(half.content, tree={**tree, "names": []}))


def cut_off(half: Checkpoint) -> Checkpoint:
    buffers = (*half.content.buffers[:-1], np.empty(0, np.uint8))
    return dataclasses.replace(half, content=dataclasses.replace(half.content, buffers=buffers))


@pytest.mark.parametrize("damage", [damaged, with_another_tree, cut_off])
def test_a_damaged_checkpoint_is_refused(
    damage: Callable[[Checkpoint], Checkpoint], stages: Stages, request_: GenerationRequest, half: Checkpoint
) -> None:
    resume(stages, request_, half)
    with pytest.raises(CannotResumeError, match="damaged"):
        resume(stages, request_, damage(half))


UNREADABLE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda saved: {},
    "a list": lambda saved: [1, 2],
    "no schedulers": lambda saved: {**saved, "schedulers": []},
    "rounds of another loop": lambda saved: {**saved, "rounds": [(7, 7)]},
    "no outputs": lambda saved: {**saved, "outputs": [(1, [], None)]},
    "descriptions of another model": lambda saved: {**saved, "descriptions": [], "forwards": []},
}


@pytest.mark.parametrize("content", UNREADABLE)
def test_a_checkpoint_whose_content_does_not_fit_means_start_again(
    content: str, stages: Stages, request_: GenerationRequest, half: Checkpoint
) -> None:
    packed = pack(UNREADABLE[content](unpack(half.content, torch.device("cpu"))))
    with pytest.raises(CannotResumeError):
        resume(stages, request_, make_checkpoint(request_, half.fingerprint, half.step, packed))


def test_an_unknown_kind_in_a_checkpoint_means_start_again(
    stages: Stages, request_: GenerationRequest, half: Checkpoint
) -> None:
    packed = Packed({"kind": "of a later version"}, half.content.buffers)
    with pytest.raises(CannotResumeError, match="cannot be read"):
        resume(stages, request_, make_checkpoint(request_, half.fingerprint, half.step, packed))


# Schedulers that keep what they have seen, and add to it in place.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "UniPCMultistepScheduler": {"solver_order": 3},
    "HeunDiscreteScheduler": {},
}


@pytest.fixture(scope="module")
def unet_folder(checkpoints_root: Path) -> Path:
    return checkpoint_folder("sd15", checkpoints_root)


@pytest.mark.parametrize("scheduler", all_but(["UniPCMultistepScheduler"], SCHEDULERS))
def test_each_checkpoint_stays_as_it_was_made_and_leads_to_the_same_bytes(
    scheduler: str, unet_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sd15"
    shutil.copytree(unet_folder, folder)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    config = {"_class_name": scheduler, **betas, **SCHEDULERS[scheduler]}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", scheduler]}))
    stages = Stages(folder)
    request = stages.request(0, deterministic=True, steps=4)
    truth, made = stages.alone(request)
    assert len(made) >= 3
    assert [digest(each.content) == each.digest for each in made] == [True] * len(made)
    for each in made:
        inputs, run = stages.denoiser.denoise(request, stages.encode(request), each)
        assert run.session.resumed_at == each.step
        assert_same_bits(stages.numbers(inputs), truth)
    stages.close()


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 5},
    "number of steps": {"num_inference_steps": STEPS + 1},
    "prompt": {"prompt": "another cat"},
    "guidance": {"guidance_scale": 7.0},
    "caching": {"features": {"cache_dit": {"enable": True}}},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_checkpoint_of_another_request_is_refused(
    changed: str, stages: Stages, request_: GenerationRequest, half: Checkpoint
) -> None:
    change = CHANGES[changed]
    own = {name: value for name, value in change.items() if name in ("seed", "features")}
    arguments = request_.arguments | {name: value for name, value in change.items() if name not in own}
    other = dataclasses.replace(request_, arguments=arguments, **own)
    with pytest.raises(CannotResumeError, match="another model, version or request"):
        resume(stages, other, half)


def test_the_name_of_a_request_does_not_bind_its_checkpoint(
    stages: Stages, request_: GenerationRequest, half: Checkpoint
) -> None:
    other = dataclasses.replace(request_, request_id="a second attempt")
    assert resume(stages, other, half) == half.step


@pytest.mark.parametrize(
    "variables",
    [{"SGLANG_CACHE_DIT_ENABLED": "true"}, {"SGLANG_CACHE_DIT_ENABLED": "true", "SGLANG_CACHE_DIT_RDT": "0.5"}],
)
def test_a_checkpoint_of_a_replica_with_other_settings_is_refused(
    variables: dict[str, str], stages: Stages, request_: GenerationRequest, half: Checkpoint
) -> None:
    others = Stages(stages.stage.layout.folder, variables)
    with pytest.raises(CannotResumeError, match="other settings"):
        resume(others, request_, half)
    others.close()


def test_a_checkpoint_of_other_weights_is_refused(
    stages: Stages, request_: GenerationRequest, half: Checkpoint, tmp_path: Path
) -> None:
    folder = tmp_path / "flux"
    shutil.copytree(stages.stage.layout.folder, folder)
    [weights] = (folder / "transformer").glob("*.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    others = Stages(folder)
    with pytest.raises(CannotResumeError, match="another model"):
        others.denoiser.denoise(request_, stages.encode(request_), half)
    others.close()


def test_a_checkpoint_takes_a_few_latents(half: Checkpoint, stages: Stages, request_: GenerationRequest) -> None:
    [latents] = stages.plain(request_)
    one = latents.numel() * latents.element_size()
    generators_bytes = 2 * 5056  # the states of the request's generator and of the global one
    assert half.content.num_bytes <= 3 * one + 2 * generators_bytes + 4096


@pytest.mark.parametrize(
    ("checkpoint_s", "step_s", "expected"),
    [(0.001, 1.0, 1), (0.009, 1.0, 1), (0.011, 1.0, 2), (0.1, 1.0, 10), (0.0999, 0.02, 500), (0.0, 1.0, 1)],
)
def test_checkpoints_are_as_frequent_as_one_percent_of_the_time_allows(
    checkpoint_s: float, step_s: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(checkpoint_module.time, "perf_counter", lambda: clock[0])
    interval = CheckpointInterval(None)
    clock[0] += 4 * step_s
    interval.note(checkpoint_s, 4)
    due = [steps for steps in range(1, expected + 2) if interval.is_due(steps)]
    assert due == [expected, expected + 1]
    assert checkpoint_s / (expected * step_s) <= 0.01 + 1e-9


def test_the_first_checkpoint_whose_cost_nobody_knows_waits_until_it_can_be_afforded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr(checkpoint_module.time, "perf_counter", lambda: clock[0])
    interval = CheckpointInterval(None)
    clock[0] += 0.9 * checkpoint_module.FIRST_AFTER_S
    assert not interval.is_due(5)
    clock[0] += 0.2 * checkpoint_module.FIRST_AFTER_S
    assert interval.is_due(6)


def test_a_given_interval_is_kept_whatever_checkpoints_cost() -> None:
    interval = CheckpointInterval(3)
    interval.note(100.0, 1)
    assert [steps for steps in range(1, 5) if interval.is_due(steps)] == [3, 4]


def test_the_given_interval_is_that_of_the_checkpoints_made(stages: Stages) -> None:
    request = stages.request(0, deterministic=True, steps=7)
    every_second = Stages(stages.stage.layout.folder, checkpoint_every=2)
    assert [made.step for made in every_second.alone(request)[1]] == [2, 4, 6]
    every_second.close()


def test_none_is_due_while_the_last_is_on_its_way_unless_an_interval_is_given() -> None:
    cheap, given = CheckpointInterval(None), CheckpointInterval(1)
    for interval in (cheap, given):
        interval.note(0.0, 1)
        interval.begin()
    assert (cheap.is_due(5), given.is_due(5)) == (False, True)
    cheap.note(0.0, 1)
    assert cheap.is_due(5)


def test_checkpoints_are_packed_and_digested_in_another_thread_than_the_engines(
    stages: Stages, request_: GenerationRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[str] = set()

    def packed(value: Any) -> Packed:
        threads.add(threading.current_thread().name)
        return pack(value)

    monkeypatch.setattr(checkpoint_module, "pack", packed)
    monkeypatch.setattr(checkpoint_module, "digest", lambda content: threads.add(threading.current_thread().name))
    assert len(stages.alone(request_)[1]) == STEPS - 1
    assert threads
    assert all(name.startswith("sender") for name in threads)


def test_a_cache_without_room_in_the_checkpoint_warms_up_again_and_the_answer_says_so(stages: Stages) -> None:
    small = Stages(stages.stage.layout.folder, CACHE_DIT, max_checkpoint_cache_bytes=1000)
    whole = Stages(stages.stage.layout.folder, CACHE_DIT)
    request = small.request(0, deterministic=False, steps=CACHED_STEPS)
    half, full = (each.alone(request)[1][CACHED_STEPS // 2] for each in (small, whole))
    assert full.content.num_bytes - half.content.num_bytes >= 4 * 2048, "hidden states"
    inputs, run = small.denoiser.denoise(request, small.encode(request), half)
    assert [warning.code for warning in inputs.warnings] == ["cache_lost"]
    assert run.session.resumed_at == half.step
    numbers = small.denoiser.recent_summaries["cache_dit"][-1]["transformer"]
    assert numbers["computed_steps"] >= 2, "it warms up"
    assert numbers["computed_steps"] + numbers["reused_steps"] == CACHED_STEPS - half.step
    inputs, _ = whole.denoiser.denoise(request, whole.encode(request), full)
    assert inputs.warnings == ()
    small.close()
    whole.close()


def test_a_deterministic_request_whose_cache_has_no_room_has_no_checkpoint_and_starts_again(stages: Stages) -> None:
    small = Stages(stages.stage.layout.folder, CACHE_DIT, max_checkpoint_cache_bytes=0)
    _, made = small.alone(small.request(0, deterministic=True, steps=4))
    assert made == []
    small.close()
