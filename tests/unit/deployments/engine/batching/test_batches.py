"""Which forwards share a batch, and whose fault an error is, with an executor that counts its calls."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.batching.batches import Batches
from deployments.engine.executor import CacheContext
from deployments.engine.fiber import Fiber
from deployments.engine.forward import Forward
from deployments.engine.marks import HostMark
from deployments.engine.statistics import EngineStatistics
from deployments.tensors.out_of_memory import KnownNotToFitError
from deployments.tensors.values import has_gradients

Compute = Callable[[torch.Tensor], torch.Tensor]


class CountedExecutor:
    """Runs `compute` on the argument `x`, and notes the number of samples of each call."""

    def __init__(self, compute: Compute = lambda x: 2 * x) -> None:
        self.compute = compute
        self.sizes: list[int] = []
        self.freed = 0

    def run(self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any]) -> Any:
        self.sizes.append(len(arguments["x"]))
        return self.compute(arguments["x"])

    def mark(self) -> HostMark:
        return HostMark()

    def free_memory(self) -> None:
        self.freed += 1


def make(executor: CountedExecutor, max_batch_size: int = 8, max_batch_tokens: int | None = None) -> Batches:
    return Batches(max_batch_size, max_batch_tokens, executor, EngineStatistics(), merging="always")


def waiting(
    batches: Batches, values: list[float], *, samples: int = 1, width: int = 4, **changes: Any
) -> list[Forward]:
    """One forward of a fiber of its own for each value, [samples, width] each."""
    is_deterministic = changes.pop("deterministic", False)
    forwards = [
        Forward(
            Fiber("fiber", deterministic=is_deterministic),
            None,
            "model",
            changes.get("context"),
            {"x": torch.full((samples, width), value)},
        )
        for value in values
    ]
    for forward in forwards:
        forward.merge_key = changes.get("merge_key", ())
        forward.surround = changes.get("surround")
        forward.by_position = changes.get("by_position", False)
        batches.classify(forward)
    return forwards


def known(batches: Batches, **shape: Any) -> None:
    """The structure has been merged before."""
    batches.run(waiting(batches, [1.0, 2.0], **shape))


def fill(batches: Batches, ranked: list[Forward]) -> list[Forward]:
    return batches.fill(ranked, now=0.0)


def outputs(forwards: list[Forward]) -> list[float]:
    return [float(forward.output[0, 0]) for forward in forwards]


# --- filling ---


@given(
    num=st.integers(1, 12),
    samples=st.integers(1, 3),
    max_batch_size=st.integers(1, 6),
    max_tokens=st.none() | st.integers(1, 20),
)
@settings(deadline=None)
def test_no_batch_passes_a_bound_and_only_a_lone_forward_may_be_larger(
    num: int, samples: int, max_batch_size: int, max_tokens: int | None
) -> None:
    batches = make(CountedExecutor(), max_batch_size, max_tokens)
    ranked = waiting(batches, [float(i) for i in range(num)], samples=samples)
    batch = fill(batches, ranked)
    assert batch == ranked[: len(batch)], "the first of the ranking, in its order"
    assert 1 <= len(batch) <= max_batch_size
    tokens = len(batch) * samples  # one token for each sample
    assert len(batch) == 1 or max_tokens is None or tokens <= max_tokens
    is_full = len(batch) == max_batch_size or (max_tokens is not None and tokens + samples > max_tokens)
    assert is_full or len(batch) == num


def test_other_shapes_merge_keys_and_contexts_do_not_share() -> None:
    batches = make(CountedExecutor())
    first, *like_it = waiting(batches, [1.0, 2.0], merge_key="a")
    others = [
        *waiting(batches, [3.0], merge_key="b"),
        *waiting(batches, [4.0], width=5, merge_key="a"),
        *waiting(batches, [5.0], merge_key="a", context=("cond", {})),
        *waiting(batches, [6.0], merge_key=None),
    ]
    assert fill(batches, [first, *others, *like_it]) == [first, *like_it]


@pytest.mark.parametrize(
    "changes", [{"merge_key": None}, {"deterministic": True}, {"surround": nullcontext}], ids=["None", "bits", "no key"]
)
def test_a_forward_that_must_run_alone_leads_and_joins_no_batch(changes: dict[str, Any]) -> None:
    batches = make(CountedExecutor())
    alone, others = waiting(batches, [1.0, 2.0], **changes), waiting(batches, [3.0, 4.0])
    assert fill(batches, [*alone, *others]) == alone[:1]
    assert fill(batches, [*others, *alone]) == others


def test_a_forward_whose_axes_are_still_asked_for_runs_alone_and_the_next_one_may_share() -> None:
    batches = make(CountedExecutor())
    fiber, are_known = Fiber("fiber"), [False]
    fiber.may_share = lambda: are_known[0]
    others = waiting(batches, [2.0])

    def forward() -> Forward:
        made = Forward(fiber, None, "model", None, {"x": torch.full((1, 4), 1.0)})
        batches.classify(made)
        return made

    first = forward()
    assert fill(batches, [first, *others]) == [first]
    are_known[0] = True
    second = forward()
    assert fill(batches, [second, *others]) == [second, *others]


# --- running ---


def test_the_first_merge_is_checked_and_the_next_are_one_call_each() -> None:
    executor = CountedExecutor()
    batches = make(executor)
    # Three alone; two of them merged, and the first with itself, which shows the noise.
    for expected in ([1, 1, 1, 2, 2], [3]):
        executor.sizes.clear()
        forwards = waiting(batches, [1.0, 2.0, 3.0])
        batches.run(forwards)
        assert outputs(forwards) == [2.0, 4.0, 6.0]
        assert executor.sizes == expected


def test_a_structure_whose_merge_deviates_runs_alone_from_then_on() -> None:
    executor = CountedExecutor(lambda x: x - x.mean(0, keepdim=True) if len(x) > 1 else x)
    batches = make(executor)
    known(batches)
    executor.sizes.clear()
    forwards = waiting(batches, [1.0, 2.0])
    assert not batches.may_share(forwards[0])
    batches.run(forwards)
    assert outputs(forwards) == [1.0, 2.0]
    assert executor.sizes == [1, 1]
    assert batches.statistics.refused_structures == 1


@given(num=st.integers(2, 8), bad=st.integers(0, 7))
@settings(deadline=None)
def test_halving_finds_the_one_forward_that_fails(num: int, bad: int) -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        if bool((x == bad % num).any()):
            raise ValueError("the bad one")
        return 2 * x

    batches = make(CountedExecutor(compute))
    known(batches, width=3)
    forwards = waiting(batches, [float(i) for i in range(num)])
    batches.run(forwards)
    assert [i for i, forward in enumerate(forwards) if forward.error] == [bad % num]
    assert all(forward.output is not None for forward in forwards if not forward.error)


def test_a_batch_that_does_not_fit_lowers_the_bound_and_frees_memory() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError
        return x

    executor = CountedExecutor(compute)
    batches = make(executor)
    known(batches)
    forwards = waiting(batches, [float(i) for i in range(6)])
    batches.run(fill(batches, forwards))
    assert outputs(forwards) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert executor.freed == 3, "six did not fit, and neither did three, twice"
    assert batches.statistics.bisections == 3
    assert len(fill(batches, waiting(batches, [0.0] * 6))) == 2, "the larger half of three did fit"


def test_what_is_known_not_to_fit_is_not_tried_twice_and_frees_nothing() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2 or bool((x == 5).any()):
            raise KnownNotToFitError("a group of ranks ended by it")
        return x

    executor = CountedExecutor(compute)
    batches = make(executor)
    known(batches)
    forwards = waiting(batches, [0.0, 1.0, 2.0, 5.0])
    executor.sizes.clear()
    batches.run(fill(batches, forwards))
    assert [isinstance(forward.error, KnownNotToFitError) for forward in forwards] == [False, False, False, True]
    assert executor.freed == 0
    assert executor.sizes == [4, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
    ],
    ids=["torch", "cuBLAS", "cuDNN", "MPS"],
)
def test_a_device_that_is_full_teaches_a_bound_whatever_library_says_it(error: Exception) -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise error
        return x

    batches = make(CountedExecutor(compute))
    known(batches)
    batches.run(waiting(batches, [0.0] * 4))
    assert len(fill(batches, waiting(batches, [0.0] * 8))) == 2


def test_an_error_that_is_not_of_memory_teaches_no_bound() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise RuntimeError("shapes do not fit")
        return x

    batches = make(CountedExecutor(compute))
    known(batches)
    batches.run(waiting(batches, [0.0] * 4))
    assert len(fill(batches, waiting(batches, [0.0] * 8))) == 8


def test_when_the_halves_run_nothing_of_the_failed_forward_is_left() -> None:
    activations: list[weakref.ref[torch.Tensor]] = []
    left: list[tuple[int, int]] = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        left.append((len(x), sum(each() is not None for each in activations)))
        activation = torch.zeros(len(x), 100)
        activations.append(weakref.ref(activation))
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return x

    batches = make(CountedExecutor(lambda x: x))
    known(batches)
    batches.executor = CountedExecutor(compute)
    batches.run(waiting(batches, [0.0, 1.0, 2.0, 3.0]))
    assert left == [(4, 0), (2, 0), (1, 0), (1, 0), (2, 0), (1, 0), (1, 0)]


def test_a_lone_forward_that_does_not_fit_holds_nothing_though_its_request_has_not_been_told() -> None:
    activations: list[weakref.ref[torch.Tensor]] = []

    def compute(x: torch.Tensor) -> torch.Tensor:
        activation = torch.zeros(100)
        activations.append(weakref.ref(activation))
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    batches = make(CountedExecutor(compute))
    alone = waiting(batches, [1.0])
    batches.run(alone)
    assert isinstance(alone[0].error, torch.OutOfMemoryError)
    assert activations[0]() is None


class TooFull(CountedExecutor):
    """Has no memory until what is kept there for later has gone; `spoil` is done to the forward's input before."""

    def __init__(self, spoil: Compute = lambda x: x) -> None:
        def compute(x: torch.Tensor) -> torch.Tensor:
            spoil(x)
            if not self.freed:
                raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            return 2 * x

        super().__init__(compute)


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_lone_forward_that_does_not_fit_is_made_once_more_with_what_was_freed(deterministic: bool) -> None:
    executor = TooFull()
    batches = make(executor)
    alone = waiting(batches, [3.0], deterministic=deterministic)
    batches.run(alone)
    assert (alone[0].error, outputs(alone)) == (None, [6.0])
    assert (executor.freed, executor.sizes) == (1, [1, 1])


