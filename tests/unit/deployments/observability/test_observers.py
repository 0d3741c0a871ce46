"""The observers of a replica: one more is a class and a row, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from deployments.messages import Envelope
from deployments.observability.observer import Kernel, MakeObserver, Observer, Observers, StageWork
from deployments.observability.present_requests import PresentRequests
from deployments.observability.stage_load import StageLoads
from deployments.observability.stage_timing import StageTimer
from deployments.observability.table import OBSERVERS
from tests.support.observing import replica_with, work_on


class Planted(Observer):
    """Writes down all that it is told."""

    def __init__(self, name: str = "planted", seen: list[str] | None = None) -> None:
        self.name = name
        self.seen = [] if seen is None else seen

    def wrap_kernel(self, name: str, kernel: Kernel) -> Kernel:
        self.seen.append(f"{self.name}: kernel {name}")
        return kernel

    def install(self, components: Mapping[str, torch.nn.Module]) -> None:
        self.seen.append(f"{self.name}: components {', '.join(components)}")

    @contextmanager
    def present(self, work: StageWork) -> Iterator[None]:
        self.seen.append(f"{self.name}: came")
        yield
        self.seen.append(f"{self.name}: left")

    @contextmanager
    def around(self, work: StageWork) -> Iterator[None]:
        work.on_step.append(lambda: self.seen.append(f"{self.name}: step"))
        yield
        self.seen.append(f"{self.name}: {work.stage} made {work.bytes_out} bytes in {work.steps} steps")

    def describe(self) -> dict[str, Any]:
        return {self.name: len(self.seen)}

    def recall(self, request_id: str) -> list[dict[str, Any]]:
        return [{"request_id": request_id, "seen": list(self.seen)}]

    def forget(self) -> None:
        self.seen.clear()


def work_through(observers: Observers, work: StageWork) -> None:
    with observers.present(work), observers.around(work):
        work.step()
        work.steps, work.bytes_out = 1, 5


def test_a_planted_observer_is_one_more_row_beside_all_others() -> None:
    planted = Planted()
    observers = Observers(replica_with({}), (*OBSERVERS, lambda replica: planted))
    observers.wrap_kernel("attention", torch.neg)
    observers.install({"vae": torch.nn.Linear(1, 1)})
    work_through(observers, work_on("r", "vae"))
    assert [line.removeprefix("planted: ") for line in planted.seen] == [
        "kernel attention", "components vae", "came", "step", "vae made 5 bytes in 1 steps", "left",
    ]  # fmt: skip
    assert observers.describe()["planted"] == 6
    assert observers.recall("r") == [{"request_id": "r", "seen": planted.seen}]
    assert observers.find(Planted) is planted
    observers.forget()
    assert planted.seen == []


def test_the_first_row_is_entered_first_and_left_last() -> None:
    seen: list[str] = []
    rows: tuple[MakeObserver, ...] = (lambda _: Planted("outer", seen), lambda _: Planted("inner", seen))
    work_through(Observers(replica_with({}), rows), work_on("r", "vae"))
    assert [line.partition(":")[0] for line in seen if "step:" not in line] == [
        "outer", "inner", "outer", "inner", "inner", "outer", "inner", "outer",
    ]  # fmt: skip


def test_an_observer_that_the_variables_do_not_ask_for_is_not_there() -> None:
    with pytest.raises(LookupError, match="no StageTimer"):
        Observers(replica_with({"SGLANG_DIFFUSION_STAGE_LOGGING": "false"}), OBSERVERS).find(StageTimer)


def test_a_request_waits_runs_and_is_gone() -> None:
    present, work = PresentRequests(), work_on("r", "encoder")

    def states() -> list[str]:
        return [request["state"] for request in present.describe()["requests"]]

    with present.present(work):
        assert states() == ["waiting"]
        with present.around(work):
            assert states() == ["running"]
        assert states() == []
    assert states() == []


def test_the_steps_of_a_request_are_counted_as_they_are_made() -> None:
    present, work = PresentRequests(), work_on("r", "denoiser")
    work.request.arguments["num_inference_steps"] = 5
    with present.present(work), present.around(work):
        work.step()
        work.step()
        [request] = present.describe()["requests"]
    assert (request["steps"], request["num_steps"]) == (2, 5)


def test_a_request_that_is_cancelled_before_its_turn_is_gone() -> None:
    present = PresentRequests()
    with pytest.raises(RuntimeError), present.present(work_on("r", "encoder")):
        raise RuntimeError
    assert present.describe() == {"requests": []}


def test_a_request_that_is_cancelled_at_work_is_shown_until_the_work_ends() -> None:
    present, work = PresentRequests(), work_on("r", "encoder")
    waiting, running = present.present(work), present.around(work)
    waiting.__enter__()
    running.__enter__()
    waiting.__exit__(None, None, None)  # the event loop hears of it first
    assert [request["state"] for request in present.describe()["requests"]] == ["running"]
    running.__exit__(None, None, None)
    assert present.describe() == {"requests": []}


@pytest.mark.parametrize(("stage", "refused"), [("encoder", 3), ("denoiser", 0)])
def test_refused_requests_count_once_at_the_first_stage(stage: Any, refused: int) -> None:
    loads = StageLoads(("encoder", "denoiser"))
    work = work_on("r", stage, envelope=Envelope(refused_before=3))
    with loads.present(work), loads.around(work):
        assert loads.loads()[stage].present == 1
    load = loads.loads()[stage]
    assert (load.refused, load.arrived, load.present) == (refused, 1, 0)


def test_nobody_watches_an_observer_of_its_own_kind() -> None:
    """An Observer as it stands does nothing, so a subclass overrides only what it needs."""
    calls: list[Callable[[], None]] = []
    observer, work = Observer(), work_on("r", "vae")
    with observer.present(work), observer.around(work):
        work.step()
    assert work.on_step == calls
    assert (observer.describe(), observer.recall("r"), observer.wrap_kernel("neg", torch.neg)) == ({}, [], torch.neg)


def test_the_wrapper_of_the_first_row_is_the_outermost_as_its_surrounding_is() -> None:
    class Wraps(Planted):
        def wrap_kernel(self, name: str, kernel: Kernel) -> Kernel:
            def wrapped(*arguments: Any) -> Any:
                self.seen.append(self.name)
                return kernel(*arguments)

            return wrapped  # type: ignore[return-value]

    seen: list[str] = []
    observers = Observers(replica_with({}), (lambda _: Wraps("first", seen), lambda _: Wraps("second", seen)))
    observers.wrap_kernel("neg", torch.neg)(torch.ones(1))
    assert seen == ["first", "second"]
