"""The first merge of a structure: what is wrong is refused, in half precision too, and what differs is tried."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.batching.batches import Batches
from deployments.engine.fiber import Fiber
from deployments.engine.forward import Forward
from deployments.engine.marks import HostMark
from deployments.engine.statistics import EngineStatistics

HIDDEN = 64
MIX = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(7)) / 8

Model = Callable[..., torch.Tensor]


class Runs:
    """An executor of a model of a few lines."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.calls = 0

    def run(self, component: str, module: Any, context: Any, arguments: dict[str, Any]) -> Any:
        self.calls += 1
        return self.model(**arguments)

    def mark(self) -> HostMark:
        return HostMark()

    def free_memory(self) -> None:
        raise AssertionError


def tried(model: Model, *forwards: dict[str, Any], axes: BatchAxes | None = None) -> Batches:
    """After the first merge of these; each must have got what it gets alone."""
    batches = Batches(8, None, Runs(model), EngineStatistics(), merging="always")
    if axes is not None:
        batches.axes["model"] = axes
    made = [Forward(Fiber("f"), None, "model", None, arguments) for arguments in forwards]
    for forward in made:
        batches.classify(forward)
    batches.run(made)
    for forward in made:
        assert torch.equal(forward.output, model(**forward.arguments))
    return batches


def arguments(seed: int, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 8, HIDDEN, generator=generator).to(dtype),
        "timestep": torch.tensor([0.9 - 0.1 * seed]),
        **more,
    }


