"""Requests to addresses that callers chose: only http(s), and no target inside our own network.

A name is resolved once, every address of it is checked, and the connection goes to the checked address.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from serve_app.addresses import is_public


class ForbiddenTargetError(Exception):
    """The address is not one that callers may send this server to."""


def client_session(allow_private: bool, timeout_s: float) -> aiohttp.ClientSession:
    """A session whose connections keep the rule; no proxy, cookie or password of this machine is used."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=CheckedResolver(allow_private), use_dns_cache=False, force_close=True),
        timeout=aiohttp.ClientTimeout(total=timeout_s, connect=min(5.0, timeout_s)),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"User-Agent": "triptych", "Accept-Encoding": "identity"},
        trust_env=False,
    )


def checked_url(url: str | URL, allow_private: bool) -> URL:
    """Call it before each request: an address that is no name never meets the resolver.

    Raises ForbiddenTargetError.
    """
    try:
        parsed = URL(url)
        host = parsed.host
        _ = parsed.port
    except ValueError as error:
        raise ForbiddenTargetError("it is no URL") from error
    if parsed.scheme not in ("http", "https") or not host:
        raise ForbiddenTargetError("only http and https URLs with a host are allowed")
    if parsed.user is not None or parsed.password is not None:
        raise ForbiddenTargetError("a URL with a user or password is not allowed")
    if ":" in host or host.replace(".", "").isdigit():  # what aiohttp takes for an address and does not resolve
        check_address(host, allow_private)
    return parsed


def check_address(address: str, allow_private: bool) -> None:
    """Raises ForbiddenTargetError for what is not an address of the public internet."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError as error:  # 127.1 and 2130706433 are addresses to the operating system
        raise ForbiddenTargetError("the host is an address in an unusual notation") from error
    if not allow_private and not is_public(parsed):
        raise ForbiddenTargetError("the host is not an address of the public internet")


class CheckedResolver(AbstractResolver):
    """The operating system's resolver; one forbidden address among a name's addresses forbids the name."""

    def __init__(self, allow_private: bool) -> None:
        self.allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        for *_, address in found:
            check_address(str(address[0]), self.allow_private)
        return [
            ResolveResult(hostname=host, host=str(address[0]), port=port, family=kind, proto=protocol, flags=0)
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Nothing is held open."""
