"""Each rank says regularly that it is there; one that is stopped, or whose machine is gone, falls silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from torch._C._distributed_c10d import TCPStore

PERIOD_S = 1.0


class Beats:
    """Of one rank, in a thread of its own: tells its beats, and hears those of the ranks that it listens to."""

    def __init__(
        self,
        store: TCPStore,
        rank: int,
        others: Iterable[int],
        silence_s: float,
        on_silence: Callable[[str], None],
        look: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`store`: a connection for this thread alone. `on_silence` is called once, with a reason.

        `look` is asked at each beat too: a reason why the group has ended.
        """
        self._store, self._rank, self._silence_s = store, rank, silence_s
        self._on_silence, self._look, self._clock = on_silence, look, clock
        self._heard = {other: (b"", clock()) for other in others}
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="beats", daemon=True).start()

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        count, before = 0, self._clock()
        while not self._ended.is_set():
            count += 1
            try:
                reason = self._beat(count, slept_s=self._clock() - before - PERIOD_S)
            except Exception as error:  # noqa: BLE001  (of the store, whose server ends with rank 0)
                reason = f"the store of the group cannot be reached: {error}"
            before = self._clock()
            if reason is not None and not self._ended.is_set():
                self._ended.set()
                self._on_silence(reason)
            self._ended.wait(PERIOD_S)

    def _beat(self, count: int, slept_s: float) -> str | None:
        """Why the group has ended; None: all are there. After a pause of its own it does not take others to be silent
        meanwhile."""
        self._store.set(key_of(self._rank), str(count))
        for rank, (last, since) in self._heard.items():
            key = key_of(rank)
            now = self._store.get(key) if self._store.check([key]) else b""
            if now != last or not now:  # not there yet: its start is watched elsewhere
                self._heard[rank] = now, self._clock()
            elif slept_s > PERIOD_S:
                self._heard[rank] = now, since + slept_s
            elif self._clock() - since > self._silence_s:
                return f"rank {rank} has not been heard of for {self._clock() - since:.0f} s"
        return self._look()


def key_of(rank: int) -> str:
    return f"beat/{rank}"