def block(hidden_states: torch.Tensor, timestep: torch.Tensor, **_: Any) -> torch.Tensor:
    """Rounds differently in a batch, as kernels do that take other tiles."""
    mix = MIX.to(hidden_states.dtype)
    halves = (
        hidden_states[..., : HIDDEN // 2] @ mix[: HIDDEN // 2],
        hidden_states[..., HIDDEN // 2 :] @ mix[HIDDEN // 2 :],
    )
    mixed = halves[0] + halves[1] if len(hidden_states) > 1 else hidden_states @ mix
    return mixed * timestep.reshape(-1, 1, 1).cos().to(hidden_states.dtype)


def is_merged(batches: Batches) -> bool:
    (shared,) = batches._shares.values()
    return shared is not None


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
def test_what_only_rounds_differently_is_merged(dtype: torch.dtype) -> None:
    assert is_merged(tried(block, arguments(0, dtype), arguments(1, dtype)))


@DTYPES
def test_an_error_of_one_percent_in_merged_forwards_is_refused(dtype: torch.dtype) -> None:
    def wrong(hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Mixes its samples a little."""
        made = block(hidden_states, timestep)
        return made + 0.01 * (made.flip(0) - made) * (len(made) > 1)

    batches = tried(wrong, arguments(0, dtype), arguments(1, dtype))
    assert not is_merged(batches)
    assert batches.statistics.refused_structures == 1


@DTYPES
def test_a_guessed_axis_that_is_that_of_the_layers_is_refused(dtype: torch.dtype) -> None:
    """HiDream's embeddings [layers, B, L, D]: their layers are as divisible by two as a batch is."""

    def hidream(hidden_states: torch.Tensor, timestep: torch.Tensor, llama: torch.Tensor) -> torch.Tensor:
        for layer in range(4):
            hidden_states = hidden_states + 0.02 * llama[layer].mean(1, keepdim=True)
        return block(hidden_states, timestep)

    def layers(seed: int) -> torch.Tensor:
        return torch.randn(4, 1, 6, HIDDEN, generator=torch.Generator().manual_seed(seed + 50)).to(dtype)

    pair = [arguments(seed, dtype, llama=layers(seed)) for seed in (0, 1)]
    assert not is_merged(tried(hidream, *pair))
    axes = BatchAxes({("hidden_states",): 0, ("timestep",): 0, ("llama",): 1}, {(): 0})
    assert is_merged(tried(hidream, *pair, axes=axes))
    one_prompt = [arguments(seed, dtype, llama=layers(0)) for seed in (0, 1)]
    batches = tried(hidream, *one_prompt)
    assert list(batches._shares.values()) == [{("llama",)}], (
        "equal embeddings hide no wrong axis: given once, no others"
    )


@pytest.mark.parametrize("kind", ["guidance", "embeddings", "time step"])
def test_an_argument_that_both_have_in_common_is_tried_with_another_value(kind: str) -> None:
    """Each sample gets that of the first: right for these two, and for no others."""

    def first_for_all(
        hidden_states: torch.Tensor, timestep: torch.Tensor, guidance: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        guidance = guidance[:1] if kind == "guidance" else guidance
        text = text[:1] if kind == "embeddings" else text
        timestep = timestep[:1] if kind == "time step" else timestep
        made = block(hidden_states, timestep.expand(len(hidden_states)))
        return made * guidance.reshape(-1, 1, 1) + text.softmax(-1).cumsum(-1).mean(1, keepdim=True)

    common = {
        "guidance": torch.tensor([3.5]),
        "text": torch.randn(1, 5, HIDDEN, generator=torch.Generator().manual_seed(3)),
        "timestep": torch.tensor([0.5]),
    }
    names = ["hidden_states", "timestep", "guidance", "text"]
    axes = BatchAxes({(name,): 0 for name in names}, {(): 0})
    pair = [{**arguments(seed, torch.float32), **common} for seed in (0, 1)]
    assert not is_merged(tried(first_for_all, *pair, axes=axes))


def test_what_a_trial_costs_is_bounded_however_many_wait() -> None:
    forwards = [arguments(seed, torch.float32) for seed in range(8)]
    batches = tried(block, *forwards)
    executor = batches.executor
    assert isinstance(executor, Runs)
    assert executor.calls == len(forwards) + 2, "the first two merged, and the first with itself"


def test_a_model_that_takes_no_other_value_is_judged_by_what_it_takes() -> None:
    def picky(hidden_states: torch.Tensor, timestep: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if bool((scale != 2.0).any()):
            raise ValueError("the scale must be 2")
        return block(hidden_states, timestep) * scale.reshape(-1, 1, 1)

    pair = [arguments(seed, torch.float32, scale=torch.tensor([2.0])) for seed in (0, 1)]
    assert is_merged(tried(picky, *pair))


class Compiles(Runs):
    """By a played clock: a forward of any number of samples takes a second, those by number half a minute more."""

    def __init__(self, model: Model, compiling: tuple[int, ...]) -> None:
        super().__init__(model)
        self.compiling = compiling
        self.now = self.compilation_s = 0.0

    def run(self, component: str, module: Any, context: Any, arguments: dict[str, Any]) -> Any:
        if self.calls in self.compiling:
            self.now += 30
            self.compilation_s += 31
        self.now += 1
        return super().run(component, module, context, arguments)

    def mark(self) -> HostMark:
        return HostMark(lambda: self.now)


@pytest.mark.parametrize(("compiling", "is_known"), [((0,), False), ((1,), False), ((2,), True), ((2, 3), False)])
def test_what_is_compiled_in_a_trial_is_no_measure_of_it(compiling: tuple[int, ...], is_known: bool) -> None:
    executor = Compiles(block, compiling)
    batches = Batches(8, None, executor, EngineStatistics(), compilation_s=lambda: executor.compilation_s)
    for knows in (is_known, True):
        pair = [Forward(Fiber("f"), None, "model", None, arguments(seed, torch.float32)) for seed in (0, 1)]
        for forward in pair:
            batches.classify(forward)
        batches.run(pair)
        assert batches.is_known(pair[0].structure) is knows
    assert is_merged(batches)
    structure = pair[0].structure
    assert [batches.costs.predict(structure, samples) for samples in (1, 2)] == [1.0, 1.0]
