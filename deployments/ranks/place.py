"""Where the ranks of a group meet, and what each of them is told of it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from torch._C._distributed_c10d import TCPStore

from deployments.ranks.args import ParallelArgs

STORE_TIMEOUT = timedelta(seconds=30)  # of one question to the store, which its server answers at once


@dataclass(frozen=True)
class Place:
    """One rank of a group; rank 0 is the engine's own process, where the store is."""

    host: str
    port: int
    rank: int
    args: ParallelArgs

    @property
    def size(self) -> int:
        return self.args.size

    @property
    def sample(self) -> int:
        """Which portion of a forward's samples it computes."""
        return self.rank // self.args.ranks_of_sample

    @property
    def answers(self) -> bool:
        """Whether its output is asked for: one of those that compute the same samples."""
        return self.rank % self.args.ranks_of_sample == 0

    def connect(self) -> TCPStore:
        """A connection of its own: one waits for another's answer."""
        return TCPStore(self.host, self.port, is_master=False, wait_for_workers=False, timeout=STORE_TIMEOUT)


class RankProcess(Protocol):
    """The process of a rank other than 0, as the one that started it sees it."""

    def end_reason(self) -> str | None:
        """Why it does not run any more; None: it runs. Does not wait."""
        ...

    def kill(self) -> None:
        """At once, whatever it does; of no effect a second time."""
        ...


StartRank = Callable[[Place], RankProcess]


def open_store(host: str) -> TCPStore:
    """The store of a new group, which listens at this address of the machine only."""
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=STORE_TIMEOUT,
        master_listen_fd=listening.detach(),
    )
