"""A group of ranks whose other ranks are played: the test says what each answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deployments.ranks.args import ParallelArgs
from deployments.ranks.channel import Message, _value_of
from deployments.ranks.group import Met, RankGroup

Answer = Callable[[int, Any], Any]  # of a rank, to what it is asked; raises what reading the answer raises


class PlayedChannel:
    """Of rank 0. Answers wait in it until they are read, as in a connection."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.unread: dict[int, list[Any]] = {}

    def ask(self, message: Message, to: int) -> None:
        self.unread.setdefault(to, []).append(opened(message))

    def answer_of(self, rank: int) -> Any:
        asked = self.unread[rank].pop(0)
        return {"number": asked["number"]} | self._answer(rank, asked)


class PlayedProcess:
    """A RankProcess."""

    def end_reason(self) -> None:
        return None

    def kill(self) -> None:
        """There is none."""


def opened(message: Message) -> Any:
    text, host, device = message.parts
    return _value_of(json.loads(text.numpy().tobytes()), host, device)


@contextmanager
def played_group(answer: Answer, **parallel: int) -> Iterator[tuple[RankGroup, PlayedChannel]]:
    group, channel = RankGroup(ParallelArgs(**parallel), lambda place: PlayedProcess()), PlayedChannel(answer)
    try:
        group._met = Met(channel, {})  # type: ignore[arg-type]
        yield group, channel
    finally:
        group.close()
