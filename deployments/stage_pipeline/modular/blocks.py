"""The blocks of a modular pipeline as data: which of them need which models, and copies for one request."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from diffusers.modular_pipelines import LoopSequentialPipelineBlocks, ModularPipelineBlocks, PipelineState

Change = list[Any]  # of the state by a block: name, value, the kind of keyword arguments that it belongs to (or None)


def leaves(blocks: ModularPipelineBlocks, path: str = "") -> Iterator[tuple[str, ModularPipelineBlocks]]:
    """Each block that computes, in order, under its path (names joined by "/"); a loop is one of them."""
    if not blocks.sub_blocks or isinstance(blocks, LoopSequentialPipelineBlocks):
        yield path, blocks
        return
    for name, block in blocks.sub_blocks.items():
        yield from leaves(block, f"{path}/{name}")


def order_of_use(blocks: ModularPipelineBlocks) -> str:
    """The components in the order of their use, written as the `model_cpu_offload_seq` of other pipelines.

    Those of the loops stand after all that is used before. A component that is used before and after the last loop
    is left out: both ends need it.
    """
    each = [(block, {spec.name: None for spec in block.expected_components}) for _, block in leaves(blocks)]
    last = max((i for i, (block, _) in enumerate(each) if isinstance(block, LoopSequentialPipelineBlocks)), default=-1)
    looped = _names(names for block, names in each if isinstance(block, LoopSequentialPipelineBlocks))
    before = _names(names for _, names in each[: last + 1])
    after = _names(names for _, names in each[last + 1 :])
    first = [name for name in before if name not in looped and name not in after]
    return "-".join([*first, *looped, *(name for name in after if name not in before)])


def private_blocks(blocks: ModularPipelineBlocks, stages_of: Mapping[str, Collection[str]]) -> ModularPipelineBlocks:
    """A copy for one request: blocks may keep what they computed.

    A block whose models all belong to the encoder stage asks the pipeline's `encode_block` to run it: what it adds to
    the state is small, while a text encoder may return every layer.
    """
    return _copied(blocks, stages_of, "")


def changes_by(block: ModularPipelineBlocks, pipeline: Any, values: dict[str, Any]) -> list[Change]:
    """What the block, run on these values of the state, adds to them or replaces."""
    run = getattr(block, "run_here", block)
    _, state = run(pipeline, PipelineState(dict(values)))
    kinds = {name: kind for kind, names in state.kwargs_mapping.items() for name in names}
    changed = {n: value for n, value in state.values.items() if n not in values or value is not values[n]}
    return [[name, value, kinds.get(name)] for name, value in changed.items()]


def _names(each: Iterator[dict[str, None]]) -> dict[str, None]:
    return {name: None for names in each for name in names}


def _copied(block: ModularPipelineBlocks, stages_of: Mapping[str, Collection[str]], path: str) -> ModularPipelineBlocks:
    private = copy.copy(block)
    children = {name: _copied(child, stages_of, f"{path}/{name}") for name, child in block.sub_blocks.items()}
    private.sub_blocks = type(block.sub_blocks)(children)
    if not children and _only_encodes(block, stages_of):
        cls: Any = type(block)
        private.__class__ = _asking_class(cls)
        private.__dict__["path"] = path
    return private


def _only_encodes(block: ModularPipelineBlocks, stages_of: Mapping[str, Collection[str]]) -> bool:
    models = [spec.name for spec in block.expected_components if spec.name in stages_of]
    encodes = bool(models) and all(set(stages_of[name]) == {"encoder"} for name in models)
    return encodes and all(param.name for param in block.inputs)  # an input without a name is any number of them


@functools.cache
def _asking_class(cls: Any) -> Any:
    """A subclass under the same name that leaves its work to the pipeline's `encode_block`."""

    def ask(self: Any, pipeline: Any, state: PipelineState) -> tuple[Any, PipelineState]:
        values = {name: state.get(name) for name in self.input_names}
        for name, value, kind in pipeline.encode_block(self.path, values):
            state.set(name, value, kind)
        return pipeline, state

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__call__": ask, "run_here": cls.__call__})
