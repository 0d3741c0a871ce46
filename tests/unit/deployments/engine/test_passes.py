"""Forwards that one fiber asks for before it waits for any: its guidance passes share a batch, with others' too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from deployments.engine.engine import Engine
from deployments.engine.fiber import CancelledStage, Fiber
from deployments.engine.forward import Forward
from deployments.engine.statistics import BatchRun, StructureRefused
from deployments.errors import DeadlineExceededError
from tests.support.simulated_time import Asked, SimulatedDevice, free, linear, serve

PATIENCE_S = 60
STEPS = 240  # the merge of a structure was tried by then


class Doubles(torch.nn.Module):
    """`largest` samples fit; `mixes`: those of a batch change each other."""

    def __init__(self, largest: int = 100, mixes: float = 0.0) -> None:
        super().__init__()
        self.largest, self.mixes = largest, mixes
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if len(x) > self.largest:
            raise torch.OutOfMemoryError("they do not fit")
        return 2 * x + self.mixes * (x.mean() - x.mean(1, keepdim=True))


Run = Callable[..., Any]


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close()


def ask(engine: Engine, fiber: Fiber, module: Doubles, value: float, width: int = 4) -> Forward:
    x = torch.arange(width, dtype=torch.float32)[None] + value
    return engine.ask(fiber, module, "transformer", None, (), {"x": x})


def two_passes(engine: Engine, module: Doubles, fiber: Fiber | None = None, widths: tuple[int, int] = (4, 4)) -> None:
    """A step of a request, checked."""
    fiber = fiber or Fiber("request")

    def work() -> None:
        forwards = [ask(engine, fiber, module, float(i), width) for i, width in enumerate(widths)]
        for value, (forward, width) in reversed([*enumerate(zip(forwards, widths, strict=True))]):
            made = engine.wait(forward)
            torch.testing.assert_close(made, 2 * (torch.arange(width, dtype=torch.float32)[None] + value))

    engine.begin(fiber)
    try:
        engine.call(fiber, work)
    finally:
        engine.end(fiber)


def make(engines: list[Engine], **settings: Any) -> Engine:
    engines.append(Engine(**{"max_wait_s": 0.0, "guidance_passes": "together", **settings}))
    return engines[-1]


@pytest.mark.parametrize("max_batch_size", [1, 8])
def test_passes_that_stay_together_share_a_batch_as_soon_as_that_was_seen_to_be_right(
    engines: list[Engine], max_batch_size: int
) -> None:
    engine, module = make(engines, max_batch_size=max_batch_size), Doubles()
    two_passes(engine, module)
    assert module.sizes[-1] == 2, "the first one too gets the numbers of a batch"
    module.sizes.clear()
    two_passes(engine, module)
    assert module.sizes == [2]
    assert engine.statistics.passes_together == 4


def test_passes_whose_merge_deviates_are_made_apart_and_that_is_told(
    engines: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Any] = []
    engine, module = make(engines, measure=told.append), Doubles(mixes=4e-3)
    two_passes(engine, module)
    module.sizes.clear()
    two_passes(engine, module)
    assert module.sizes == [1, 1]
    assert engine.statistics.refused_structures == 1
    assert engine.statistics.passes_together == 0
    assert StructureRefused("transformer") in told
    assert "forwards of transformer run alone: merged ones deviate" in caplog.text


def test_passes_of_different_shapes_are_made_apart(engines: list[Engine]) -> None:
    engine, module = make(engines), Doubles()
    two_passes(engine, module, widths=(4, 5))
    assert module.sizes == [1, 1]


def test_passes_that_do_not_fit_together_are_made_apart(engines: list[Engine]) -> None:
    engine, module = make(engines), Doubles()
    two_passes(engine, module)
    module.largest = 1
    for _ in range(3):
        module.sizes.clear()
        two_passes(engine, module)
    assert module.sizes == [1, 1], "known by then"


def test_a_bound_of_the_tokens_holds_for_the_passes_of_one_request_too(engines: list[Engine]) -> None:
    engine, module = make(engines, max_batch_tokens=1), Doubles()
    two_passes(engine, module)
    assert module.sizes == [1, 1]


def test_a_fiber_may_make_what_it_has_asked_for_at_once(engines: list[Engine]) -> None:
    engine, module, fiber = make(engines), Doubles(), Fiber("request")

    def work() -> list[torch.Tensor]:
        first, second = (ask(engine, fiber, module, float(i)) for i in range(2))
        made = engine.make(first)
        return [made, engine.wait(second), engine.make(ask(engine, fiber, module, 2.0))]

    assert [float(made[0, 0]) for made in engine.call(fiber, work)] == [0.0, 2.0, 4.0]
    assert module.sizes == [1, 1, 1]
    assert fiber.forwards == 3


def test_what_a_fiber_has_asked_for_and_left_is_made_for_nobody(engines: list[Engine]) -> None:
    engine, module, fiber = make(engines), Doubles(), Fiber("request")

    def work() -> Forward:
        asked = ask(engine, fiber, module, 0.0)
        engine.end(fiber)
        return asked

    engine.begin(fiber)
    asked = engine.call(fiber, work)
    assert not engine.num_waiting
    two_passes(engine, module)
    assert not asked.is_done
    assert module.sizes[-1] == 2


def test_what_a_fiber_does_elsewhere_between_its_passes_parts_them_not_however_long_it_takes(
    engines: list[Engine],
) -> None:
    engine, module, fiber = make(engines), Doubles(), Fiber("request")
    two_passes(engine, module)
    module.sizes.clear()

    def work() -> None:
        first = ask(engine, fiber, module, 0.0)
        engine.elsewhere(lambda: two_passes(engine, module, Fiber("other")))  # for which the engine makes forwards
        second = ask(engine, fiber, module, 1.0)
        engine.wait(second)
        assert first.is_done

    engine.call(fiber, work)
    assert module.sizes == [2, 2]


def test_a_fiber_may_wait_for_one_forward_and_have_others_held(engines: list[Engine]) -> None:
    engine, module, fiber = make(engines), Doubles(), Fiber("request")
    two_passes(engine, module)
    module.sizes.clear()

    def work() -> None:
        first, between, second = (ask(engine, fiber, module, float(i), width) for i, width in enumerate((4, 5, 4)))
        engine.wait(between, still_held=[first, second])
        assert not first.is_done
        engine.wait(second)
        assert first.is_done

    engine.call(fiber, work)
    assert module.sizes == [1, 2]


def test_a_fiber_that_waits_for_several_passes_is_counted_once(engines: list[Engine]) -> None:
    engine, other, told = make(engines), Fiber("other"), []

    class Looks(Doubles):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            told.append(engine.describe())
            return super().forward(x)

    module = Looks()
    engine.begin(other)

    def work() -> None:
        for value in range(3):
            ask(engine, other, module, float(value), width=5)
        engine.wait(ask(engine, other, module, 3.0))

    engine.call(other, work)
    engine.end(other)
    assert [(each["waiting_fibers"], each["waiting_forwards"]) for each in told[-2:]] == [(1, 1), (0, 0)]
    assert engine.num_waiting == 0


@pytest.mark.parametrize("get", ["wait", "make"])
def test_a_fiber_that_is_cancelled_while_it_is_elsewhere_has_nothing_made(engines: list[Engine], get: str) -> None:
    engine, module, fiber = make(engines), Doubles(), Fiber("request")
    engine.begin(fiber)

    def work() -> None:
        asked = ask(engine, fiber, module, 0.0)
        engine.elsewhere(lambda: engine.cancel(fiber))
        getattr(engine, get)(asked)

    with pytest.raises(CancelledStage):
        engine.call(fiber, work)
    engine.end(fiber)
    assert module.sizes == []
    assert engine.num_waiting == 0


def test_a_cancelled_fiber_leaves_where_it_waits_or_makes_something_at_once(engines: list[Engine]) -> None:
    engine, module = make(engines), Doubles()
    for get in (engine.wait, engine.make):
        fiber = Fiber("request")
        engine.begin(fiber)

        def work(fiber: Fiber = fiber, get: Run = get) -> None:
            asked = ask(engine, fiber, module, 0.0)
            engine.cancel(fiber)
            get(asked)

        with pytest.raises(CancelledStage):
            engine.call(fiber, work)
        engine.end(fiber)
    assert module.sizes == []


def test_a_fiber_that_has_expired_is_told_so_once_for_all_its_passes(engines: list[Engine]) -> None:
    engine, module = make(engines), Doubles()
    with pytest.raises(DeadlineExceededError):
        two_passes(engine, module, Fiber("request", expires=0.0))
    two_passes(engine, module)


def test_an_error_of_one_pass_is_raised_where_its_output_is_waited_for(engines: list[Engine]) -> None:
    class Fails(Doubles):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool((x > 100).any()):
                raise ValueError("too large")
            return super().forward(x)

    engine, module, fiber = make(engines), Fails(), Fiber("request")
    two_passes(engine, module)

    def work() -> torch.Tensor:
        first, second = ask(engine, fiber, module, 1000.0), ask(engine, fiber, module, 1.0)
        made: torch.Tensor = engine.wait(second)
        with pytest.raises(ValueError, match="too large"):
            engine.wait(first)
        return made

    assert float(engine.call(fiber, work)[0, 0]) == 2.0


# --- what it costs decides ---


def sizes(seconds_of: Callable[[int], float], load: list[Asked], **settings: Any) -> set[int]:
    """Of the batches in the end, but for the last, when one request has gone."""
    device = SimulatedDevice(seconds_of)
    serve(device, load, **settings)
    return set(device.sizes[-15:-5])


def test_by_measured_costs_passes_share_a_batch_where_it_costs_less_than_they_do_alone() -> None:
    load = [Asked(STEPS, passes=2)]
    slightly = lambda samples: 0.2 + 0.8 * samples  # noqa: E731
    assert sizes(slightly, load, guidance_passes="auto") == {2}
    assert sizes(linear, load, guidance_passes="auto") == {1}
    assert sizes(linear, [Asked(40, passes=2)], guidance_passes="together") == {2}


def test_passes_of_several_requests_share_a_batch_where_it_is_free() -> None:
    load = [Asked(40, passes=2)] * 3
    assert sizes(free, [Asked(STEPS, passes=2)] * 3, guidance_passes="auto") == {6}
    assert sizes(linear, load, guidance_passes="together") == {2}, "those of different requests would wait"
    assert sizes(linear, load, guidance_passes="together", merging="always") == {6}
    assert sizes(free, load, guidance_passes="together", merging="always", max_batch_size=5) <= {2, 4}, "in pairs"


def test_requests_with_and_without_guidance_share_batches() -> None:
    load = [Asked(60, passes=2), Asked(30), Asked(30)]
    assert sizes(free, load, guidance_passes="together", merging="always") == {4}


def test_a_turn_tells_how_many_passes_were_together() -> None:
    told: list[Any] = []
    sizes(free, [Asked(20, passes=2)], guidance_passes="together", measure=told.append)
    turns = [each for each in told if isinstance(each, BatchRun)]
    assert (turns[-1].num_forwards, turns[-1].num_passes_together) == (2, 2)
