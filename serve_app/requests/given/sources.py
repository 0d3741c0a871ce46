"""Where the bytes of a file are: in the body, at a URL, or in the storage, as an output that was made here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from deployments.errors import InvalidRequestError
from serve_app.requests.given.references import EarlierOutput, Reference, RemoteFile
from serve_app.requests.input_pictures import PictureRules, fetch_file

MAX_AT_ONCE = 4  # files that are fetched for one body

# The bytes of an earlier output of the caller's, for the field of that name; raises InvalidRequestError.
ReadEarlier = Callable[[EarlierOutput, str], Awaitable[bytes]]


@dataclass(frozen=True)
class FileSource:
    """Gets the files of one body."""

    rules: PictureRules
    read_earlier: ReadEarlier
    _at_once: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_AT_ONCE))

    async def bytes_of(self, reference: Reference, param: str) -> bytes:
        """Raises InvalidRequestError or NotSupportedError that names `param`."""
        if isinstance(reference, bytes):
            data = reference
        else:
            async with self._at_once:
                data = await self._fetched(reference, param)
        limit = self.rules.limits.max_input_bytes
        if len(data) > limit:
            raise InvalidRequestError(f"{param}: at most {limit} bytes, it has {len(data)}", param, "limit_exceeded")
        return data

    async def _fetched(self, reference: RemoteFile | EarlierOutput, param: str) -> bytes:
        if isinstance(reference, RemoteFile):
            return await fetch_file(reference.url, param, self.rules)
        return await self.read_earlier(reference, param)