@pytest.mark.parametrize(
    ("spoil", "merge_key"), [(lambda x: x, None), (lambda x: x.add_(1), ())], ids=["a surrounding's", "its input"]
)
def test_a_forward_that_may_have_left_something_behind_is_not_made_again(spoil: Compute, merge_key: Any) -> None:
    """A cache would count a step twice, and what was written over would be computed with."""
    executor = TooFull(spoil)
    batches = make(executor)
    alone = waiting(batches, [3.0], merge_key=merge_key)
    batches.run(alone)
    assert isinstance(alone[0].error, torch.OutOfMemoryError)
    assert executor.sizes == [1]


def test_a_forward_that_has_counted_in_its_arguments_is_not_made_again() -> None:
    counts = {"calls": 0}

    def count(x: torch.Tensor) -> torch.Tensor:
        counts["calls"] += 1
        return x

    executor = TooFull(count)
    batches = make(executor)
    alone = waiting(batches, [3.0])
    alone[0].arguments["counts"] = counts
    batches.run(alone)
    assert isinstance(alone[0].error, torch.OutOfMemoryError)
    assert (executor.sizes, counts) == ([1], {"calls": 1})


# --- surroundings ---


def test_a_batch_runs_in_the_surrounding_of_its_first_and_every_try_enters_anew() -> None:
    entered: list[str] = []

    def surround(name: str) -> Any:
        @contextmanager
        def around() -> Iterator[None]:
            entered.append(name)
            yield
            entered.append(f"left {name}")

        return around

    batches = make(CountedExecutor())
    alone, merged = ["a", "left a", "b", "left b"], ["a", "left a"]
    for expected in ([*alone, *merged, *merged], merged):  # merged with each other, then the first with itself
        entered.clear()
        named = (("a", 1.0), ("b", 2.0))
        pair = [waiting(batches, [x], merge_key="key", surround=surround(name))[0] for name, x in named]
        batches.run(fill(batches, pair))
        assert entered == expected


