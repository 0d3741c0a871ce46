"""The three stages played in this process: handles whose calls answer at once, as those of Ray Serve would."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

from deployments.messages import (
    ArgumentDescription,
    Conditioning,
    DecodeInputs,
    Effects,
    Envelope,
    GenerationRequest,
    Media,
    Packed,
    PayloadFollows,
    StageDescription,
)
from serve_app.making.stages import Stages

INPUTS = DecodeInputs("result", Packed("the picture"))
PREVIEW_INPUTS = DecodeInputs("result", Packed("a preview"))


class Reference:
    """An item of a stream, as Ray gives it: awaiting it returns the value or raises the error."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class Stream:
    """A streaming call of the denoiser, from the items that it yields."""

    def __init__(self, items: AsyncIterator[Any]) -> None:
        self._items = items
        self.is_cancelled = False

    async def _to_object_ref_gen(self) -> AsyncIterator[Reference]:
        async def references() -> AsyncIterator[Reference]:
            async for item in self._items:
                yield Reference(item)

        return references()

    def cancel(self) -> None:
        self.is_cancelled = True


class Method:
    """A method of a handle: `remote` calls it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


class Broadcast:
    """What a call of every replica answers: of one replica."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def results_async(self, timeout_s: float | None = None) -> list[Any]:
        return [self._answer]


class PlayedAdapters:
    """The files of LoRAs as the stages would find them; a file that is not named here fits and has a digest of its own.

    `found`: what is said of a file, by its path, or what reading it raises.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any] | Exception] = {}
        self.read: list[dict[str, Any]] = []  # what was asked for
        self.held: tuple[str, ...] = ()
        self.forgotten: list[str] = []

    async def inspect(self, use: dict[str, Any]) -> dict[str, Any]:
        self.read.append(use)
        digest = hashlib.sha256(use["path"].encode()).hexdigest()
        found = self.found.get(use["path"], {})
        if isinstance(found, Exception):
            raise found
        return {"digest": digest, "components": ("transformer", "text_encoder"), "rank": 4, "num_bytes": 900} | found


class PlayedHandle:
    """The handle of every stage; `make` makes the media of a request, `preview` that of each preview."""

    deployment_name = "Played"
    app_name = "app"

    def __init__(
        self,
        describing: StageDescription,
        make: Callable[[GenerationRequest], Awaitable[Media]],
        preview: Callable[[GenerationRequest], Awaitable[Media]],
    ) -> None:
        self.describing = describing
        self.make = make
        self.preview = preview
        self.requests: list[GenerationRequest] = []  # those that came as far as the stages
        self.envelopes: list[Envelope] = []  # one for each of them
        self.describe = Method(self._describe)
        self.encode = Method(self._encode)
        self.denoise = Method(self._denoise)
        self.decode = Method(self._decode)
        self.effects = Method(self._effects)
        self.arguments = Method(self._arguments)
        self.adapters = PlayedAdapters()
        self.inspect_adapter = Method(self.adapters.inspect)
        self.known_effects = Effects()  # the answer to every question about a request's arguments
        self.questions: list[tuple[str, ...]] = []
        self._preview_is_decoded = asyncio.Event()

    def options(self, **_: Any) -> PlayedHandle:
        return self

    def broadcast(self, method: str, *arguments: Any) -> Broadcast:
        if method == "forget_adapter":
            self.adapters.forgotten += arguments
        return Broadcast(self.adapters.held if method == "adapters_held" else None)

    async def _describe(self) -> StageDescription:
        return self.describing

    async def _effects(self, request: GenerationRequest, asked: tuple[str, ...]) -> Effects:
        self.questions.append(asked)
        return self.known_effects

    async def _arguments(
        self, names: tuple[str, ...], defaults: dict[str, Any], model: str
    ) -> list[ArgumentDescription]:
        told = self.describing.parameters | defaults
        return [ArgumentDescription(name, "any", told.get(name), "always") for name in names]

    def _encode(self, request: GenerationRequest, envelope: Envelope) -> Reference:
        self.requests.append(request)
        self.envelopes.append(envelope)
        return Reference(Conditioning(Packed(None)))

    def _denoise(self, request: GenerationRequest, envelope: Envelope, *_: Any) -> Stream:
        return Stream(self._items(envelope))

    async def _items(self, envelope: Envelope) -> AsyncIterator[Any]:
        for step in range(1, envelope.previews + 1):
            self._preview_is_decoded.clear()
            yield PayloadFollows("preview", step)
            yield PREVIEW_INPUTS
            await self._preview_is_decoded.wait()
        yield PayloadFollows("decode_inputs", envelope.previews + 1)
        yield INPUTS

    async def _decode(self, request: GenerationRequest, inputs: Reference | DecodeInputs, *_: Envelope) -> Media:
        value = inputs.value if isinstance(inputs, Reference) else inputs
        if value is PREVIEW_INPUTS:
            try:
                return await self.preview(request)
            finally:
                self._preview_is_decoded.set()
        return await self.make(request)


def played(handle: PlayedHandle) -> Stages:
    """All three stages played by one handle."""
    stage: Any = handle
    return Stages(stage, stage, stage)
