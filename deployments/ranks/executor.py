"""Makes the engine's forwards on the ranks of a group; what the ranks cannot make together rank 0 makes alone.

The first forward of each kind is held against one that rank 0 has made alone, as the first merge of a structure is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.batching.closeness import bound, deviation
from deployments.engine.batching.merging import Merger
from deployments.engine.executor import CacheContext, Executor
from deployments.engine.marks import Mark
from deployments.errors import ReplicaUnfitError
from deployments.ranks.channel import Message, message_of
from deployments.ranks.group import RankGroup
from deployments.ranks.place import Place
from deployments.ranks.portions import NoPortionsError, joined, portion_sizes, portions
from deployments.tensors.out_of_memory import is_out_of_memory, let_go
from deployments.tensors.values import copied, map_values
from deployments.tensors.watched import Watched

logger = logging.getLogger(__name__)

INDIVISIBLE = "must be divisible by mesh size"  # what diffusers says of a length that the ranks do not divide
KINDS_KEPT = 4096


class OnRanksError(RuntimeError):
    """A rank has failed at its portion of a forward."""


class RanksExecutor:
    """An Executor. `modules` are those that the ranks have, `axes` the learned ones of a component."""

    def __init__(
        self,
        group: RankGroup,
        alone: Executor,
        modules: Mapping[str, torch.nn.Module],
        axes: Callable[[str], BatchAxes | None] = lambda component: None,
        is_changed: Callable[[Any], bool] = lambda module: False,
    ) -> None:
        """`alone` makes forwards in this process; `is_changed`: whether a module is now as one request has it."""
        self._group, self._alone, self._modules = group, alone, modules
        self._axes, self._is_changed = axes, is_changed
        self._ways: dict[Hashable, bool | None] = {}  # of kinds that were tried: uneven or not; None: rank 0 alone
        self._indivisible: set[Hashable] = set()  # structures with lengths that the ranks do not divide
        self._told: set[str] = set()  # components of which it was told that rank 0 computes alone
        self._free = False  # the other ranks are to give memory back

    def mark(self) -> Mark:
        return self._alone.mark()

    def free_memory(self) -> None:
        self._free = True
        self._alone.free_memory()

    def run(self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any]) -> Any:
        """As an Executor's; raises ReplicaUnfitError too, where the group is lost."""
        self._group.check()
        reason = self._obstacle(component, module)
        if reason is not None:
            return self._run_alone(component, module, context, arguments, reason)
        split = Split(component, module, context, arguments)
        try:
            split.cut(self._axes(component), self._group.args.batch)
        except NoPortionsError as error:
            split.keep_whole(str(error))
        if len(split.pieces) == 1 and self._group.args.ranks_of_sample == 1:
            return self._alone.run(component, module, context, arguments)
        try:
            return self._tried_or_known(split)
        except NoPortionsError as error:
            return self._run_alone(component, module, context, arguments, str(error))

    def _tried_or_known(self, split: Split) -> Any:
        """Raises NoPortionsError where rank 0 must compute alone."""
        structure = split.structure()
        if structure in self._indivisible and not self._group.gathers_uneven:
            raise NoPortionsError("the ranks do not divide a length of it, and gloo gathers equal parts only")
        kind = split.kind(), structure in self._indivisible
        if kind not in self._ways:
            return self._tried(split, kind)
        uneven = self._ways[kind]
        if uneven is None:
            raise NoPortionsError("the ranks cannot compute such forwards")
        try:
            return self._exchanged(split, uneven)
        except AssertionError as error:
            if INDIVISIBLE not in str(error) or structure in self._indivisible:
                raise
        self._indivisible.add(structure)
        return self._tried_or_known(split)

    def _obstacle(self, component: str, module: Any) -> str | None:
        """Why rank 0 must compute alone."""
        if module is not self._modules.get(component):
            return "the ranks do not have this module"
        if self._is_changed(module):
            return "the request's pipeline has changed it"
        return "the pipeline asks for gradients" if torch.is_grad_enabled() else None

    def _run_alone(
        self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any], reason: str
    ) -> Any:
        if component not in self._told:
            self._told.add(component)
            logger.warning("parallel: rank 0 computes forwards of %s alone: %s", component, reason)
        splits = self._group.met.splits
        with splits[component].whole() if component in splits else nullcontext():
            return self._alone.run(component, module, context, arguments)

    def _tried(self, split: Split, kind: tuple[Hashable, bool]) -> Any:
        """The first of its kind: the ranks' output, where it is that of rank 0 alone but for rounding."""
        if len(self._ways) >= KINDS_KEPT:
            self._ways.clear()
        given = copied(split.arguments)
        watched = Watched(given)
        whole = self._whole(split, given)
        reason = "they write into what they are given" if watched.is_written() or watched.counted() else ""
        for uneven in () if reason else self._ways_to_try(split):
            try:
                output = self._exchanged(split, uneven)
            except (ReplicaUnfitError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if is_out_of_memory(error) or not self._holds_all(split.component):
                    raise
                if INDIVISIBLE in str(error) and not kind[1]:
                    self._indivisible.add(split.structure())
                    return self._tried_or_known(split)
                reason = f"{type(error).__name__}: {error}"
                continue
            if whole is None:
                why = "does not fit on one device" if self._holds_all(split.component) else "is nowhere as a whole"
                logger.warning("parallel: %s %s: the ranks are not checked", split.component, why)
                apart = 0.0
            else:
                apart = deviation(output, whole)
            if whole is None or apart <= bound(whole, math.inf):
                self._ways[kind] = uneven
                return output
            reason = f"what the ranks make deviates by {apart:.1e}"
        self._ways[kind] = None
        raise NoPortionsError(reason)

    def _ways_to_try(self, split: Split) -> tuple[bool, ...]:
        """Whether lengths that the ranks do not divide are split: what does so takes more masks too."""
        if split.component not in self._group.met.splits:
            return (False,)
        return (True,) if split.structure() in self._indivisible else (False, True)

    def _holds_all(self, component: str) -> bool:
        """Whether a rank can compute alone."""
        splits = self._group.met.splits
        return component not in splits or splits[component].holds_all

    def _whole(self, split: Split, arguments: dict[str, Any]) -> Any:
        """The output of rank 0 alone; None where it does not fit on its device, or rank 0 has a part of the weights."""
        splits = self._group.met.splits
        if not self._holds_all(split.component):
            return None
        try:
            with splits[split.component].whole() if split.component in splits else nullcontext():
                return self._alone.run(split.component, split.module, split.context, arguments)
        except Exception as error:
            if not is_out_of_memory(error) or split.component not in splits:
                raise
            let_go(error)
        self.free_memory()
        return None

    # -- on the ranks --------------------------------------------------------------------------------------------------

    def _exchanged(self, split: Split, uneven: bool) -> Any:
        """The forward on all ranks that have a portion of it."""
        asked = [place for place in self._group.others if place.sample < len(split.pieces)]
        try:
            messages = [message_of(split.message(index, uneven, self._free)) for index in range(len(split.pieces))]
        except TypeError as error:
            raise NoPortionsError(str(error)) from error
        self._free = False
        for place in asked:
            self._send(messages[place.sample], place)
        failure: BaseException | None = None
        splits = self._group.met.splits
        if split.component in splits:
            splits[split.component].set_uneven(uneven)
        output = None
        try:
            output = self._alone.run(split.component, split.module, split.context, split.pieces[0])
        except Exception as raised:  # noqa: BLE001  (raised again when the other ranks have told how it went there)
            failure = raised
        try:
            answers = {place: self._answer_of(place) for place in asked}
            self._check_answers(answers, failure)
        finally:
            del failure  # it holds this frame, and with it all tensors
        outputs = [answers[place]["output"] for place in asked if place.answers]
        return joined([output, *outputs], split.axes) if outputs and split.axes is not None else output

    def _send(self, message: Message, place: Place) -> None:
        with self._group.reaching(place.rank):
            self._group.met.channel.ask(message, place.rank)

    def _answer_of(self, place: Place) -> dict[str, Any]:
        with self._group.reaching(place.rank):
            answer: dict[str, Any] = self._group.met.channel.answer_of(place.rank)
            return answer

    def _check_answers(self, answers: Mapping[Place, dict[str, Any]], own: BaseException | None) -> None:
        """Raises what the forward raised, where the ranks of each sample have all failed or all not: they are in step.
        Else some wait for others that have given up, and the group ends.
        """
        failed = {0: own is not None} | {place.rank: answer["error"] is not None for place, answer in answers.items()}
        per_sample = self._group.args.ranks_of_sample
        for first in range(0, self._group.args.size, per_sample):
            ranks = [rank for rank in range(first, first + per_sample) if rank in failed]
            if len({failed[rank] for rank in ranks}) > 1:
                reasons = [answer["error"] for answer in answers.values() if answer["error"]]
                self._group.end(f"the ranks are not in step: {'; '.join([*reasons, *([str(own)] if own else [])])}")
                self._group.check()
        try:
            if own is not None:
                raise own
        finally:
            del own
        for place, answer in answers.items():
            if answer["error"] is not None:
                text = f"rank {place.rank}: {answer['error']}"
                raise torch.OutOfMemoryError(text) if answer["lacks_memory"] else OnRanksError(text)


class Split:
    """A forward, and its samples in portions."""

    def __init__(self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any]) -> None:
        self.component, self.module, self.context, self.arguments = component, module, context, arguments
        self.axes: BatchAxes | None = None
        self.num_samples = 1
        self.pieces: Sequence[dict[str, Any]] = [arguments]

    def cut(self, axes: BatchAxes | None, num_portions: int) -> None:
        """Raises NoPortionsError."""
        if num_portions == 1 or axes is None:
            return
        self.axes = axes
        self.num_samples = Merger(axes).num_samples(self.arguments)
        self.pieces = portions(self.arguments, axes, portion_sizes(self.num_samples, num_portions))

    def keep_whole(self, reason: str) -> None:
        logger.info("the samples of a forward of %s stay together: %s", self.component, reason)
        self.pieces = [self.arguments]

    def kind(self) -> Hashable:
        """Equal for forwards that one trial is for: of whatever sizes."""
        context = self.context[0] if self.context else None
        return self.component, context, len(self.pieces), self.num_samples, repr(map_values(_kind_of, self.arguments))

    def structure(self) -> Hashable:
        """Equal for forwards of the same sizes."""
        return self.component, repr(map_values(_shape_of, self.arguments))

    def message(self, index: int, uneven: bool, free: bool) -> dict[str, Any]:
        """What the ranks of a portion are asked; raises TypeError for what no message may carry."""
        return {
            "component": self.component,
            "context": self.context,
            "arguments": self.pieces[index],
            "uneven": uneven,
            "free": free,
        }


def _kind_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.ndim, str(value.dtype)
    return value if isinstance(value, bool | str) else type(value).__name__


def _shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
