"""Tells the innocent from the poisonous: a request whose replica died under it is suspected, and is tried alone.

A replica takes all its requests with it when it dies, and at most one of them is what it died of. They are tried one
after another, as the engine halves a batch that failed, each until it is past the place where it was; nobody else
waits for that. Each replica of the ingress keeps its own order, and a replica of a stage takes one suspected request
at a time, whichever ingress sends it (Envelope.tried_until).
"""

from __future__ import annotations

import asyncio

MAX_DEATHS_ALONE = 3  # a request whose replica dies this often when it is tried alone is given up as poison

Place = tuple[int, int]  # how far a request has come: stages behind it, steps of the denoising


class Suspects:
    """Those of one replica of the ingress. Who was tried without success goes behind those who wait."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    def new_request(self) -> Suspicion:
        """What is thought of a request; it begins as innocent."""
        return Suspicion(self._turn)


class Suspicion:
    """What is thought of one request, from its begin to its end."""

    def __init__(self, turn: asyncio.Lock) -> None:
        self.died_at: Place | None = None  # None: it is not suspected
        self.deaths_alone = 0
        self._turn = turn
        self._has_turn = False

    @property
    def is_poison(self) -> bool:
        return self.deaths_alone >= MAX_DEATHS_ALONE

    @property
    def tried_until(self) -> int | None:
        """The step of the denoising by which it is past the place where it died; None: it is not suspected."""
        return None if self.died_at is None else self.died_at[1] + 1

    async def wait_for_turn(self) -> None:
        """Returns at once where it is not suspected."""
        if self.died_at is not None and not self._has_turn:
            await self._turn.acquire()
            self._has_turn = True

    def reached(self, place: Place) -> None:
        """Past the place where it died it is innocent: the next one takes its turn."""
        if self.died_at is not None and place > self.died_at:
            self.died_at, self.deaths_alone = None, 0
            self.end_turn()

    def died(self, place: Place, is_certain: bool = True) -> None:
        """A replica died that worked on it; not certain: it cannot be reached, which may have other reasons."""
        self.deaths_alone += self._has_turn and is_certain
        self.died_at = max(place, self.died_at or place)
        self.end_turn()

    def end_turn(self) -> None:
        """Of no effect without a turn."""
        if self._has_turn:
            self._has_turn = False
            self._turn.release()
