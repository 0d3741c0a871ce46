"""What a plan writes into classes is one module's own, and can be taken away for a while."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from deployments.ranks.by_cache_dit.own_code import with_own_code

HOME = "diffusers.models.toy"


class Base(torch.nn.Module):
    def forward(self, x: int) -> str:
        return f"diffusers {self.word()} {x}"

    def word(self) -> str:
        return "base"


class Further(Base):
    def word(self) -> str:
        return "further"


class Processor:
    def __call__(self) -> str:
        return "diffusers"


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Base(), Further()
        self.first.processor = Processor()


@pytest.fixture(autouse=True)
def of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    home = ModuleType(HOME)
    for cls in (Base, Further, Processor, Model):
        monkeypatch.setattr(cls, "__module__", HOME)
        setattr(home, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, HOME, home)


def write_into_classes() -> str:
    Base.forward = lambda self, x: f"plan {self.word()} {x}"  # type: ignore[assignment,method-assign]
    Base.word = lambda self: "plan"  # type: ignore[assignment,method-assign]
    Processor.__call__ = lambda self: "plan"  # type: ignore[assignment,method-assign]
    Processor._cp_config = None  # type: ignore[attr-defined]
    return "the plan"


def said(model: Model) -> tuple[str, str, str]:
    processor: Any = model.first.processor
    return model.first(1), model.second(1), processor()


def test_the_module_has_the_plans_code_and_others_of_its_classes_have_not() -> None:
    model, other = Model(), Model()
    result, _ = with_own_code(model, write_into_classes)
    assert result == "the plan"
    assert said(model) == ("plan plan 1", "plan further 1", "plan")
    assert said(other) == ("diffusers base 1", "diffusers further 1", "diffusers")
    assert not hasattr(Processor, "_cp_config")
    assert type(model.first).__name__ == "Base"


def test_without_it_the_module_is_as_it_was() -> None:
    model = Model()
    _, code = with_own_code(model, write_into_classes)
    with code.without():
        assert said(model) == ("diffusers base 1", "diffusers further 1", "diffusers")
    assert said(model) == ("plan plan 1", "plan further 1", "plan")


def test_a_forward_that_is_written_into_the_module_itself_is_its_own_too() -> None:
    model = Model()

    def write() -> None:
        model.second.forward = lambda x: f"own {x}"  # type: ignore[assignment,method-assign]

    _, code = with_own_code(model, write)
    assert model.second(2) == "own 2"
    with code.without():
        assert model.second(2) == "diffusers further 2"


def test_what_a_plan_wrote_before_it_failed_is_taken_back() -> None:
    def write() -> None:
        write_into_classes()
        raise AssertionError("not for this model")

    model = Model()
    with pytest.raises(AssertionError):
        with_own_code(model, write)
    assert said(model) == ("diffusers base 1", "diffusers further 1", "diffusers")
