"""A pipeline that rewires the denoiser, which all requests share, is refused and the denoiser put back."""

from collections.abc import Callable

import pytest
import torch

from deployments.denoising.wiring import SharedWiring, read_wiring, restore_wiring
from deployments.errors import NotSupportedError


class Attention(torch.nn.Module):
    """A part whose processor pipelines exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.processor = "its own"


def model() -> torch.nn.Module:
    return torch.nn.Sequential(Attention(), torch.nn.Linear(2, 2))


def exchange_the_processor(rewired: torch.nn.Module) -> None:
    rewired[0].processor = "another"  # type: ignore[index]


def add_a_hook(rewired: torch.nn.Module) -> None:
    rewired[1].register_forward_hook(lambda *_: None)  # type: ignore[index]


def add_a_pre_hook(rewired: torch.nn.Module) -> None:
    rewired.register_forward_pre_hook(lambda *_: None)


@pytest.mark.parametrize("rewire", [exchange_the_processor, add_a_hook, add_a_pre_hook])
def test_what_a_pipeline_rewired_is_noticed_once_and_put_back(rewire: Callable[[torch.nn.Module], None]) -> None:
    shared = model()
    wiring = SharedWiring("SomePipeline", {"transformer": shared})
    wiring.check("transformer")
    rewire(shared)
    with pytest.raises(NotSupportedError, match="SomePipeline rewires transformer for such a request"):
        wiring.check("transformer")
    assert shared[0].processor == "its own"  # type: ignore[index]
    assert not shared[1]._forward_hooks  # type: ignore[index]
    assert not shared._forward_pre_hooks
    wiring.check("transformer")


def test_hooks_that_were_there_before_stay() -> None:
    shared = model()
    shared[1].register_forward_hook(hook := lambda *_: None)  # type: ignore[index]
    before = read_wiring(shared)
    add_a_hook(shared)
    assert restore_wiring(before)
    assert list(shared[1]._forward_hooks.values()) == [hook]  # type: ignore[index]
    assert not restore_wiring(before)


def test_parts_that_were_added_since_are_not_looked_at() -> None:
    shared = model()
    before = read_wiring(shared)
    shared.append(Attention())  # type: ignore[operator]
    assert not restore_wiring(before)


def test_a_component_that_is_not_here_passes() -> None:
    SharedWiring("SomePipeline", {}).check("transformer")
