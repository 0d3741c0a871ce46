"""Optional API keys: `Authorization: Bearer KEY`, held against the hashes in a file."""

from __future__ import annotations

from ray import serve
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api_keys import ApiKeys
from serve_app.http.errors import error_json
from serve_app.making.admission import caller

OPEN_PATHS = ("/health",)


class RequireApiKey:
    """ASGI middleware: 401 before a byte of the body is read, where the application has `api_keys_file`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN_PATHS:
            keys: ApiKeys | None = serve.get_replica_context().servable_object.api_keys
            if keys is not None:
                label = keys.label_of(bearer_token(Headers(scope=scope)))
                if label is None:
                    await _refusal(Headers(scope=scope))(scope, receive, send)
                    return
                caller.set(label)
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
    return error_json(
        401, message, "invalid_request_error", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
    )
