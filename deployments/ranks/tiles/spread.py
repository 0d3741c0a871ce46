"""An autoencoder whose tiles the ranks of a group decode: rank 0 is asked as ever, and gathers them.

Its code runs twice. At first its decoder only notes what it is called with; the calls are made by the ranks; then its
code runs again, and finds each call made. What it does with the tiles (blending, joining frames) is its own.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from deployments.errors import ReplicaUnfitError
from deployments.ranks.channel import message_of
from deployments.ranks.group import RankGroup
from deployments.ranks.loss.alone_log import AloneLog
from deployments.ranks.loss.questions import Answers, Questions
from deployments.ranks.tiles.calls import Chain, made, of_message, shape_of, to_message
from deployments.ranks.tiles.probe import latents_of_tiles
from deployments.ranks.tiles.recording import Coder, NotSpreadError, Recording, StandIn, record, standing_in
from deployments.tensors.values import map_values

logger = logging.getLogger(__name__)

DECODER = "decoder"  # the part of an autoencoder that its `decode` calls for each tile
OTHERWISE = "it calls its decoder otherwise when its tiles are there than when they are not"
Outputs = list[list[torch.Tensor]]  # of a chain: of each call those that are wanted


class SpreadTiles:
    """The tiles of several autoencoders, over the ranks of one group; for any thread, one at a time."""

    def __init__(
        self, group: RankGroup, device: torch.device, is_changed: Callable[[Any], bool] = lambda module: False
    ) -> None:
        """`is_changed`: whether a module is now as one request has it."""
        self._group, self._device, self._is_changed = group, device, is_changed
        self._lock = threading.Lock()
        self._questions, self._log = Questions(group), AloneLog("vae.parallel")
        self._free = False  # the other ranks are to give memory back
        self.made_elsewhere = 0  # calls that other ranks have made

    def free(self) -> None:
        """With the next tiles the other ranks give memory back."""
        self._free = True

    def install(self, name: str, autoencoder: Any, twin: Callable[[], Any]) -> None:
        """From now on its tiles are decoded by all ranks, which know its decoder by this name. `twin` makes the same
        autoencoder on the meta device.

        Raises NotSpreadError where they depend on each other.
        """
        decoder = getattr(autoencoder, DECODER, None)
        if not isinstance(decoder, torch.nn.Module):
            raise NotSpreadError("it has no decoder of that name")
        coder = Coder(decoder, lambda: getattr(twin(), DECODER))
        check_apart(autoencoder, coder)
        cls = type(autoencoder)
        decode = self._spread(name, autoencoder, coder, cls.decode)
        autoencoder.__class__ = type(cls.__name__, (cls,), {"decode": decode, "__module__": cls.__module__})

    def _spread(self, name: str, autoencoder: Any, coder: Coder, decode: Any) -> Any:
        @functools.wraps(decode)
        def spread(this: Any, *args: Any, **kwargs: Any) -> Any:
            def work() -> Any:
                return decode(this, *args, **kwargs)

            if this is not autoencoder:
                return work()
            obstacle = self._obstacle(autoencoder)
            if obstacle is None:
                try:
                    with self._lock:
                        return self._decoded(name, autoencoder, coder, work)
                except NotSpreadError as error:
                    obstacle = str(error)
            self._log.tell(name, obstacle)
            return work()

        return spread

    def _obstacle(self, autoencoder: Any) -> str | None:
        """Why rank 0 must decode alone."""
        if self._group.lost is not None:
            return f"the group of ranks has ended: {self._group.lost}"
        if self._is_changed(autoencoder):
            return "the request's pipeline has changed it"
        return "the pipeline asks for gradients" if torch.is_grad_enabled() else None

    def _decoded(self, name: str, autoencoder: Any, coder: Coder, work: Callable[[], Any]) -> Any:
        """Raises NotSpreadError, where nothing was decoded yet."""
        recording = record(autoencoder, DECODER, coder, work)
        return play(autoencoder, coder, recording, self._made(name, coder.module, recording.chains), work)

    # -- on the ranks ------------------------------------------------------------------------------------------------

    def _made(self, name: str, module: Any, chains: Sequence[Chain]) -> list[Outputs]:
        """Of each chain. What other ranks cannot make, rank 0 makes."""
        shares = shared_out(chains, self._group.args.size) if len(chains) > 1 else [list(range(len(chains)))]
        messages = self._messages(name, chains, shares)
        outputs: dict[int, Outputs] = {}
        answers: Answers = {}
        failure: Exception | None = None
        with suppress(ReplicaUnfitError), self._questions.asked(messages) as answers_of_all:
            try:
                for index in shares[0]:
                    outputs[index] = made(module, chains[index])
            except Exception as error:  # noqa: BLE001  (raised again when the others have answered: they are in step)
                failure = error
            answers = answers_of_all()
        try:
            if failure is not None:
                raise failure
        finally:
            del failure  # it holds this frame, and with it all tensors
        for rank, answer in answers.items():
            outputs |= self._taken(rank, answer, shares[rank])
        for index in range(len(chains)):
            if index not in outputs:
                outputs[index] = made(module, chains[index])
        return [outputs[index] for index in range(len(chains))]

    def _messages(self, name: str, chains: Sequence[Chain], shares: Sequence[Sequence[int]]) -> dict[int, Any]:
        """For each other rank that has a share. Raises NotSpreadError for what no message may carry."""
        free, self._free = self._free, False
        asked = {
            "number": self._questions.next_number(),
            "component": name,
            "context": None,
            "uneven": False,
            "free": free,
        }
        sent = {
            rank: asked | {"arguments": {"chains": [to_message(chains[index]) for index in share]}}
            for rank, share in enumerate(shares)
            if rank and share
        }
        try:
            return {rank: message_of(value) for rank, value in sent.items()}
        except TypeError as error:
            raise NotSpreadError(str(error)) from error

    def _taken(self, rank: int, answer: Mapping[str, Any], share: Sequence[int]) -> dict[int, Outputs]:
        """By chain; nothing where it has failed."""
        if answer["error"] is not None:
            self._free = self._free or answer["lacks_memory"]
            logger.warning("vae.parallel: rank 0 decodes the tiles of rank %d: %s", rank, answer["error"])
            return {}
        here = map_values(lambda tensor: tensor.to(self._device), answer["output"])
        self.made_elsewhere += sum(len(outputs) for outputs in here)
        return dict(zip(share, here, strict=True))


def make_tiles(device: torch.device) -> Callable[[Any, str, Any, Any, Any], list[Outputs]]:
    """Of a rank other than 0: makes the chains that it is sent, on its device; what it answers is on the host."""

    def call(module: Any, component: str, context: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Outputs]:
        chains = [of_message(chain, device) for chain in kwargs["chains"]]
        return [[[tensor.cpu() for tensor in outputs] for outputs in made(module, chain)] for chain in chains]

    return call


def check_apart(autoencoder: Any, coder: Coder) -> None:
    """Raises NotSpreadError where tiles depend on each other; no tile is decoded."""
    try:
        latents = latents_of_tiles(autoencoder)
    except ValueError as error:
        raise NotSpreadError(str(error)) from error
    recording = record(autoencoder, DECODER, coder, lambda: autoencoder.decode(latents))
    if len(recording.chains) < 2:
        raise NotSpreadError(
            f"of latents of {tuple(latents.shape)} it makes no two tiles that do not depend on each other"
        )


def shared_out(chains: Sequence[Chain], num_ranks: int) -> list[list[int]]:
    """The chains of each rank: those that cost most first, to whoever has least; of equals not to rank 0, which has
    more to do."""
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0] * num_ranks
    costs = [sum(call.cost for call in chain) for chain in chains]
    for index in sorted(range(len(chains)), key=lambda index: -costs[index]):
        rank = min(reversed(range(num_ranks)), key=lambda rank: loads[rank])
        shares[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(share) for share in shares]


def play(
    autoencoder: Any, coder: Coder, recording: Recording, outputs: Sequence[Outputs], work: Callable[[], Any]
) -> Any:
    """What `work` returns, whose calls of the decoder were made. Raises NotSpreadError where it now makes others."""
    left = iter(zip(recording.order, recording.outputs, strict=True))

    def call(*args: Any, **kwargs: Any) -> Any:
        (chain, index), described = next(left, ((-1, -1), None))
        if chain < 0 or recording.chains[chain][index].shape != shape_of((args, kwargs)):
            raise NotSpreadError(OTHERWISE)
        wanted = recording.chains[chain][index].wanted
        numbers = dict(zip(wanted, outputs[chain][index], strict=True))
        outputs[chain][index] = []  # from now on only the autoencoder's code holds them
        places = iter(range(2**62))
        return map_values(lambda leaf: numbers.get(next(places), leaf), described)

    with standing_in(autoencoder, DECODER, StandIn(coder.module, call)):
        returned = work()
    if next(left, None) is not None:
        raise NotSpreadError(OTHERWISE)
    return returned
