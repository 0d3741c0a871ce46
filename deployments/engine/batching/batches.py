"""Which forwards share a batch, and how it runs: as one where that was verified to give the same, else one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from deployments.engine.batching.axes import BatchAxes, Path
from deployments.engine.batching.caps import Caps
from deployments.engine.batching.equality import ProvenEqual
from deployments.engine.batching.joining import GuidancePasses, Joining, Merging, passes_of
from deployments.engine.batching.latents import shape_of_sample, tokens_per_sample
from deployments.engine.batching.merging import CannotMergeError, Merger
from deployments.engine.batching.mixing import Mixing
from deployments.engine.batching.trial import Trial, Verdict
from deployments.engine.executor import Executor
from deployments.engine.forward import Forward, Structure
from deployments.engine.statistics import EngineStatistics, Measure, StructureRefused, ignore
from deployments.engine.step_costs import StepCosts
from deployments.engine.under_way import UnderWay
from deployments.tensors.out_of_memory import KnownNotToFitError, is_out_of_memory, let_go
from deployments.tensors.watched import Watched

logger = logging.getLogger(__name__)

STRUCTURES_KEPT = 4096


class Batches:
    """Fills and runs the batches, in the engine's thread; learns what merges, what fits into memory, what it costs."""

    def __init__(
        self,
        max_batch_size: int,
        max_batch_tokens: int | None,
        executor: Executor,
        statistics: EngineStatistics,
        under_way: UnderWay | None = None,
        merging: Merging = "auto",
        guidance_passes: GuidancePasses = "apart",
        compilation_s: Callable[[], float] = lambda: 0.0,
        measure: Measure = ignore,
    ) -> None:
        """`compilation_s` and `measure`: as the engine's."""
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        self.executor = executor
        self.statistics = statistics
        self.under_way = under_way or UnderWay()
        self.compilation_s = compilation_s
        self.measure = measure
        self.axes: dict[str, BatchAxes] = {}  # of each module, as they were learned
        self.costs = StepCosts()
        self.joining = Joining(self.costs, merging, guidance_passes)
        self.caps = Caps()
        self.mixing = Mixing()
        self._are_equal = ProvenEqual()
        self._structures: dict[Hashable, Structure] = {}
        self._shares: dict[Structure, frozenset[Path] | None] = {}  # verified structures; None: never merge
        self._done: set[Hashable] = set()  # kinds of forwards that the device has done once
        self._before: dict[tuple[str, str], tuple[int, int]] = {}  # see `did_not_fit_before`

    def classify(self, forward: Forward) -> None:
        """Notes what the forward may be merged with."""
        merger = Merger(self.axes.get(forward.component), forward.by_position, self._are_equal)
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
            forward.structure = Structure(None, shape_of_sample(forward.arguments), is_alone=True)

    def _known(self, key: Hashable, forward: Forward) -> Structure:
        if key not in self._structures:
            if len(self._structures) >= STRUCTURES_KEPT:
                for known in (self._structures, self._shares, self._done, self.caps, self.joining, self.mixing):
                    known.clear()
            self._structures[key] = structure = Structure(key, shape_of_sample(forward.arguments))
            if (before := self._before.get((forward.component, structure.shape))) is not None:
                self.caps.did_not_fit_before(structure, *before)
        return self._structures[key]

    def did_not_fit_before(self, component: str, shape: str, samples: int, deaths: int) -> None:
        """As the caps': for forwards of samples of this shape."""
        self._before[component, shape] = samples, deaths

    def may_share(self, forward: Forward) -> bool:
        alone = forward.fiber.deterministic or forward.structure.is_alone
        return not alone and self._shares.get(forward.structure, frozenset()) is not None

    def is_known(self, structure: Structure) -> bool:
        """Whether the merge of its forwards was verified, or refused."""
        return structure in self._shares

    def is_verified(self, batch: Sequence[Forward]) -> bool:
        """Whether it is known that these merge, or that they do not."""
        return self.is_known(batch[0].structure) and self.mixing.is_right(batch)

    # -- filling ---------------------------------------------------------------------------------------------

    def fill(self, ranked: list[Forward], now: float) -> list[Forward]:
        """The first forward and as many of the others as share its batch, in their order."""
        first = ranked[0]
        if not self.may_share(first):
            return [first]
        alike = [f for f in ranked if f is first or (f.structure is first.structure and not f.fiber.deterministic)]
        sharing = self.mixing.sharing(alike)
        batch, pair = self._that_fit(sharing.batch), self._that_fit(sharing.untried) if sharing.untried else []
        is_known = self.is_known(first.structure)
        parts_passes = len(batch) > 1 and len(passes_of(batch)[0]) > 1
        if (
            len(pair) == 2
            and not parts_passes
            and (self.joining.size(pair, 2, now) == 2 if is_known else len(batch) == 1)
        ):
            batch = pair
        if len(batch) == 1:
            return batch
        if not is_known:
            return batch[: self.joining.size_of_trial(batch)]
        return batch if batch is pair else batch[: self.joining.size(batch, len(passes_of(sharing.batch)), now)]

    def _that_fit(self, alike: list[Forward]) -> list[Forward]:
        """The passes of the first fiber as far as they do, and all those of others or none."""
        (first, *more), *others = passes_of(alike)
        most = max(self.max_batch_size, 1 + len(more))
        cap = self.caps.of(first.structure) or most * first.num_samples
        if self.max_batch_tokens is not None:
            tokens = tokens_per_sample(first.arguments, first.module, first.num_samples)
            cap = min(cap, max(1, self.max_batch_tokens // tokens))
        batch, samples = [first], first.num_samples
        for passes in [*([each] for each in more), *others]:
            added = sum(forward.num_samples for forward in passes)
            if len(batch) + len(passes) <= most and samples + added <= cap:
                batch += passes
                samples += added
        return batch

    # -- running ---------------------------------------------------------------------------------------------

    def run(self, batch: list[Forward]) -> None:
        """Fills in each forward's output or error; an error in a batch is narrowed down by halving it."""
        if len(batch) == 1:
            self._run_alone(batch[0])
        elif not self._run_together(batch):
            # Not where the error was caught: it would hold what the failed forward had allocated.
            self.statistics.bisections += 1
            middle = len(batch) // 2
            self.run(batch[:middle])
            self.run(batch[middle:])

    def _run_together(self, batch: list[Forward]) -> bool:
        """False where it failed; whose fault that is shows when the halves run."""
        samples = sum(forward.num_samples for forward in batch)
        try:
            outputs = self._merged(batch)
        except Exception as error:  # noqa: BLE001
            let_go(error)
            does_not_fit, was_tried = is_out_of_memory(error), not isinstance(error, KnownNotToFitError)
        else:
            for forward, output in zip(batch, outputs, strict=True):
                forward.output = output
            self.caps.fits(batch[0].structure, samples, batch[0].num_samples)
            return True
        if does_not_fit:
            self.caps.does_not_fit(batch[0].structure, samples)
            if was_tried:
                self.executor.free_memory()
        return False

    def _run_alone(self, forward: Forward) -> None:
        """Once more with what could be freed, where it did not fit and the failed forward has left nothing behind."""
        watched = Watched(forward.arguments)
        forward.error = self._failed_alone(forward)
        if forward.error is None or not is_out_of_memory(forward.error):
            return
        if isinstance(forward.error, KnownNotToFitError):
            return
        # What surrounds it may keep something, and its arguments what it has counted or written.
        if forward.merge_key is None or watched.is_written() or watched.counted():
            return
        forward.error = None
        self.executor.free_memory()
        forward.error = self._failed_alone(forward)

    def _failed_alone(self, forward: Forward) -> BaseException | None:
        try:
            forward.output = self.call(forward, forward.arguments)
        except BaseException as error:  # noqa: BLE001  (raised where the fiber waits)
            if is_out_of_memory(error):
                let_go(error)
            return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)  # not this frame
        return None

    def _merged(self, batch: list[Forward]) -> list[Any]:
        structure, merger = batch[0].structure, batch[0].merger
        assert merger is not None
        if not self.is_verified(batch):
            return self._tried(batch)
        shared = self._shares[structure]
        if shared is None:
            return [self.call(f, f.arguments) for f in batch]
        try:
            return self.call_merged(batch, merger, shared)
        except CannotMergeError:  # an argument that was equal before differs this time
            return [self.call(f, f.arguments) for f in batch]

    def _tried(self, batch: list[Forward]) -> list[Any]:
        """The first merge of a structure, or of a kind of surrounding in it: the outputs of lone forwards, and whether
        merged ones are the same.
        """
        structure = batch[0].structure
        trial = Trial(self, batch, self._shares.get(structure))
        outputs = trial.lone_outputs()
        verdict = trial.verdict()
        if verdict is None:
            return outputs
        if trial.is_mixed:
            self._note_mixed(batch[:2], verdict)
        elif verdict.pays:
            self._shares[structure] = verdict.shared
        else:
            self.joining.note_vain_trial(structure)
        if verdict.pays and verdict.shared is None:
            logger.warning("forwards of %s run alone: %s", batch[0].component, verdict.reason)
            self.statistics.refused_structures += 1
            self.measure(StructureRefused(batch[0].component))
        is_right = verdict.pays and verdict.shared is not None
        return self._merged(batch) if is_right and self.joining.keeps_together(batch) else outputs

    def _note_mixed(self, pair: Sequence[Forward], verdict: Verdict) -> None:
        """Where they deviate, it is the mixture's fault until forwards that are surrounded alike do so too."""
        structure = pair[0].structure
        if not verdict.pays and not self.is_known(structure):
            self.joining.note_vain_trial(structure)
        if not (verdict.pays and verdict.shows):
            self.mixing.note_vain(pair)
        elif verdict.shared is None:
            self.mixing.note_wrong(pair)
        else:
            self._shares[structure] = verdict.shared
            self.mixing.note_right(pair)

    def call_merged(self, batch: list[Forward], merger: Merger, shared: frozenset[Path]) -> list[Any]:
        """The batch as one forward; raises CannotMergeError, and what the module raises."""
        counts = [f.num_samples for f in batch]
        arguments = merger.merge([f.arguments for f in batch], counts, shared)
        return merger.split(self.call(batch[0], arguments, batch), counts)

    def call(self, forward: Forward, arguments: dict[str, Any], batch: Sequence[Forward] = ()) -> Any:
        """One call of the module, for this forward or a batch that it is the first of.

        The first of a kind is waited for: where it does not fit, or the device fails, its fibers have not gone on.
        """
        batch = batch or [forward]
        kind = (forward.component, forward.structure.shape, sum(each.num_samples for each in batch))
        surround = forward.surround() if forward.surround else nullcontext()
        with self.under_way.work(kind):
            with surround, surrounded_samples(batch), torch.set_grad_enabled(forward.with_gradients):
                output = self.executor.run(forward.component, forward.module, forward.context, arguments)
            if kind not in self._done:
                self.executor.mark().wait()
                self._done.add(kind)
        return output

    def failed_late(self, structure: Structure, kind: Hashable, samples: int, error: BaseException) -> None:
        """The device raised this of a batch whose fibers had gone on; the next of its kind is waited for again."""
        self._done.discard(kind)
        if is_out_of_memory(error):
            self.caps.does_not_fit(structure, samples)
            self.executor.free_memory()


def surrounded_samples(batch: Sequence[Forward]) -> AbstractContextManager[None]:
    """What surrounds the samples of these forwards, in the order of their rows."""
    per_sample = next((forward.per_sample for forward in batch if forward.per_sample is not None), None)
    if per_sample is None:
        return nullcontext()
    first = batch[0]
    if first.by_position:
        values = [(forward.value, 1) for _ in range(first.num_samples) for forward in batch]
    else:
        values = [(forward.value, forward.num_samples) for forward in batch]
    if first.merger is None or all(forward.value == first.value for forward in batch):
        return per_sample.enter(values, True)
    return per_sample.enter(values, first.merger.is_even([forward.arguments for forward in batch]))
