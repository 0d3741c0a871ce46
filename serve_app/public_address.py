"""Addresses that this server is reached under, as arguments write them: a public URL, origins, hosts, proxies."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator

from env_config.secret import without_password

_HOST = r"[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]"
HOST_AND_PORT = re.compile(rf"({_HOST})(?::(\d{{1,5}}))?", re.ASCII)  # as a header field may have it
_PATTERN = re.compile(rf"\*|(?:\*\.)?(?:{_HOST})", re.ASCII)
_ORIGIN = re.compile(rf"\*|null|[a-z][a-z0-9+.-]*://(?:{_HOST})(?::\d{{1,5}})?", re.ASCII)


def _public_url(url: str) -> str:
    """Without the slash at its end."""
    parts = urlsplit(without_password(url))
    if (
        parts.scheme not in ("http", "https")
        or not HOST_AND_PORT.fullmatch(parts.netloc)
        or parts.query + parts.fragment
    ):
        raise ValueError("must be an http or https URL such as https://example.com/pictures")
    return url.rstrip("/")


def _origin(origin: str) -> str:
    if not _ORIGIN.fullmatch(origin):
        raise ValueError(
            "must be an origin as browsers write it, such as https://example.com, without a slash at its end"
        )
    return origin


def _host(pattern: str) -> str:
    if not _PATTERN.fullmatch(pattern):
        raise ValueError("must be a host without a port, such as example.com, *.example.com, 10.0.0.7, [fd00::7] or *")
    return pattern.lower().rstrip(".")


def _network(network: str) -> str:
    try:
        return str(ipaddress.ip_network(network))
    except ValueError:
        raise ValueError("must be an address or a network, such as 10.0.0.7 or 10.0.0.0/8") from None


PublicURL = Annotated[str, AfterValidator(_public_url)]
Origin = Annotated[str, AfterValidator(_origin)]
HostPattern = Annotated[str, AfterValidator(_host)]
ProxyNetwork = Annotated[str, AfterValidator(_network)]
