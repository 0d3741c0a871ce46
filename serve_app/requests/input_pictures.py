"""Files that callers give as URLs are fetched, within limits, and the sizes of pictures are checked."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import aiohttp
from yarl import URL

from deployments.errors import InvalidRequestError, NotSupportedError
from deployments.media.opening import PictureHeader, read_header
from serve_app.outbound import ForbiddenTargetError, checked_url, client_session
from serve_app.requests.limits import RequestLimits

MAX_REDIRECTS = 3
TIMEOUT_S = 10.0  # for one file, from the look-up of its host to its last byte


@dataclass(frozen=True)
class PictureRules:
    """What files may be; `fetch` allows URLs, `allow_private` also those inside our own network."""

    limits: RequestLimits
    fetch: bool = False
    allow_private: bool = False
    timeout_s: float = TIMEOUT_S


def check_picture(data: bytes, field: str, limits: RequestLimits) -> PictureHeader:
    """Reads the header only: no pixel is unpacked. Raises InvalidRequestError."""
    if len(data) > limits.max_input_bytes:
        raise InvalidRequestError(
            f"{field}: at most {limits.max_input_bytes} bytes, it has {len(data)}", field, "limit_exceeded"
        )
    return read_header(data, field, limits.max_input_pixels)


async def fetch_file(url: str, field: str, rules: PictureRules) -> bytes:
    """GET `url`, with the target of each redirect checked like the first.

    The errors do not tell what was found at an address: they would make this server a scanner.
    """
    if not rules.fetch:
        raise NotSupportedError(f"{field}: files are not fetched from a URL here: send a data URL or base64", field)
    try:
        async with client_session(rules.allow_private, rules.timeout_s) as session:
            return await asyncio.wait_for(_get(session, url, field, rules), rules.timeout_s)
    except ForbiddenTargetError as error:
        raise InvalidRequestError(f"{field}: this URL is not fetched: {error}", field) from error
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise InvalidRequestError(f"{field}: no file could be fetched from its URL", field) from error


async def _get(session: aiohttp.ClientSession, url: str | URL, field: str, rules: PictureRules) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        target = checked_url(url, rules.allow_private)
        async with session.get(target, allow_redirects=False) as response:
            if response.status in (301, 302, 303, 307, 308) and "location" in response.headers:
                url = target.join(URL(response.headers["location"]))
                continue
            response.raise_for_status()
            if response.status != 200:
                raise ValueError(f"status {response.status}")
            return await _read(response, field, rules.limits.max_input_bytes)
    raise InvalidRequestError(f"{field}: its URL redirects more than {MAX_REDIRECTS} times", field)


async def _read(response: aiohttp.ClientResponse, field: str, max_bytes: int) -> bytes:
    """Read on only while the body is within `max_bytes`, whatever it announces."""
    data = bytearray()
    async for chunk in response.content.iter_chunked(65_536):
        data += chunk
        if len(data) > max_bytes:
            raise InvalidRequestError(
                f"{field}: a fetched file may have at most {max_bytes} bytes", field, "limit_exceeded"
            )
    return bytes(data)
