"""A group of ranks as rank 0 sees it: started, met, listened to, and ended as one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from deployments.errors import ReplicaUnfitError
from deployments.modules import AccelerationError
from deployments.ranks.args import ParallelArgs
from deployments.ranks.channel import Channel
from deployments.ranks.loss.beats import Beats
from deployments.ranks.loss.lack import Lack, LackRecord, NoRecord
from deployments.ranks.loss.left_alone import ANY_FORWARD, Failure, LeftAlone, told_failure
from deployments.ranks.place import Place, RankProcess, StartRank, open_store
from deployments.ranks.splits import SplitModule, check_splits, install_splits
from deployments.tensors.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

PATIENCE = timedelta(days=365)  # of a rank that waits for its next forward: that rank 0 is there, its beats tell
LOOK_S = 0.1  # while the ranks load
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}  # by the type of the device


@dataclass(frozen=True)
class Met:
    """What a rank has when all have met."""

    channel: Channel
    splits: Mapping[str, SplitModule]  # by module; empty where only samples are split


def meet(place: Place, store: Any, modules: Mapping[str, torch.nn.Module], device: torch.device) -> Met:
    """Called by every rank at the same time, after all weights were read: the streamer of weights would wait for the
    other ranks too, once there is a group. Raises RuntimeError where one does not come."""
    timeout = timedelta(seconds=place.args.collective_timeout_s)
    dist.init_process_group(
        BACKENDS[device.type],
        store=PrefixStore("group", store),
        rank=place.rank,
        world_size=place.size,
        timeout=timeout,
    )
    control = dist.new_group(backend="gloo", timeout=timeout)  # of the meeting; then it waits for work, however long
    _set_pg_timeout(PATIENCE, control)
    return Met(Channel(control, device), install_splits(modules, place.args, mesh_of(place.args, device), device))


def mesh_of(args: ParallelArgs, device: torch.device) -> DeviceMesh:
    """Of all ranks: those that compute the same samples lie side by side."""
    shape = (args.batch, args.tensor, args.ring, args.ulysses)
    return init_device_mesh(device.type, shape, mesh_dim_names=("batch", "tensor", "ring", "ulysses"))


class RankGroup:
    """Of one denoiser. The ranks load while rank 0 does; `open` waits for them. Once it is lost it stays so."""

    def __init__(
        self,
        args: ParallelArgs,
        start: StartRank,
        host: str = "127.0.0.1",
        record: LackRecord | None = None,
        setting: str = "parallel",
    ) -> None:
        """`host`: the address of this machine at which the other ranks reach it. `record`: what groups leave to those
        that come after; None: none does. `setting`: what asked for the group, which errors name."""
        self.args = args
        self.setting = setting
        self._record = record or NoRecord()
        self.lacks = tuple(self._record.known())  # of the groups before
        self._forward: tuple[int, Lack] | None = None  # under way
        self._failed_here: Failure | None = None
        self._left_alone = LeftAlone()
        self.lost: str | None = None  # why it cannot work any more
        self._store = open_store(host)
        self._places = [Place(host, self._store.port, rank, args) for rank in range(args.size)]
        self._lock = threading.Lock()
        self._beats: Beats | None = None
        self._met: Met | None = None
        self.processes: dict[int, RankProcess] = {}
        try:
            for place in self._places[1:]:
                self.processes[place.rank] = start(place)
        except BaseException:
            self.close()
            raise

    @property
    def others(self) -> list[Place]:
        """The ranks beside rank 0."""
        return self._places[1:]

    @property
    def met(self) -> Met:
        assert self._met is not None, "the group was not opened"
        return self._met

    def open(self, modules: Mapping[str, torch.nn.Module], device: torch.device) -> None:
        """Waits until all ranks have built these modules, and splits them here as they do.

        Raises AccelerationError for a way that cannot be had, and for a rank that cannot start, with its reason.
        """
        try:
            if device.type not in BACKENDS:
                raise AccelerationError(
                    f"{self.setting}: ranks are possible on {', '.join(BACKENDS)}, not on {device.type}"
                )
            check_splits(modules, self.args, device)
            self._wait_for_all()
            self._store.set(GO, "1")
            self._met = meet(self._places[0], self._store, modules, device)
        except BaseException:
            self.close()
            raise
        others = [place.rank for place in self.others]
        own = self._places[0].connect()
        look = partial(self._look, own)
        self._beats = Beats(own, 0, others, self.args.silence_timeout_s, self.end, look)
        logger.info("%s: %s", self.setting, ", ".join(f"{way} {degree}" for way, degree in self.args.degrees.items()))

    def _wait_for_all(self) -> None:
        until = time.monotonic() + self.args.start_timeout_s
        for place in self.others:
            while not self._store.check([built_key(place.rank)]):
                if (reason := self._failure()) is not None:
                    raise AccelerationError(f"{self.setting}: {reason}")
                if time.monotonic() > until:
                    raise AccelerationError(
                        f"{self.setting}.start_timeout_s: rank {place.rank} has not loaded the model within "
                        f"{self.args.start_timeout_s:g} s"
                    )
                time.sleep(LOOK_S)

    def _failure(self) -> str | None:
        """Of a rank that cannot start."""
        for place in self.others:
            if self._store.check([failed_key(place.rank)]):
                return f"rank {place.rank} cannot start: {self._store.get(failed_key(place.rank)).decode()}"
        return self._ended_rank()

    def _ended_rank(self) -> str | None:
        reasons = ((rank, process.end_reason()) for rank, process in self.processes.items())
        return next((f"rank {rank} has ended: {reason}" for rank, reason in reasons if reason is not None), None)

    def _look(self, store: TCPStore) -> str | None:
        """Why the group has ended; asked at each beat."""
        failures = {place.rank: told_failure(store, place.rank) for place in self.others}
        failed = {rank: each for rank, each in failures.items() if each is not None}
        self._note_lost_question(failed.values())
        return self._ended_rank() or self._waiting_for_one_that_lacks_memory(failed)

    def _note_lost_question(self, failures: Iterable[Failure]) -> None:
        """A rank that had no memory for what it was asked ends by itself."""
        forward = self._forward
        if forward is not None and any(each.forward == ANY_FORWARD and each.lacks_memory for each in failures):
            self._keep(forward[1])

    def _waiting_for_one_that_lacks_memory(self, failures: dict[int, Failure]) -> str | None:
        forward = self._forward
        if forward is None:
            return None
        if self._failed_here is not None:
            failures[0] = self._failed_here
        alone = self._left_alone.look(forward[0], failures, self.args.ranks_of_sample)
        if not alone or self._forward is not forward:
            return None
        self._keep(forward[1])
        reasons = "; ".join(f"rank {rank}: {failures[rank].reason}" for rank in alone)
        return f"ranks wait for others that have given up a forward of {forward[1]}: {reasons}"

    def _keep(self, lack: Lack) -> None:
        """For the next group; once."""
        with self._lock:
            kept, self._record = self._record, NoRecord()
        kept.add(lack)

    # -- called by the executor and by threads that watch ------------------------------------------------------------

    def check(self) -> None:
        """Raises ReplicaUnfitError for a group that is lost."""
        if self.lost is not None:
            raise ReplicaUnfitError(self.lost)

    @contextmanager
    def reaching(self, rank: int) -> Iterator[None]:
        """Ends the group where that fails, and raises ReplicaUnfitError."""
        try:
            yield
        except Exception as error:
            lacks_memory = is_out_of_memory(error)  # here, for what it has sent
            reason = f"rank 0: {error}" if lacks_memory else f"rank {rank} cannot be reached: {error}"
            self.end_at_forward(reason, lacks_memory)
            raise ReplicaUnfitError(self.lost) from error

    @contextmanager
    def forward(self, number: int, lack: Lack) -> Iterator[None]:
        """While ranks make it; `lack`: what it is, where memory lacks for it."""
        self._forward, self._failed_here = (number, lack), None
        try:
            yield
        finally:
            self._forward = None

    def failed_here(self, failure: Failure) -> None:
        """On rank 0, while others may wait for it."""
        self._failed_here = failure

    def end_at_forward(self, reason: str, lacks_memory: bool) -> None:
        """As `end`; where memory lacks, the next group is told."""
        if self.lost is None and self._forward is not None:
            lack = self._forward[1]
            reason = f"{reason} (at a forward of {lack})"
            if lacks_memory:
                self._keep(lack)
        self.end(reason)

    def end(self, reason: str) -> None:
        """Ends all ranks as one: whoever waits for one of them is woken by the end of its connection."""
        with self._lock:
            if self.lost is not None:
                return
            self.lost = reason
        logger.error("the group of ranks has ended: %s", reason)
        self._kill()

    def close(self) -> None:
        """The other ranks end, and this process may be in another group."""
        with self._lock:
            self.lost = self.lost or "the group is closed"
        if self._beats is not None:
            self._beats.end()
        self._kill()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _kill(self) -> None:
        for process in self.processes.values():
            process.kill()


GO = "go"  # set by rank 0 when all have built their modules


def built_key(rank: int) -> str:
    return f"built/{rank}"


def failed_key(rank: int) -> str:
    """With the reason, in one sentence."""
    return f"failed/{rank}"
