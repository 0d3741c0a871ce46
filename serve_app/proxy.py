"""What Serve's proxy lacks: it closes connections that send no request, and says its own errors in OpenAI's shape.

Serve's proxy is uvicorn, which waits for the first bytes and the headers of a request as long as the caller likes. Ray
calls `around_proxy` in each of its proxies where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names it when Ray starts.
"""

from __future__ import annotations

import asyncio

import uvicorn.config
from starlette.middleware import Middleware
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serve_app.http.middleware.serve_errors import ServeErrors

HEADERS_S = 20.0  # from the connection, or the first byte of a later request on it, to the end of its headers
MAX_HEADER_BYTES = 65_536


def around_proxy() -> list[Middleware]:
    """Changes the HTTP server of this process; returns what its application is wrapped in."""
    close_silent_connections()
    return [Middleware(ServeErrors)]


def close_silent_connections() -> None:
    """Every connection of this process's HTTP server from now on is an `ImpatientProtocol`."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{ImpatientProtocol.__name__}"


class ImpatientProtocol(AutoHTTPProtocol):  # type: ignore[valid-type, misc]  # uvicorn chooses its class at import
    """uvicorn's protocol with a time and a size for headers.

    A request that has come (its body apart) is a `cycle` of uvicorn's, until its answer is complete.
    """

    _deadline: asyncio.TimerHandle | None = None
    _num_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        was_waiting = self._is_waiting()
        super().data_received(data)
        self._num_bytes += len(data) if was_waiting else 0
        self._watch()
        if self._is_waiting() and self._num_bytes > MAX_HEADER_BYTES:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    def _is_waiting(self) -> bool:
        is_ours = self.transport.get_protocol() is self  # a WebSocket has a protocol of its own
        return is_ours and (self.cycle is None or self.cycle.response_complete)

    def _watch(self) -> None:
        if not self._is_waiting():
            self._stop_watching()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEADERS_S, self.transport.close)

    def _stop_watching(self) -> None:
        self._num_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
