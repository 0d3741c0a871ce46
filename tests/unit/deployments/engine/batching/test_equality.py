"""Equal tensors are compared once for each pair, and again after either was written into."""

from collections.abc import Iterator

import pytest
import torch

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.batching.equality import ProvenEqual
from deployments.engine.batching.merging import CannotMergeError, Merger


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    calls: list[int] = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: calls.append(1) or equal(a, b))
    return calls


def test_a_pair_is_compared_once_and_a_view_of_it_too(compared: list[int]) -> None:
    are_equal, a, b = ProvenEqual(), torch.arange(6.0), torch.arange(6.0)
    assert all(are_equal(a, b) for _ in range(10))
    assert all(are_equal(a[1:4], b[1:4]) for _ in range(10))
    assert are_equal(a, a)
    assert are_equal(a[2:], a[2:])
    assert len(compared) == 2


def test_what_was_written_into_is_compared_again(compared: list[int]) -> None:
    are_equal, a, b = ProvenEqual(), torch.zeros(3), torch.zeros(3)
    assert are_equal(a, b)
    b[0] = 1
    assert not are_equal(a, b)
    a[0] = 1
    assert are_equal(a, b)
    assert len(compared) == 3


def test_a_new_tensor_in_the_place_of_an_old_one_is_compared(compared: list[int]) -> None:
    are_equal, a = ProvenEqual(), torch.zeros(1000)
    for value in (0.0, 1.0, 0.0, 1.0):
        assert are_equal(a, torch.full((1000,), value)) is (value == 0.0)
    assert len(compared) == 4


def test_other_shapes_and_dtypes_need_no_comparison(compared: list[int]) -> None:
    are_equal = ProvenEqual()
    assert not are_equal(torch.zeros(2), torch.zeros(3))
    assert not are_equal(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert compared == []


def test_tensors_without_a_version_are_compared_each_time(compared: list[int]) -> None:
    are_equal = ProvenEqual()
    with torch.inference_mode():
        a, b = torch.zeros(2), torch.zeros(2)
    assert are_equal(a, b)
    assert are_equal(a, b)
    assert len(compared) == 2


def test_merged_forwards_ask_the_device_once_for_each_pair_and_never_for_a_time_step(compared: list[int]) -> None:
    merger = Merger(BatchAxes({("x",): 0, ("ids",): "same", ("t",): "same"}, {(): 0}), are_equal=ProvenEqual())
    ids = [torch.arange(4) for _ in range(3)]
    for step in range(10):
        forwards = [{"x": torch.zeros(1, 4), "ids": i[:], "t": torch.tensor(float(step))} for i in ids]
        merger.merge(forwards, [1, 1, 1])
    assert len(compared) == 2, "the second and the third with the first"
    with pytest.raises(CannotMergeError, match="differs"):
        merger.merge([{"x": torch.zeros(1, 4), "ids": i} for i in (ids[0], torch.arange(1, 5))], [1, 1])
