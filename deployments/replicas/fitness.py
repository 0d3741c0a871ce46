"""Whether a replica can work: what it died of inside, and a device that is asked after an error."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager

import torch
from ray.exceptions import RayError

from deployments.engine.under_way import UnderWay
from deployments.errors import PipelineFailedError, ReplicaRefusedError, ReplicaUnfitError, TriptychError
from deployments.media.pool import MediaWorkerError
from deployments.messages import Envelope
from deployments.model import WatchdogArgs
from deployments.tensors.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 20.0  # for a tiny operation, on a device that others may keep busy

Sign = Callable[[], str | None]  # why the replica cannot work any more; None: it can
WaitedUntil = Callable[[], float | None]


class Fitness:
    """Of one replica; used from its event loop only. Once it is unfit it stays so, and Serve replaces it.

    `probe` makes the device work a little and raises if it does not; it may never return. `signs` are looked at
    whenever Serve asks for the health, and after every error.
    """

    def __init__(self, probe: Callable[[], None], signs: Iterable[Sign], timeout_s: float = PROBE_TIMEOUT_S) -> None:
        self._probe = probe
        self._signs = tuple(signs)
        self._timeout_s = timeout_s
        self._reason: str | None = None
        self._asking: asyncio.Task[str | None] | None = None
        self._tries_one = False  # a suspected request is in work

    @property
    def is_fit(self) -> bool:
        """Whether the replica can still work, as far as it shows."""
        return self._seen() is None

    def check(self) -> None:
        """Raises RuntimeError when the replica cannot work any more."""
        reason = self._seen()
        if reason is not None:
            raise RuntimeError(reason)

    @asynccontextmanager
    async def work(self, envelope: Envelope) -> AsyncIterator[Trial]:
        """While a request is in the replica.

        Raises ReplicaRefusedError at its begin where the replica cannot work or tries another suspected request, and
        in place of the request's own error ReplicaUnfitError where that shows that the replica cannot work any more.
        """
        reason = self._seen()
        if reason is not None:
            raise ReplicaRefusedError(reason)
        trial = Trial(self, envelope.tried_until)
        try:
            yield trial
        except Exception as error:
            reason = await self._reason_of(error)
            if reason is not None:
                raise ReplicaUnfitError(reason) from error
            raise
        finally:
            trial.end()

    def _seen(self) -> str | None:
        for sign in () if self._reason else self._signs:
            reason = sign()
            if reason is not None:
                self._note(reason)
        return self._reason

    def _note(self, reason: str) -> None:
        if self._reason is None:
            logger.error("this replica cannot work any more: %s", reason)
            self._reason = reason

    async def _reason_of(self, error: Exception) -> str | None:
        if isinstance(error, MediaWorkerError):
            self._note(str(error))
        if self._seen() is None and may_come_from_the_device(error):
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask_device())
            reason = await asyncio.shield(self._asking)
            if reason is not None:
                self._note(reason)
        return self._reason

    async def _ask_device(self) -> str | None:
        """In a thread of its own, which a device that hangs keeps."""
        answer: Future[None] = Future()
        answer.set_running_or_notify_cancel()  # it may come when nobody waits for it any more

        def ask() -> None:
            try:
                self._probe()
            except BaseException as error:  # noqa: BLE001  (it is the answer)
                answer.set_exception(error)
            else:
                answer.set_result(None)

        threading.Thread(target=ask, name="probe", daemon=True).start()
        try:
            await asyncio.wait_for(asyncio.wrap_future(answer), self._timeout_s)
        except TimeoutError:
            return f"the device has not done a tiny operation within {self._timeout_s:g} s"
        except Exception as error:  # noqa: BLE001  (whatever it is, the device did not do it)
            if is_out_of_memory(error):
                return None  # it is full, and it answers
            return f"the device fails in a tiny operation: {error}"
        return None


class Trial:
    """The time of one request in a replica; a suspected one is alone among such until it is past a step."""

    def __init__(self, fitness: Fitness, until: int | None) -> None:
        """Raises ReplicaRefusedError where another one is tried."""
        self._fitness = fitness
        self._until = until
        if until is not None:
            if fitness._tries_one:
                raise ReplicaRefusedError("the replica tries another suspected request")
            fitness._tries_one = True

    def reached(self, step: int) -> None:
        """So many steps of its denoising are done."""
        if self._until is not None and step >= self._until:
            self.end()

    def end(self) -> None:
        """Of no effect a second time."""
        if self._until is not None:
            self._until = None
            self._fitness._tries_one = False


def may_come_from_the_device(error: BaseException) -> bool:
    """Not where the device was asked for more memory than it has, nor where we raised it for a reason of ours."""
    # What libraries say of too little memory may mean more: the device is asked, which costs next to nothing.
    # A PipelineFailedError has a cause too: one that arguments can have, told from those of devices already.
    if isinstance(error, torch.OutOfMemoryError | RayError | PipelineFailedError):
        return False
    if isinstance(error, TriptychError):
        return error.__cause__ is not None and may_come_from_the_device(error.__cause__)
    return True


def hangs(what: str, under_way: UnderWay, args: WatchdogArgs, waited_until: WaitedUntil = lambda: 0.0) -> Sign:
    """The sign of work that does not end: it takes longer than is allowed, or far longer than its kind usually does.

    `waited_until`: by the clock of `under_way`, when it had got what others may have; None while others have it.
    """

    def sign() -> str | None:
        look, waited = under_way.look(), waited_until()
        limit_s = args.first_forward_timeout_s if look.is_first else args.forward_timeout_s
        if limit_s is not None and look.seconds > limit_s:
            return f"{what} has not ended for {look.seconds:.0f} s, at most {limit_s:g} s are allowed"
        if look.usual_s is None or args.times_usual is None or waited is None:
            return None
        own_s = look.seconds - max(0.0, waited - look.began)
        limit_s = max(args.usual_timeout_s, args.times_usual * look.usual_s)
        if own_s <= limit_s:
            return None
        return f"{what} has not ended for {own_s:.0f} s, such work usually takes {look.usual_s:.3g} s"

    return sign
