"""Makes the engine's forwards on the ranks of a group; what the ranks cannot make together rank 0 makes alone.

The first forward of each kind is held against one that rank 0 has made alone, as the first merge of a structure is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from deployments.engine.batching.axes import BatchAxes
from deployments.engine.batching.closeness import deviation
from deployments.engine.batching.merging import Merger
from deployments.engine.executor import CacheContext, Executor
from deployments.engine.marks import Mark
from deployments.errors import ReplicaUnfitError
from deployments.ranks.adapters import AdaptersHere, HeldByOthers, NoAdapters, Used, hold_message
from deployments.ranks.channel import Message, message_of
from deployments.ranks.group import RankGroup
from deployments.ranks.loss.alone_log import AloneLog
from deployments.ranks.loss.connection import is_of_connection
from deployments.ranks.loss.lack import Refusals, lack_of
from deployments.ranks.loss.left_alone import Failure, reason_of
from deployments.ranks.loss.questions import Answers, Questions
from deployments.ranks.place import Place
from deployments.ranks.portions import NoPortionsError, joined, portion_sizes, portions
from deployments.ranks.trial import is_close_enough, wrong_portion
from deployments.tensors.out_of_memory import KnownNotToFitError, is_out_of_memory, let_go
from deployments.tensors.values import copied, map_values
from deployments.tensors.watched import Watched

logger = logging.getLogger(__name__)

INDIVISIBLE = "must be divisible by mesh size"  # what diffusers says of a length that the ranks do not divide
KINDS_KEPT = 4096
IN_VAIN = 3  # sizes in a row that the ranks do not make: then it is not the sizes


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
        adapters: AdaptersHere | None = None,
    ) -> None:
        """`alone` makes forwards in this process; `is_changed`: whether a module is now as one request has it.
        `adapters`: those of requests; None: they have none."""
        self._group, self._alone, self._modules = group, alone, modules
        self._axes, self._is_changed = axes, is_changed
        self._ways: dict[Hashable, bool | None] = {}  # of kinds that were tried: uneven or not; None: rank 0 alone
        self._indivisible: set[Hashable] = set()  # structures with lengths that the ranks do not divide
        self._not_by_ranks: set[Hashable] = set()  # structures at which the ranks fail, of kinds that they make
        self._adapters = adapters or NoAdapters()
        self._held = HeldByOthers()
        self._refusals = Refusals(group.lacks)
        self._questions = Questions(group)
        self._log = AloneLog("parallel")
        self._vain = 0  # structures in a row at which the ranks failed
        self._free = False  # the other ranks are to give memory back

    def mark(self) -> Mark:
        return self._alone.mark()

    def free_memory(self) -> None:
        self._free = True
        self._alone.free_memory()

    def run(self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any]) -> Any:
        """As an Executor's; raises ReplicaUnfitError too, where the group is lost, and KnownNotToFitError for what
        groups before have ended by."""
        self._group.check()
        reason = self._obstacle(component, module)
        if reason is not None:
            return self._run_alone(component, module, context, arguments, reason)
        split = Split(component, module, context, arguments, self._adapters.used(module))
        try:
            split.cut(self._axes(component), self._group.args.batch)
        except NoPortionsError as error:
            split.keep_whole(str(error))
        if len(split.pieces) == 1 and self._group.args.ranks_of_sample == 1:
            return self._alone.run(component, module, context, arguments)
        try:
            self._let_hold(split)
            return self._tried_or_known(split)
        except NoPortionsError as error:
            return self._run_alone(component, module, context, arguments, str(error))

    def _let_hold(self, split: Split) -> None:
        """The forward's LoRAs on all ranks. Raises NoPortionsError where one cannot have them."""
        if split.used is None or self._held.has(split.used.names):
            return
        uses = self._held.to_ask(split.used.names, self._adapters.uses())
        message = message_of(hold_message(uses) | {"number": self._questions.next_number()})
        with self._questions.asked({place.rank: message for place in self._group.others}) as answers:
            told = answers()
        self._held.note(split.used.names, uses.keys(), told)

    def _around(self, split: Split, index: int) -> AbstractContextManager[None]:
        """A portion of the forward made here, of which the surroundings are the whole one's."""
        used = split.used_by[index]
        if used is None or len(split.pieces) == 1:
            return nullcontext()
        return self._adapters.around(split.module, used)

    def _tried_or_known(self, split: Split) -> Any:
        """Raises NoPortionsError where rank 0 must compute alone."""
        structure = split.structure()
        if structure in self._not_by_ranks:
            raise NoPortionsError("the ranks cannot compute such forwards")
        kind = split.kind(), structure in self._indivisible
        uneven = self._ways.get(kind, False)
        if uneven is None:
            raise NoPortionsError("the ranks cannot compute such forwards")
        refusal = self._refusals.reason(split.component, split.arguments, self._axes(split.component))
        if refusal is not None:
            raise KnownNotToFitError(refusal)
        if kind not in self._ways:
            return self._tried(split, kind)
        try:
            return self._exchanged(split, uneven)
        except (ReplicaUnfitError, NoPortionsError):
            raise
        except Exception as error:
            if is_out_of_memory(error) or self._group.args.tensor > 1:
                raise
            if INDIVISIBLE not in str(error) or structure in self._indivisible:
                return self._made_after(error, split, structure)
        self._note(self._indivisible, structure)
        return self._tried_or_known(split)

    def _made_after(self, error: Exception, split: Split, structure: Hashable) -> Any:
        """Whether the ranks cannot make forwards of such sizes, or it is the forward's own fault, rank 0 finds out."""
        reason = f"of such sizes the ranks cannot make them: {error}"
        output = self._run_alone(split.component, split.module, split.context, split.arguments, reason)
        self._note(self._not_by_ranks, structure)
        self._vain += 1
        if self._vain >= IN_VAIN:
            self._group.end(f"the ranks failed at {IN_VAIN} sizes one after another, which rank 0 made: {error}")
        return output

    def _note(self, structures: set[Hashable], structure: Hashable) -> None:
        if len(structures) >= KINDS_KEPT:
            structures.clear()
        structures.add(structure)

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
        self._log.tell(component, reason)
        return self._made_whole(component, module, context, arguments)

    def _made_whole(self, component: str, module: Any, context: CacheContext | None, arguments: dict[str, Any]) -> Any:
        """By rank 0, which the others do not hear of."""
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
                    self._note(self._indivisible, split.structure())
                    return self._tried_or_known(split)
                reason = f"{type(error).__name__}: {error}"
                continue
            problem = self._deviates(split, output, whole)
            if problem is None:
                self._ways[kind] = uneven
                return output
            reason = f"what the ranks make deviates: {problem}"
        self._ways[kind] = None
        raise NoPortionsError(reason)

    def _deviates(self, split: Split, output: Any, whole: Any) -> str | None:
        """Why `output` is not `whole` but for rounding."""
        if whole is None:
            why = "does not fit on one device" if self._holds_all(split.component) else "is nowhere as a whole"
            logger.warning("parallel: %s %s: the ranks are not checked", split.component, why)
            return None
        if split.axes is None or split.component in self._group.met.splits:
            apart = deviation(output, whole)
            return None if is_close_enough(apart, whole) else f"{apart:.1e}"

        def portion_alone(index: int) -> Any:
            with self._around(split, index):
                return self._alone.run(split.component, split.module, split.context, split.pieces[index])

        return wrong_portion(output, whole, split.sizes, split.axes, portion_alone)

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
        if not self._holds_all(split.component):
            return None
        try:
            return self._made_whole(split.component, split.module, split.context, arguments)
        except Exception as error:
            if not is_out_of_memory(error) or split.component not in self._group.met.splits:
                raise
            let_go(error)
        self.free_memory()
        return None

    # -- on the ranks --------------------------------------------------------------------------------------------------

    def _exchanged(self, split: Split, uneven: bool) -> Any:
        """The forward on all ranks that have a portion of it."""
        asked = [place for place in self._group.others if place.sample < len(split.pieces)]
        number = self._questions.next_number()
        try:
            told = {"number": number, "uneven": uneven, "free": self._free}
            messages = [message_of(split.message(index) | told) for index in range(len(split.pieces))]
        except TypeError as error:
            raise NoPortionsError(str(error)) from error
        self._free = False
        with self._group.forward(number, lack_of(split.component, split.arguments, self._axes(split.component))):
            output = self._answered(split, uneven, asked, messages)
        self._vain = 0
        return output

    def _answered(self, split: Split, uneven: bool, asked: Sequence[Place], messages: Sequence[Message]) -> Any:
        failure: BaseException | None = None
        output = None
        try:
            with self._questions.asked({place.rank: messages[place.sample] for place in asked}) as answers_of_all:
                try:
                    output = self._own_portion(split, uneven)
                except Exception as raised:  # noqa: BLE001  (raised again when the others have told how it went there)
                    failure = raised
                    if is_out_of_memory(raised):
                        let_go(raised)
                        self._group.failed_here(Failure(self._questions.number, reason_of(raised), lacks_memory=True))
                answers = answers_of_all()
            self._check_answers(answers, failure)
        finally:
            del failure  # it holds this frame, and with it all tensors
        outputs = [answers[place.rank]["output"] for place in asked if place.answers]
        return joined([output, *outputs], split.axes) if outputs and split.axes is not None else output

    def _own_portion(self, split: Split, uneven: bool) -> Any:
        splits = self._group.met.splits
        if split.component in splits:
            splits[split.component].set_uneven(uneven)
        with self._around(split, 0):
            return self._alone.run(split.component, split.module, split.context, split.pieces[0])

    def _check_answers(self, answers: Answers, own: BaseException | None) -> None:
        """Raises what the forward raised, where the ranks of each sample have all failed alike or all not: they are in
        step. Else some have waited for others that had given up, and the group ends, as it does where what failed is
        the connection between them.
        """
        reasons = {rank: each["error"] for rank, each in answers.items() if each["error"]}
        reasons |= {0: reason_of(own)} if own else {}
        outcomes = {0: "" if own is None else _outcome(is_out_of_memory(own))}
        outcomes |= {rank: _outcome(each["lacks_memory"]) if each["error"] else "" for rank, each in answers.items()}
        problem = self._problem(outcomes, reasons)
        if problem is not None:
            told = "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items()))
            self._group.end_at_forward(f"{problem}: {told}", "memory" in outcomes.values())
            self._group.check()
        try:
            if own is not None:
                raise own
        finally:
            del own
        for rank, answer in answers.items():
            if answer["error"] is not None:
                text = f"rank {rank}: {answer['error']}"
                raise torch.OutOfMemoryError(text) if answer["lacks_memory"] else OnRanksError(text)

    def _problem(self, outcomes: Mapping[int, str], reasons: Mapping[int, str]) -> str | None:
        """Why the group cannot go on."""
        per_sample = self._group.args.ranks_of_sample
        for first in range(0, self._group.args.size, per_sample):
            ranks = [rank for rank in range(first, first + per_sample) if rank in outcomes]
            if len({outcomes[rank] for rank in ranks}) > 1:
                return "the ranks are not in step"
        failed = (reason for rank, reason in reasons.items() if outcomes[rank] == "error")
        return "the ranks do not reach each other" if any(map(is_of_connection, failed)) else None


