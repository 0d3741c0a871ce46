"""Asks the replicas of other stages, from the threads of requests."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.messages import ComponentAnswer, ComponentCall, Conditioning, GenerationRequest, StageName


class OtherStages:
    """The handles that a replica is bound to. The event loop makes the calls, so a thread may wait for them."""

    def __init__(self, handles: Mapping[StageName, DeploymentHandle], making: str = "") -> None:
        """`making`: ModelArgs.making of the replica."""
        self._handles = handles
        self._making = making
        self._loop: asyncio.AbstractEventLoop | None = None

    def use_running_loop(self) -> None:
        """Called in the event loop before a request's thread asks for anything."""
        self._loop = asyncio.get_running_loop()

    def call_component(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        call = replace(call, making=self._making)
        answer: ComponentAnswer = self._wait_for(self._handles[stage].call_component.remote(call))
        return answer

    def encode(self, request: GenerationRequest) -> Conditioning:
        conditioning: Conditioning = self._wait_for(self._handles["encoder"].encode.remote(request))
        return conditioning

    def _wait_for(self, response: Any) -> Any:
        if self._loop is None:  # while the replica starts: its event loop waits for that
            return response.result()

        async def wait() -> Any:
            return await response

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result()
