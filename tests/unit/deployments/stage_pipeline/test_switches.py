"""What a request casts or switches of a component is its own: the shared one has it around the request's calls only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.errors import NotSupportedError
from deployments.features.rewiring.state import kept_state, settings_of
from deployments.stage_pipeline.sessions.component import RoutedComponent
from deployments.stage_pipeline.sessions.own_modules import OwnModules, rewired
from deployments.stage_pipeline.sessions.switches import casts_of, set_switches, switches_of


class Model(torch.nn.Module):
    """Has what a cast reaches: weights, tied ones, a buffer, a part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3)
        self.first = torch.nn.Linear(2, 2, bias=False)
        self.tied = torch.nn.Linear(2, 2, bias=False)
        self.tied.weight = self.first.weight
        self.register_buffer("mean", torch.full((2,), 1 / 3))
        self.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        self.tiles: Any = False
        self.eval()

    def use_tiles(self) -> None:
        self.tiles = True

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


class Router:
    device = torch.device("cpu")

    def __init__(self, real: Model, is_denoiser: bool) -> None:
        self.own = OwnModules(real, in_parts=is_denoiser)

    def own_modules_of(self, component: str) -> OwnModules:
        return self.own


@pytest.fixture
def real() -> Model:
    torch.manual_seed(0)
    return Model().half()


def routed(real: Model, is_denoiser: bool = False) -> tuple[Any, OwnModules]:
    router = Router(real, is_denoiser)
    return RoutedComponent(real, "vae", router, is_denoiser), router.own  # type: ignore[arg-type]


def state(module: torch.nn.Module) -> list[Any]:
    """All of a module that a request might change."""
    found: list[Any] = []
    for path, part in module.named_modules():
        tensors = [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]
        found += [(path, n, id(t), t.dtype, t.stride(), t.requires_grad, t.data_ptr()) for n, t in tensors]
        found.append((path, part.training, vars(part).get("tiles"), len(part._forward_hooks)))
    return found


SWITCHES: dict[str, Callable[[Any], Any]] = {
    "to a dtype": lambda m: m.to(torch.float32),
    "to a dtype by name": lambda m: m.to(dtype=torch.bfloat16),
    "to a device and a dtype": lambda m: m.to("meta", torch.float32),
    "to a dtype of another tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float64)),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float32),
    "memory format": lambda m: m.to(memory_format=torch.channels_last),
    "gradients": lambda m: m.requires_grad_(False),
    "train": lambda m: m.train(),
    "train of a part": lambda m: m.conv.train(True),
    "cast of a part": lambda m: m.conv.to(torch.float32),
    "there and back, rounded": lambda m: m.float().bfloat16().half(),
    "an attribute": lambda m: setattr(m, "tiles", (1, 2)),
    "an attribute of a part": lambda m: setattr(m.first, "tiles", 3),
    "a method": lambda m: m.use_tiles(),
    "a part": lambda m: setattr(m, "tied", torch.nn.Identity()),
}


@pytest.mark.parametrize("is_denoiser", [False, True])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_is_in_the_shared_module_around_the_requests_calls_only(
    switch: str, is_denoiser: bool, real: Model
) -> None:
    itself = Model().half()
    itself.load_state_dict(real.state_dict())
    before = state(real)
    if switch == "to a device and a dtype":  # a component stays where it is
        itself.float()
    else:
        SWITCHES[switch](itself)
    component, own = routed(real, is_denoiser)
    SWITCHES[switch](component)
    assert state(real) == before
    assert component.dtype == itself.dtype
    for _ in range(2):
        with rewired(own, own.changes()):
            inside = state(real)
            numbers = [tensor.clone() for tensor in real.state_dict().values()]
        assert state(real) == before
        truth = state(itself)
        assert [x[1:2] + x[3:6] for x in inside] == [x[1:2] + x[3:6] for x in truth]
        assert all(map(torch.equal, numbers, itself.state_dict().values()))


def test_methods_that_answer_the_module_answer_the_routed_one(real: Model) -> None:
    component, _ = routed(real)
    assert component.to(torch.float32) is component
    assert component.cuda() is component.cpu() is component.to("cuda") is component.eval() is component
    assert component.float().half().train() is component


def test_what_is_there_already_makes_no_own_modules(real: Model) -> None:
    for is_denoiser in (False, True):
        component, own = routed(real, is_denoiser)
        component.to(torch.float16).half().eval().to("cpu").cuda().train(False)
        assert own.seen(real) is real


def test_a_cast_back_is_the_shared_tensor_again_unless_its_numbers_were_rounded(real: Model) -> None:
    component, own = routed(real)
    component.float()
    component.half()
    assert own.changes() == []
    component.bfloat16()
    component.float()
    assert {casts_of(change.value) for change in own.changes()} == {(torch.bfloat16, torch.float32)}
    component.half()
    assert len(own.changes()) > 0


def test_tied_weights_stay_tied(real: Model) -> None:
    component, own = routed(real)
    component.float()
    mine: Any = own.of(real)
    assert mine.tied.weight is mine.first.weight
    assert mine.tied.weight is not real.first.weight


@pytest.mark.parametrize("method", ["load_state_dict", "to_empty", "share_memory"])
def test_what_writes_into_the_weights_is_refused(method: str, real: Model) -> None:
    component, _ = routed(real)
    with pytest.raises(NotSupportedError, match=f"Model.{method} is called for one request, but others share it"):
        getattr(component, method)({})


@pytest.mark.parametrize("switch", sorted(SWITCHES.keys() - {"a part", "gradients"}))
def test_switches_reach_the_process_that_holds_the_component(switch: str, real: Model) -> None:
    there = Model().half()
    there.load_state_dict(real.state_dict())
    component, own = routed(real.to("meta"))
    SWITCHES[switch](component)
    received = OwnModules(there)
    set_switches(received, switches_of("vae", own))
    itself = Model().half()
    itself.load_state_dict(there.state_dict())
    SWITCHES[switch](itself.to("cpu") if switch != "to a device and a dtype" else itself.float())
    before = state(there)
    with rewired(received, received.changes()):
        assert [x[1:2] + x[3:6] for x in state(there)] == [x[1:2] + x[3:6] for x in state(itself)]
    assert state(there) == before


def test_what_cannot_be_sent_is_refused_by_name(real: Model) -> None:
    component, own = routed(real)
    component.conv.processor = torch.nn.Identity()
    with pytest.raises(NotSupportedError, match=r"vae\.conv\.processor is changed .*\(placement: one_stage\)"):
        switches_of("vae", own)


def test_casts_of_a_denoiser_are_settings_without_a_state(real: Model) -> None:
    keys = []
    for _ in range(2):
        component, own = routed(real, is_denoiser=True)
        component.float()
        keys.append(settings_of(own.changes()))
        assert kept_state(own) is None
    assert keys[0] == keys[1] is not None
