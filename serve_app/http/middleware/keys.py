"""Optional API keys: `Authorization: Bearer KEY`."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api_keys import ApiKeys
from serve_app.errors import ErrorReport
from serve_app.http.context import context_of
from serve_app.http.errors import error_response

OPEN_PATHS = ("/health",)


class RequireApiKey:
    """ASGI middleware: 401 before a byte of the body is read."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: Collection[str] = OPEN_PATHS) -> None:
        self.app = app
        self.keys = keys
        self.open_paths = frozenset(open_paths)  # without a key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in self.open_paths:
            label = self.keys.label_of(bearer_token(Headers(scope=scope)))
            if label is None:
                await _refusal(Headers(scope=scope))(scope, receive, send)
                return
            context_of(scope).caller = label
        await self.app(scope, receive, send)


def bearer_token(headers: Headers) -> str:
    """The key that came with a request, empty if none did."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _refusal(headers: Headers) -> ASGIApp:
    message = (
        "the API key is not known here"
        if "authorization" in headers
        else "an API key is required: send it as Authorization: Bearer KEY"
    )
    answer = error_response(ErrorReport(401, "invalid_request_error", message, code="invalid_api_key"))
    answer.headers["WWW-Authenticate"] = "Bearer"
    return answer
