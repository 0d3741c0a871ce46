"""Under which address a request came: for absolute URLs, and against DNS rebinding.

A web page can give its own name the address 127.0.0.1 and then read what a server there answers. It cannot change the
`Host` that its browser sends, so a server without keys answers to hosts that are its own only.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import ErrorReport
from serve_app.http.context import context_of
from serve_app.http.errors import error_response
from serve_app.http.middleware.keys import OPEN_PATHS
from serve_app.public_address import HOST_AND_PORT

DEFAULT_PORTS = {"http": 80, "https": 443}
_FORWARDED = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*")+')  # the element of each proxy, the nearest last
_PARAMETER = re.compile(r'\s*(\w+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)\s*(?:;|$)')

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class InvalidHostError(ValueError):
    """What says the host is no host."""


@dataclass(frozen=True)
class AskedAt:
    """The address that a caller used; `port` is None where it is the scheme's own."""

    scheme: str
    host: str  # in lower case; IPv6 in brackets
    port: int | None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}" + ("" if self.port is None else f":{self.port}")


@dataclass(frozen=True)
class HostRules:
    """Which hosts are this server's own, and whose word about them is taken; `are_checked`: others are refused."""

    are_checked: bool
    allowed_hosts: tuple[str, ...] = ()  # `*.example.com` is every name below it, `*` any host
    public_url: str | None = None
    trusted_proxies: tuple[str, ...] = ()  # addresses and networks

    def allow(self, asked: AskedAt, scope: Scope) -> bool:
        name = asked.host.rstrip(".")
        own = (*self.allowed_hosts, *((str(urlsplit(self.public_url).hostname),) if self.public_url else ()))
        if _is_loopback(name) or any(_matches(name.strip("[]"), each.strip("[]")) for each in own):
            return True
        # A page's name cannot pass for an address. On a port that is not loopback's, any address may be this
        # machine's: a node, a router or a container's host stand before it.
        here = _address(str((scope.get("server") or ("",))[0]))
        return here is not None and not here.is_loopback and _address(name) is not None

    def trust(self, scope: Scope) -> bool:
        peer = _peer(scope)
        return peer is not None and any(peer in ipaddress.ip_network(each) for each in self.trusted_proxies)


class KnownHosts:
    """ASGI middleware: tells the routes the address they were asked under; 400 for no host, 403 for a foreign one."""

    def __init__(self, app: ASGIApp, rules: HostRules) -> None:
        self.app = app
        self.rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        context, prefix = context_of(scope), str(scope.get("root_path", ""))
        is_open = scope["path"].removeprefix(prefix) in OPEN_PATHS  # probes ask under any name
        try:
            asked = asked_at(scope, self.rules)
        except InvalidHostError as error:
            await error_response(ErrorReport(400, "invalid_request_error", str(error), "invalid_host", "Host"))(
                scope, receive, send
            )
            return
        if self.rules.are_checked and not is_open and not self.rules.allow(asked, scope):
            await error_response(_foreign_host(asked.host))(scope, receive, send)
            return
        context.asked_at = asked.url
        context.base_url = self.rules.public_url or asked.url + prefix
        await self.app(scope, receive, send)


def asked_at(scope: Scope, rules: HostRules) -> AskedAt:
    """By the request's own word, or by that of a trusted proxy. Raises InvalidHostError."""
    headers = Headers(scope=scope)
    scheme, hosts = str(scope.get("scheme", "http")), headers.getlist("host")
    if rules.trust(scope):
        said = _said_by_proxy(headers)
        scheme, hosts = said.get("proto", scheme), [said["host"]] if "host" in said else hosts
    elif "x-forwarded-proto" in headers:  # uvicorn, in Serve's proxy, believes every caller on its own machine
        scheme = "http"
    if len(hosts) > 1:
        raise InvalidHostError("there must be one Host")
    scheme = "https" if scheme in ("https", "wss") else "http"
    return _parsed(scheme, hosts[0]) if hosts else _listening(scheme, scope)  # HTTP/1.0 needs no Host; browsers send it


def _parsed(scheme: str, text: str) -> AskedAt:
    match = HOST_AND_PORT.fullmatch(text.strip())
    if match is None or int(match[2] or 0) > 65535 or not _is_host(match[1]):
        raise InvalidHostError("Host must be a name or an address, with a port if need be")
    port = int(match[2]) if match[2] else None
    return AskedAt(scheme, match[1].lower(), None if port == DEFAULT_PORTS[scheme] else port)


def _is_host(host: str) -> bool:
    """In brackets stands an IPv6 address, and nothing else: no URL can be made of `[127.0.0.1]`."""
    return not host.startswith("[") or (":" in host and _address(host) is not None)


def _listening(scheme: str, scope: Scope) -> AskedAt:
    host, port = scope.get("server") or ("127.0.0.1", None)
    return AskedAt(scheme, f"[{host}]" if ":" in host else host, None if port == DEFAULT_PORTS[scheme] else port)


def _said_by_proxy(headers: Headers) -> dict[str, str]:
    """`host` and `proto` as the nearest proxy gives them: by `Forwarded` (RFC 7239), else by X-Forwarded-..."""
    elements = _FORWARDED.findall(", ".join(headers.getlist("forwarded")))
    if elements:
        said = {
            name.lower(): re.sub(r"\\(.)", r"\1", value.strip('"')) for name, value in _PARAMETER.findall(elements[-1])
        }
    else:
        fields = {name: headers.getlist(f"x-forwarded-{name}") for name in ("host", "proto")}
        said = {name: values[-1].rpartition(",")[2].strip() for name, values in fields.items() if values}
    return {name: value.lower() for name, value in said.items() if name in ("host", "proto") and value}


def _peer(scope: Scope) -> Address | None:
    """Who is connected to Serve's proxy.

    uvicorn, in that proxy, puts the address of X-Forwarded-For in its place where it is 127.0.0.1, with port 0.
    """
    host, port = scope.get("client") or ("", None)
    return ipaddress.IPv4Address("127.0.0.1") if port == 0 else _address(str(host))


def _address(host: str) -> Address | None:
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address


def _is_loopback(name: str) -> bool:
    address = _address(name)
    return address.is_loopback if address is not None else name == "localhost" or name.endswith(".localhost")


def _matches(name: str, pattern: str) -> bool:
    return pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))


def _foreign_host(host: str) -> ErrorReport:
    message = (
        f"this server does not answer to the host {host!r}, as it asks for no key: ask it at its address, or start it "
        "with allowed_hosts, public_url or api_keys_file"
    )
    return ErrorReport(403, "invalid_request_error", message, "host_not_allowed", "Host")