# --- axes ---


def test_learned_axes_are_used_where_there_are_any() -> None:
    executor = CountedExecutor()
    batches = make(executor)
    batches.axes["model"] = BatchAxes({("x",): 1}, {(): 1})
    forwards = waiting(batches, [1.0, 2.0], samples=2, width=3)
    assert [forward.num_samples for forward in forwards] == [3, 3]
    batches.run(forwards)
    assert [tuple(forward.output.shape) for forward in forwards] == [(2, 3), (2, 3)]


# --- what tells samples by their place ---


class Guided:
    """Perturbs the last third of a batch, as perturbed attention guidance does: by its place, not by what it is."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        plain, perturbed = x[: 2 * len(x) // 3], x[2 * len(x) // 3 :]
        return torch.cat([plain * 2, perturbed * self.strength])


def thirds(batches: Batches, **changes: Any) -> list[Forward]:
    return waiting(batches, [1.0, 2.0], samples=3, merge_key="guided", surround=nullcontext, **changes)


@pytest.mark.parametrize("strength", [-1.0, 2.0001], ids=["much", "less than rounding"])
def test_forwards_whose_parts_are_told_by_their_place_merge_by_position_only(strength: float) -> None:
    executor = CountedExecutor(Guided(strength))
    batches = make(executor)
    pair = thirds(batches, by_position=True)
    batches.run(pair)
    executor.sizes.clear()
    batches.run(again := thirds(batches, by_position=True))
    assert executor.sizes == [6]
    assert [float(forward.output[2, 0]) for forward in again] == pytest.approx([strength, 2 * strength])


@pytest.mark.parametrize(
    "mixing",
    [lambda x: x + 1e-5 * x.mean(), lambda x: x + 1e-5 * x[0], lambda x: x + 1e-5 * torch.arange(len(x))[:, None]],
    ids=["all", "the first", "the place"],
)
def test_surrounded_forwards_that_mix_samples_by_less_than_rounding_never_share(mixing: Compute) -> None:
    executor = CountedExecutor(mixing)
    batches = make(executor)
    batches.run(thirds(batches, by_position=True))
    executor.sizes.clear()
    batches.run(thirds(batches, by_position=True))
    assert executor.sizes == [3, 3]


def test_by_position_only_forwards_of_as_many_samples_share() -> None:
    batches = make(CountedExecutor())
    pair = thirds(batches, by_position=True)
    fewer = waiting(batches, [3.0], samples=2, merge_key="guided", surround=nullcontext, by_position=True)
    assert fill(batches, [*fewer, *pair]) == fewer


# --- gradients ---


def test_a_forward_through_which_the_pipeline_differentiates_runs_alone_and_with_gradients() -> None:
    executor = CountedExecutor(lambda x: x**2)
    batches = make(executor)
    x = torch.full((1, 4), 3.0, requires_grad=True)
    differentiated = Forward(Fiber("f"), None, "model", None, {"x": x}, with_gradients=has_gradients({"x": x}))
    batches.classify(differentiated)
    others = waiting(batches, [1.0])
    assert fill(batches, [differentiated, *others]) == [differentiated]
    with torch.no_grad():
        batches.run([differentiated])
        batches.run(others)
    assert torch.autograd.grad(differentiated.output.sum(), [x])[0].tolist() == [[6.0] * 4]
    assert not others[0].output.requires_grad
    with torch.no_grad():
        assert not has_gradients({"x": x})
    assert not has_gradients({"x": x.detach()})
