"""A promise looks like its tensor, is made where its numbers are used, and says whether they were."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from deployments.errors import PassesApartError
from deployments.tensors.promise import Promise, Source, plain_tensors
from deployments.tensors.values import MissingTensor, copied, describe, map_values

CPU = torch.device("cpu")
Operation = Callable[[Any], Any]

LOOKS: dict[str, Operation] = {
    "shape": lambda p: tuple(p.shape),
    "size": lambda p: (p.size(), p.size(1), len(p)),
    "kind": lambda p: (p.dtype, p.device, p.is_floating_point(), torch.is_tensor(p), isinstance(p, torch.Tensor)),
    "sizes": lambda p: (p.ndim, p.dim(), p.numel(), p.element_size(), p.nbytes),
    "a description": describe,
}
REARRANGES: dict[str, Operation] = {
    "a slice": lambda p: p[:, :2],
    "an index": lambda p: p[0],
    "new axes": lambda p: p[None, ..., None].squeeze(-1),
    "a cast": lambda p: p.to(torch.float64),
    "a cast by name": lambda p: p.double(),
    "a cast with its device": lambda p: p.to(device="cpu", dtype=torch.float16),
    "no cast": lambda p: p.float(),
    "a view": lambda p: p.view(-1, 3),
    "an order": lambda p: p.permute(2, 0, 1).contiguous(),
    "chunks": lambda p: p.chunk(2, dim=1),
    "chunks by the function": lambda p: torch.chunk(p, 2, 1)[1],
    "a part of a part": lambda p: p.split(2, 1)[0].unsqueeze(0)[0, 1],
}
USES: dict[str, Operation] = {
    "a sum with a tensor": lambda p: torch.ones(3) + p,
    "a sum with a number": lambda p: 2.0 - p,
    "a function": lambda p: torch.cat([p, torch.zeros(2, 4, 3)]),
    "a function by name": lambda p: torch.add(input=torch.ones(3), other=p),
    "a number": lambda p: p.mean().item(),
    "in place": lambda p: torch.zeros(2, 4, 3).copy_(p),
    "an index by a tensor": lambda p: p[torch.tensor([1])],
    "an index of a tensor": lambda p: torch.arange(30)[p.long()],
    "numpy": lambda p: np.asarray(p),
    "text": repr,
    "strides": lambda p: p[:, :2].stride(),
    "a copy of a tree": lambda p: copied({"x": [p]})["x"][0],
    "a kernel of torch's, called from C++": lambda p: torch.ops.aten.mul.Tensor(p, 2.0),
}


def output() -> torch.Tensor:
    return torch.arange(24.0).reshape(2, 4, 3)


def promise(value: torch.Tensor | None = None) -> tuple[Any, Source]:
    made = output() if value is None else value
    source = Source(lambda: source.keep((made,)))
    return source.promised(describe((made,)), CPU)[0], source


def plain(value: Any) -> list[Any]:
    found: list[Any] = []
    map_values(lambda leaf: found.append(leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf), value)
    return [str(each) for each in found]


@pytest.mark.parametrize("looks", LOOKS.values(), ids=LOOKS)
def test_who_asks_what_a_promise_is_does_not_use_it(looks: Operation) -> None:
    given, source = promise()
    assert looks(given) == looks(output())
    assert not source.is_used


@pytest.mark.parametrize("rearranges", REARRANGES.values(), ids=REARRANGES)
def test_a_part_of_a_promise_is_one_too_and_is_what_the_tensors_would_be(rearranges: Operation) -> None:
    given, source = promise()
    part = rearranges(given)
    assert not source.is_used
    truth = rearranges(output())
    for each, true in zip(*[x if isinstance(x, tuple) else (x,) for x in (part, truth)], strict=True):
        assert isinstance(each, Promise)
        assert (each.shape, each.dtype) == (true.shape, true.dtype)
        assert torch.equal(each + 0, true)
    assert source.is_used


@pytest.mark.parametrize("uses", USES.values(), ids=USES)
def test_any_other_operation_gets_the_numbers(uses: Operation) -> None:
    given, source = promise()
    made = uses(given)
    assert source.is_used
    assert type(made) is not Promise
    assert plain(made) == plain(uses(output()))


def test_a_move_to_the_device_where_a_promise_will_be_is_a_cast() -> None:
    here = torch.device("cuda", 0)  # which need not be there
    given = Source().promised(MissingTensor((2,), torch.float32), here)
    assert given.to(here) is given
    assert isinstance(given.to("cuda", torch.float16), Promise)


def test_parts_that_were_taken_before_see_what_is_written_into_the_whole_but_casts_do_not() -> None:
    given, _ = promise()
    part, cast = given[0], given.double()
    given.add_(1)
    assert torch.equal(part + 0, output()[0] + 1)
    assert torch.equal(cast + 0, output().double())


def test_an_output_that_is_there_tells_whether_it_was_used_until_nobody_asks_any_more() -> None:
    source = Source()
    watched = source.watched({"sample": output(), "other": None})
    part = watched["sample"][:, 1].float()
    assert isinstance(part, Promise)
    assert not source.is_used
    source.close()
    assert type(watched["sample"][0]) is torch.Tensor
    watched = Source().watched(output())
    assert torch.equal(watched * 2, output() * 2)
    assert watched.source.is_used


def test_trees_get_tensors_in_place_of_promises_and_stay_themselves_without() -> None:
    given, _ = promise()
    cache: dict[str, Any] = {"keys": [torch.zeros(1)]}
    args = plain_tensors({"x": (given, 1), "cache": cache})
    assert type(args["x"][0]) is torch.Tensor
    assert args["cache"] is cache, "what others write into"
    assert plain_tensors(cache) is cache


@pytest.mark.parametrize("made", [torch.zeros(2, 4, 4), torch.zeros(2, 4, 3, dtype=torch.float64)])
def test_another_output_than_was_promised_is_refused(made: torch.Tensor) -> None:
    source = Source()
    source.promised(describe((output(),)), CPU)
    with pytest.raises(PassesApartError):
        source.keep((made,))


def test_what_its_numbers_need_is_let_go_of_when_it_is_kept() -> None:
    class Arguments:
        pass

    arguments = Arguments()
    seen = weakref.ref(arguments)
    source = Source(lambda kept=arguments: source.keep((output(),)))  # type: ignore[misc]
    given = source.promised(describe((output(),)), CPU)[0]
    del arguments
    gc.disable()
    try:
        assert seen() is not None
        assert float(given.sum()) == float(output().sum())
        assert seen() is None, "without a collection"
    finally:
        gc.enable()


def test_an_error_of_the_making_is_raised_where_the_numbers_are_used() -> None:
    def fail() -> None:
        raise ValueError("no numbers")

    source = Source(fail)
    given = source.promised(describe((output(),)), CPU)[0][:, :2]
    with pytest.raises(ValueError, match="no numbers"):
        given * 2
