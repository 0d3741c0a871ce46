"""The executor is the engine's only touch of the device."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.engine.engine import Engine
from deployments.engine.executor import LocalExecutor
from deployments.engine.fiber import Fiber
from deployments.engine.marks import marks_of


def test_a_local_executor_calls_the_module_and_waits_for_nothing() -> None:
    happened: list[Any] = []

    def call(module: Any, component: str, context: Any, args: Any, kwargs: Any) -> str:
        happened.append((module, component, context, args, kwargs))
        return "output"

    executor = LocalExecutor(call)
    assert executor.run("transformer", "module", ("cond", {}), {"x": 1}) == "output"
    assert happened == [("module", "transformer", ("cond", {}), (), {"x": 1})]


def test_on_the_cpu_a_mark_is_reached_when_the_call_returns() -> None:
    executor = LocalExecutor(device=torch.device("cpu"))
    first, second = executor.mark(), executor.mark()
    assert second.is_reached()
    second.wait()
    assert second.seconds_since(first) >= 0


class PlayedEvent:
    """Of a device that is busy until somebody waits."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.calls: list[str] = []

    def record(self) -> None:
        self.calls.append("record")

    def query(self) -> bool:
        return "synchronize" in self.calls

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def elapsed_time(self, later: Any) -> float:
        assert isinstance(later, PlayedEvent)
        return 250.0  # milliseconds


def test_on_an_accelerator_a_mark_is_an_event_in_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(Event=PlayedEvent)
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    mark = marks_of(torch.device("cuda"))
    begun, ended = mark(), mark()
    assert not ended.is_reached()
    ended.wait()
    assert ended.is_reached()
    assert ended.seconds_since(begun) == 0.25


def test_a_device_without_events_is_waited_for_at_every_mark(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(synchronize=lambda: waited.append(1)))
    mark = marks_of(torch.device("cuda"))
    assert "cuda has no events" in caplog.text
    assert mark().is_reached()
    assert waited == [1]


def test_without_a_call_of_its_own_it_calls_the_module_alone() -> None:
    assert LocalExecutor().run("model", lambda x: x + 1, ("cond", {}), {"x": 1}) == 2


class CountedExecutor(LocalExecutor):
    """Counts the calls."""

    calls = 0

    def run(self, component: str, module: Any, context: Any, arguments: dict[str, Any]) -> Any:
        self.calls += 1
        return super().run(component, module, context, arguments)


def test_a_lone_forward_is_one_call_of_the_executor_and_nothing_else_runs_it() -> None:
    executor = CountedExecutor()
    engine, module, fiber = Engine(executor=executor), torch.nn.Linear(2, 2), Fiber("fiber")
    x = torch.ones(1, 2)
    output = engine.run(fiber, module, "model", None, (x,), {})
    engine.close()
    assert torch.equal(output, module(x))
    assert executor.calls == 1
