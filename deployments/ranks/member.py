"""A rank other than 0: builds the denoisers, meets the others, and makes the forwards that rank 0 sends."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from deployments.ranks.adapters import AdaptersThere, NoAdapters, used_of, uses_to_hold
from deployments.ranks.channel import message_of
from deployments.ranks.group import GO, LOOK_S, Met, built_key, failed_key, meet
from deployments.ranks.loss.beats import Beats
from deployments.ranks.loss.left_alone import ANY_FORWARD, Failure, reason_of, tell_failure
from deployments.ranks.place import Place
from deployments.tensors.out_of_memory import is_out_of_memory, let_go

logger = logging.getLogger(__name__)

Call = Callable[[Any, str, Any, Any, Any], Any]  # module, component, context, args, kwargs


@dataclass(frozen=True)
class Built:
    """What a rank computes with."""

    modules: Mapping[str, torch.nn.Module]
    device: torch.device
    call: Call
    free_memory: Callable[[], None]
    adapters: AdaptersThere = field(default_factory=NoAdapters)


def serve_rank(place: Place, build: Callable[[], Built]) -> None:
    """Until rank 0 is gone. Raises what `build` raises, which rank 0 is told too."""
    store = place.connect()
    beats = Beats(place.connect(), place.rank, [0], place.args.silence_timeout_s, end_process)
    try:
        built = build()
        met = met_when_all_are_there(place, store, built)
    except Exception as error:
        store.set(failed_key(place.rank), reason_of(error))
        raise
    finally:
        beats.end()
    beats = Beats(place.connect(), place.rank, [0], place.args.silence_timeout_s, end_process)
    try:
        while True:
            answer(place, met, built, store)
    except RuntimeError as error:  # of the connection to rank 0, or no memory for what it asks
        logger.info("rank %d ends: %s", place.rank, error)
    finally:
        beats.end()


def met_when_all_are_there(place: Place, store: TCPStore, built: Built) -> Met:
    store.set(built_key(place.rank), "1")
    while not store.check([GO]):
        time.sleep(LOOK_S)
    return meet(place, store, built.modules, built.device)


def answer(place: Place, met: Met, built: Built, store: TCPStore) -> None:
    """Makes one forward and tells how it went; raises RuntimeError where rank 0 is gone, or memory for the question."""
    try:
        asked = met.channel.asked()
    except RuntimeError as error:
        if is_out_of_memory(error):
            tell_failure(store, place.rank, Failure(ANY_FORWARD, reason_of(error), lacks_memory=True))
        raise
    number = {"number": asked["number"]}
    if "hold" in asked:
        met.channel.answer(message_of(number | built.adapters.hold(uses_to_hold(asked)).plain()))
        return
    if asked["free"]:
        built.free_memory()
    try:
        output = forward(met, built, asked)
        told = message_of(number | {"error": None, "output": output if place.answers else None})
    except Exception as error:  # noqa: BLE001  (told to rank 0, which knows whether the group is still in step)
        let_go(error)
        failure = Failure(asked["number"], reason_of(error), is_out_of_memory(error))
        told = message_of(number | {"error": failure.reason, "lacks_memory": failure.lacks_memory})
        if place.args.ranks_of_sample > 1:
            tell_failure(store, place.rank, failure)
    met.channel.answer(told)


@torch.no_grad()
def forward(met: Met, built: Built, asked: Mapping[str, Any]) -> Any:
    component = asked["component"]
    if component in met.splits:
        met.splits[component].set_uneven(asked["uneven"])
    module, used = built.modules[component], used_of(asked.get("adapters"))
    with built.adapters.around(module, used) if used else nullcontext():
        return built.call(module, component, asked["context"], (), asked["arguments"])


def end_process(reason: str) -> None:
    """Whatever its threads wait for."""
    logger.error("this rank ends: %s", reason)
    os._exit(1)