class Split:
    """A forward, and its samples in portions."""

    def __init__(
        self,
        component: str,
        module: Any,
        context: CacheContext | None,
        arguments: dict[str, Any],
        used: Used | None = None,
    ) -> None:
        self.component, self.module, self.context, self.arguments = component, module, context, arguments
        self.used, self.used_by = used, [used]  # by the whole, and by each portion
        self.axes: BatchAxes | None = None
        self.num_samples = 1
        self.sizes = [1]
        self.pieces: Sequence[dict[str, Any]] = [arguments]

    def cut(self, axes: BatchAxes | None, num_portions: int) -> None:
        """Raises NoPortionsError."""
        if num_portions == 1 or axes is None:
            return
        self.axes = axes
        self.num_samples = Merger(axes).num_samples(self.arguments)
        self.sizes = portion_sizes(self.num_samples, num_portions)
        pieces = portions(self.arguments, axes, self.sizes)
        self.used_by = [None] * len(pieces) if self.used is None else list(self.used.portions(self.sizes))
        self.pieces = pieces

    def keep_whole(self, reason: str) -> None:
        logger.info("the samples of a forward of %s stay together: %s", self.component, reason)
        self.axes, self.pieces, self.used_by = None, [self.arguments], [self.used]

    def kind(self) -> Hashable:
        """Equal for forwards that one trial is for: of whatever sizes."""
        context = self.context[0] if self.context else None
        kinds, names = repr(map_values(_kind_of, self.arguments)), self.used and self.used.names
        return self.component, context, len(self.pieces), self.num_samples, kinds, names

    def structure(self) -> Hashable:
        """Equal for forwards of the same sizes."""
        return self.component, repr(map_values(_shape_of, self.arguments))

    def message(self, index: int) -> dict[str, Any]:
        """What the ranks of a portion are asked."""
        used = self.used_by[index]
        return {
            "component": self.component,
            "context": self.context,
            "arguments": self.pieces[index],
            "adapters": None if used is None else used.plain(),
        }


def _outcome(lacks_memory: bool) -> str:
    """Of a forward that failed on a rank."""
    return "memory" if lacks_memory else "error"


def _kind_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.ndim, str(value.dtype)
    return value if isinstance(value, bool | str) else type(value).__name__


def _shape_of(value: Any) -> Any:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
