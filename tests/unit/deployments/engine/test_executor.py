"""The executor is the engine's only touch of the device."""

from typing import Any

import torch

from deployments.engine.engine import Engine
from deployments.engine.executor import LocalExecutor
from deployments.engine.fiber import Fiber


def test_a_local_executor_calls_the_module_and_then_waits_for_the_device() -> None:
    happened: list[Any] = []

    def call(module: Any, component: str, context: Any, args: Any, kwargs: Any) -> str:
        happened.append((module, component, context, args, kwargs))
        return "output"

    executor = LocalExecutor(call, lambda: happened.append("synchronized"))
    assert executor.run("transformer", "module", ("cond", {}), {"x": 1}) == "output"
    assert happened == [("module", "transformer", ("cond", {}), (), {"x": 1}), "synchronized"]


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
