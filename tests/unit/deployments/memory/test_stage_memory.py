"""Work that finds too little memory is tried once more with what was freed; then callers are told what they can do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.errors import DeviceFullError, TooLargeForDeviceError
from deployments.memory.device_memory import Room
from deployments.memory.stage_memory import StageMemory

FULL = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
GB = 10**9


class Played:
    """A device that tells what the test says; it notes when memory was given back."""

    def __init__(self, free: int = 2 * GB, most: int = 10 * GB) -> None:
        self.free, self.most = free, most
        self.given_back = 0

    def room(self) -> Room:
        return Room(self.free, self.most)

    def give_back(self) -> None:
        self.given_back += 1


def failing(times: int, memory: StageMemory, error: Exception = FULL) -> tuple[Callable[[], str], list[bool]]:
    """Work that finds too little memory so often, and whether each try was to be made with less."""
    tries: list[bool] = []

    def work() -> str:
        tries.append(memory.is_short)
        if len(tries) <= times:
            raise error
        return "made"

    return work, tries


def test_a_lack_of_memory_is_answered_by_freeing_it_and_trying_once_more_with_less() -> None:
    device = Played()
    memory = StageMemory(device)
    work, tries = failing(1, memory)
    assert memory.run(work) == "made"
    assert (tries, device.given_back, memory.is_short) == ([False, True], 1, False)


@pytest.mark.parametrize("is_tried_again", [True, False])
def test_what_is_kept_for_requests_to_come_goes_before_anything_is_refused(is_tried_again: bool) -> None:
    device = Played(free=1 * GB)
    memory = StageMemory(device)
    given: list[tuple[int, float]] = []

    def let_go() -> None:
        given.append((device.given_back, device.free))
        device.free = 2 * GB

    memory.when_lacking(let_go)
    work, _ = failing(2, memory)
    with pytest.raises(DeviceFullError, match=r"has 2\.0 GB free"):
        (memory.run if is_tried_again else memory.named)(work)
    assert given[0] == (0, 1 * GB), "first that, and then what the allocator holds"
    given.clear()
    assert memory.run(failing(0, memory)[0]) == "made"
    memory.give_back()
    assert not given, "it stays while memory is not lacking"


def test_what_the_failed_try_made_is_gone_before_the_next_one() -> None:
    """Red where the second try runs inside the `except` block, whose traceback holds the frames of the first."""
    memory, made = StageMemory(Played()), []

    def work() -> int:
        alive = sum(each() is not None for each in made)
        activations = torch.zeros(8)
        made.append(weakref.ref(activations))
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return alive

    assert memory.run(work) == 0


def test_work_inside_work_that_is_done_again_is_made_with_less_too() -> None:
    memory = StageMemory(Played())
    inner: list[bool] = []

    def work() -> str:
        memory.run(lambda: inner.append(memory.is_short))
        if len(inner) == 1:
            raise FULL
        return "made"

    assert (memory.run(work), inner, memory.is_short) == ("made", [False, True], False)


def test_steady_work_is_tried_again_as_it_was() -> None:
    for memory, is_steady in ((StageMemory(Played()), True), (StageMemory(Played(), is_steady=True), False)):
        work, tries = failing(1, memory)
        assert memory.run(work, is_steady=is_steady) == "made"
        assert tries == [False, False]


def test_steady_work_may_take_what_the_device_has_beside_the_weights_whoever_else_is_there() -> None:
    memory = StageMemory(Played(), weight_bytes=3 * GB)
    seen: list[Any] = []
    memory.run(lambda: seen.append(memory.available()), is_steady=True)
    assert (seen, memory.available()) == ([7 * GB], 2 * GB)


def test_a_device_that_is_full_of_other_work_is_to_be_asked_again_later() -> None:
    memory = StageMemory(Played())
    work, _ = failing(2, memory)
    with pytest.raises(DeviceFullError, match=r"the device has 2\.0 GB free, .* try again later"):
        memory.run(work)


def test_what_can_never_fit_is_the_callers_to_change() -> None:
    memory = StageMemory(Played(), weight_bytes=4 * GB)

    def work() -> None:
        memory.note_need(lambda: 7 * GB)
        raise FULL

    with pytest.raises(TooLargeForDeviceError, match=r"needs 7\.0 GB on the device, which has 6\.0 GB .* smaller one"):
        memory.run(work)


def test_what_fails_with_all_the_memory_there_is_can_never_fit() -> None:
    memory = StageMemory(Played(free=9_900_000_000))
    work, _ = failing(2, memory)
    with pytest.raises(TooLargeForDeviceError, match=r"needs more memory on the device, which has 10\.0 GB"):
        memory.run(work)


def test_memory_that_others_had_at_one_of_the_failures_is_no_sign_that_it_never_fits() -> None:
    device = Played(free=9_900_000_000)
    memory = StageMemory(device)

    def work() -> None:
        device.free = 1 * GB if not memory.is_short else 9_900_000_000
        raise FULL

    with pytest.raises(DeviceFullError):
        memory.run(work)


def test_a_device_that_tells_nothing_is_to_be_asked_again_later() -> None:
    memory = StageMemory()
    work, tries = failing(2, memory, MemoryError())
    with pytest.raises(DeviceFullError, match="try again later"):
        memory.run(work)
    assert (tries, memory.available()) == ([False, True], None)


def test_any_other_error_is_raised_as_it_is_without_another_try() -> None:
    memory = StageMemory(Played())
    work, tries = failing(1, memory, RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        memory.run(work)
    assert tries == [False]


def test_what_is_only_named_is_not_tried_again() -> None:
    memory = StageMemory(Played())
    work, tries = failing(1, memory)
    with pytest.raises(DeviceFullError):
        memory.named(work)
    assert tries == [False]
    assert memory.named(work) == "made"
