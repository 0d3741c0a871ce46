"""Which forwards share a batch, and how it runs: as one where that was verified to give the same, else one by one."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from contextlib import nullcontext
from typing import Any

import torch

from deployments.engine.axes import BatchAxes, Path
from deployments.engine.executor import Executor
from deployments.engine.forward import Forward, Structure, shape_of_sample, tokens_per_sample
from deployments.engine.merging import CannotMergeError, Merger
from deployments.engine.statistics import EngineStatistics
from deployments.engine.under_way import UnderWay
from deployments.tensors.values import tensors
from deployments.tensors.watched import Watched

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # relative to the largest value of the lone forward
HALF_TOLERANCE = 5e-2  # float16 and bfloat16
STRUCTURES_KEPT = 4096


class Batches:
    """Fills and runs the engine's batches, in its thread; learns which structures merge and how much fits."""

    def __init__(
        self,
        max_batch_size: int,
        max_batch_tokens: int | None,
        executor: Executor,
        statistics: EngineStatistics,
        under_way: UnderWay | None = None,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.executor = executor
        self.statistics = statistics
        self.under_way = under_way or UnderWay()
        self.axes: dict[str, BatchAxes] = {}  # of each module, as they were learned
        self._structures: dict[Hashable, Structure] = {}
        self._shares: dict[Structure, frozenset[Path] | None] = {}  # verified structures; None: never merge
        self._caps: dict[Structure, int] = {}  # samples that fit into memory, learned

    def classify(self, forward: Forward) -> None:
        """Notes what the forward may be merged with."""
        merger = Merger(self.axes.get(forward.component), forward.by_position)
        forward.merger = merger
        forward.num_samples = merger.num_samples(forward.arguments)
        context = forward.context[0] if forward.context else None
        try:
            if forward.is_alone:
                raise CannotMergeError("what surrounds it is for this forward alone")
            structure = merger.structure(forward.arguments, forward.num_samples)
            samples = forward.num_samples if forward.by_position else None
            key = (forward.component, context, merger.axes is None, forward.merge_key, samples, structure)
            forward.structure = self._known(key, forward)
        except CannotMergeError:
            forward.structure = Structure(None, shape_of_sample(forward), is_alone=True)

    def _known(self, key: Hashable, forward: Forward) -> Structure:
        if key not in self._structures:
            if len(self._structures) >= STRUCTURES_KEPT:
                for known in (self._structures, self._shares, self._caps):
                    known.clear()
            self._structures[key] = Structure(key, shape_of_sample(forward))
        return self._structures[key]

    def may_share(self, forward: Forward) -> bool:
        alone = forward.fiber.deterministic or forward.structure.is_alone
        return not alone and self._shares.get(forward.structure, frozenset()) is not None

    def is_known(self, structure: Structure) -> bool:
        """Whether forwards of it have been merged before, or been found not to merge."""
        return structure in self._shares

    def fill(self, ranked: list[Forward]) -> list[Forward]:
        """The first forward and as many of the others as share its batch, in their order."""
        first = ranked[0]
        cap = self._caps.get(first.structure, self.max_batch_size * first.num_samples)  # in samples
        if self.max_batch_tokens is not None:
            cap = min(cap, max(1, self.max_batch_tokens // max(1, tokens_per_sample(first))))
        batch, samples = [first], first.num_samples
        if not self.may_share(first):
            return batch
        for forward in ranked[1:]:
            fits = len(batch) < self.max_batch_size and samples + forward.num_samples <= max(cap, first.num_samples)
            if fits and forward.structure is first.structure and not forward.fiber.deterministic:
                batch.append(forward)
                samples += forward.num_samples
        return batch

    def run(self, batch: list[Forward]) -> None:
        """Fills in each forward's output or error; an error in a batch is narrowed down by halving it."""
        if len(batch) == 1:
            self._run_alone(batch[0])
            return
        try:
            outputs = self._merged(batch)
        except Exception as error:  # noqa: BLE001  (whose fault it is shows when the halves run)
            self._learn_cap(batch, error)
            self.statistics.bisections += 1
            middle = len(batch) // 2
            self.run(batch[:middle])
            self.run(batch[middle:])
            return
        for forward, output in zip(batch, outputs, strict=True):
            forward.output = output

    def _run_alone(self, forward: Forward) -> None:
        try:
            forward.output = self._call(forward, forward.arguments)
        except BaseException as error:  # noqa: BLE001  (raised where the fiber waits)
            forward.error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)  # not this frame

    def _learn_cap(self, batch: list[Forward], error: Exception) -> None:
        if isinstance(error, torch.OutOfMemoryError):
            self._caps[batch[0].structure] = max(1, sum(f.num_samples for f in batch) // 2)
            self.executor.free_memory()

    def _merged(self, batch: list[Forward]) -> list[Any]:
        structure, merger = batch[0].structure, batch[0].merger
        assert merger is not None
        if structure not in self._shares:
            return self._verified_merge(batch, merger)
        shared = self._shares[structure]
        if shared is None:
            return [self._call(f, f.arguments) for f in batch]
        try:
            return self._call_merged(batch, merger, shared)
        except CannotMergeError:  # an argument that was equal before differs this time
            return [self._call(f, f.arguments) for f in batch]

    def _verified_merge(self, batch: list[Forward], merger: Merger) -> list[Any]:
        """The first merge of a structure: lone forwards too, and what deviates from them is never merged."""
        alone, is_written = [], False
        for forward in batch:
            watched = Watched(forward.arguments)
            alone.append(self._call(forward, forward.arguments))
            is_written |= watched.is_written()
        for shared in [] if is_written else merger.shared_guesses([f.arguments for f in batch]):
            try:
                merged = self._call_merged(batch, merger, shared)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001  (a wrong guess of the axes)
                logger.info("%s does not merge so: %s", batch[0].component, error)
                continue
            if all(is_close(m, a) for m, a in zip(merged, alone, strict=True)) and (
                not merger.by_position or self._is_apart(batch, merger, shared, merged)
            ):
                self._shares[batch[0].structure] = shared
                return alone
        reason = "they write into what they are given" if is_written else "merged ones deviate"
        logger.warning("forwards of %s run alone: %s", batch[0].component, reason)
        self._shares[batch[0].structure] = None
        self.statistics.refused_structures += 1
        return alone

    def _is_apart(self, batch: list[Forward], merger: Merger, shared: frozenset[Path], merged: list[Any]) -> bool:
        """Whether the neighbours in a batch change no bit of a forward, at whatever place in it.

        What surrounds these forwards may mix samples by so little that rounding hides it.
        """
        for index in (0, -1):
            copies = self._call_merged([batch[index]] * len(batch), merger, shared)
            if not all(is_same(copy, merged[index]) for copy in copies):
                return False
        return True

    def _call_merged(self, batch: list[Forward], merger: Merger, shared: frozenset[Path]) -> list[Any]:
        counts = [f.num_samples for f in batch]
        arguments = merger.merge([f.arguments for f in batch], counts, shared)
        return merger.split(self._call(batch[0], arguments, sum(counts)), counts)

    def _call(self, forward: Forward, arguments: dict[str, Any], num_samples: int | None = None) -> Any:
        kind = (forward.component, forward.structure.shape, num_samples or forward.num_samples)
        surround = forward.surround() if forward.surround else nullcontext()
        with self.under_way.work(kind), surround, torch.set_grad_enabled(forward.with_gradients):
            return self.executor.run(forward.component, forward.module, forward.context, arguments)


def is_same(a: Any, b: Any) -> bool:
    """Whether two outputs have the same bits; NaN is like NaN."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all(bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in pairs)


def is_close(merged: Any, alone: Any) -> bool:
    """Whether a merged forward's output is the lone one's but for rounding."""
    for a, b in zip(tensors(merged), tensors(alone), strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        tolerance = TOLERANCE.get(b.dtype, HALF_TOLERANCE)
        if not b.is_floating_point():
            return torch.equal(a, b)
        # What one sample has made NaN of itself stays NaN; it may not spread to others.
        if not torch.equal(a.isfinite(), b.isfinite()):
            return False
        a, b = (x.nan_to_num(0.0, 0.0, 0.0).float() for x in (a, b))
        if not bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-12)):
            return False
    return True
