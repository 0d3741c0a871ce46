"""What rank 0 asks the others, and their answers, which stay together: one left unread would be taken for a later one.

So each answer bears the number of its question, and a question that is left before all have answered ends the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deployments.ranks.channel import Message
from deployments.ranks.group import RankGroup

Answers = dict[int, dict[str, Any]]  # by rank


class Questions:
    """Of one group, for one thread at a time."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self.number = 0  # of the newest: what is asked bears it

    def next_number(self) -> int:
        self.number += 1
        return self.number

    @contextmanager
    def asked(self, messages: Mapping[int, Message]) -> Iterator[Callable[[], Answers]]:
        """Sends each rank its message; what is yielded waits for the answers of all.

        Raises ReplicaUnfitError where a rank cannot be reached, or answers another question. Whatever else leaves the
        block before the answers were read ends the group too.
        """
        is_read = False

        def answers() -> Answers:
            nonlocal is_read
            found = {rank: self._answer_of(rank) for rank in messages}
            is_read = True
            return found

        try:
            for rank, message in messages.items():
                with self._group.reaching(rank):
                    self._group.met.channel.ask(message, rank)
            yield answers
        finally:
            if messages and not is_read:
                self._group.end_at_forward("rank 0 has left a question before all had answered", lacks_memory=False)

    def _answer_of(self, rank: int) -> dict[str, Any]:
        with self._group.reaching(rank):
            answer: dict[str, Any] = self._group.met.channel.answer_of(rank)
            number = answer["number"]
        if number != self.number:
            reason = f"rank {rank} is not in step: it answers question {number}, not {self.number}"
            self._group.end_at_forward(reason, lacks_memory=False)
            self._group.check()
        return answer
