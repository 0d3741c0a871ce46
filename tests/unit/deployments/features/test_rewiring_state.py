"""What was put into a denoiser: settings that may be shared, or a state that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from deployments.errors import CannotResumeError
from deployments.features.rewiring.state import UNKEPT, kept_state, put_back, settings_of
from deployments.stage_pipeline.sessions.own_modules import OwnModules
from deployments.tensors.packing import pack, unpack


class Settings:
    """A processor with settings, and no state."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength
        self.name = "a"


class OfTheClass(Settings):
    """What all objects of the class write into."""

    maps: list[torch.Tensor] = []  # noqa: RUF012


class Store:
    """What several processors write into."""

    def __init__(self) -> None:
        self.maps: dict[str, list[torch.Tensor]] = {"up": []}
        self.count = 0


class Storing:
    """A processor that keeps its last map, and adds it to a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.last: torch.Tensor | None = None

    def work(self, value: float) -> None:
        self.last = torch.full((2,), value)
        self.store.maps["up"].append(self.last)
        self.store.count += 1


def put_in(values: list[Any]) -> OwnModules:
    shared = torch.nn.ModuleList([torch.nn.Identity() for _ in values])
    own = OwnModules(shared, in_parts=True)
    for module, value in zip(own.of(shared), values, strict=True):  # type: ignore[arg-type]
        module.processor = value
    return own


def hooked(hook: Callable[..., Any]) -> OwnModules:
    shared = torch.nn.Identity()
    own = OwnModules(shared, in_parts=True)
    own.of(shared).register_forward_hook(hook)
    return own


def sent(state: Any) -> Any:
    return unpack(pack(state), torch.device("cpu"))


def test_equal_settings_of_equal_classes_are_alike_and_others_are_not() -> None:
    shared = torch.nn.Identity()

    def settings(value: Any) -> Any:
        own = OwnModules(shared, in_parts=True)
        own.of(shared).processor = value
        return settings_of(own.changes())

    assert settings(Settings(2.0)) == settings(Settings(2.0)) is not None
    assert len({settings(value) for value in (Settings(2.0), Settings(3.0), 1, True, 1.0)}) == 5
    with_a_state = (Storing(Store()), Store(), lambda *_: None, torch.ones(1), torch.nn.Identity(), [1], OfTheClass())
    assert [settings(value) for value in with_a_state] == [None] * 7


def test_a_state_is_put_back_into_the_objects_that_the_pipeline_made_again() -> None:
    store = Store()
    first, second = Storing(store), Storing(store)
    own = put_in([first, second])
    first.work(1.0)
    second.work(2.0)
    state = sent(kept_state(own))
    second.work(3.0)  # what comes later is not in it

    other_store = Store()
    resumed = [Storing(other_store), Storing(other_store)]
    put_back(put_in(resumed), state)
    assert [each.last.tolist() for each in resumed if each.last is not None] == [[1, 1], [2, 2]]
    assert [each.tolist() for each in other_store.maps["up"]] == [[1, 1], [2, 2]]
    assert other_store.count == 2
    assert resumed[0].store is other_store


def test_the_variables_of_a_hook_are_a_state_too() -> None:
    def noting() -> tuple[Callable[..., Any], Callable[[], Any]]:
        size: torch.Size | None = None

        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            nonlocal size
            size = output.shape

        return hook, lambda: size

    hook, _ = noting()
    hook(None, None, torch.zeros(2, 3))
    state = sent(kept_state(hooked(hook)))
    other, size = noting()
    put_back(hooked(other), state)
    assert size() == torch.Size([2, 3])


def test_settings_have_no_state_to_keep() -> None:
    assert kept_state(put_in([Settings(), Settings(2.0)])) is None
    assert kept_state(OwnModules(torch.nn.Identity(), in_parts=True)) is None


@pytest.mark.parametrize("kept", [{1, 2}, DDIMScheduler(), [torch.ones(1), Store()], object()])
def test_a_state_that_no_message_can_carry_is_told(kept: Any) -> None:
    processor = Storing(Store())
    processor.last = kept
    assert kept_state(put_in([processor])) == UNKEPT


def test_other_things_than_before_take_no_state_back() -> None:
    state = kept_state(put_in([Storing(Store()), Storing(Store())]))
    for changed in (put_in([Storing(Store())]), None):
        with pytest.raises(CannotResumeError, match="other things"):
            put_back(changed, state)
