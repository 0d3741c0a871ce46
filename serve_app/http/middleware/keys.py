"""Optional API keys: `Authorization: Bearer KEY`, held against hashes in a file.

`python -m serve_app.http.middleware.keys new LABEL` makes a key: it prints the line for the file, and the key once.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import re
import secrets
import sys
from pathlib import Path

from ray import serve
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.http.errors import error_json
from serve_app.making.admission import caller

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/health",)
_LINE = re.compile(r"([A-Za-z0-9._@-]{1,64}):([0-9a-f]{64})", re.ASCII)


class ApiKeys:
    """The keys of a file with lines `LABEL:SHA-256 of the key`, read again when the file changes.

    SHA-256 is enough here, where it is not for passwords: the keys are 256 random bits.
    """

    def __init__(self, file: Path) -> None:
        """Raises ValueError that names the file, and the line that is wrong."""
        self.file = file
        self._seen = self._stamp()
        self._labels = read_hashes(file)

    def label_of(self, key: str) -> str | None:
        """Whose key it is; every hash is compared, each in constant time."""
        self._read_again_if_changed()
        digest = hash_of(key)
        found = None
        for known, label in self._labels.items():
            if hmac.compare_digest(known, digest):
                found = label
        return found

    def _read_again_if_changed(self) -> None:
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            self._labels, self._seen = read_hashes(self.file), stamp
        except ValueError as error:
            logger.error("%s; the keys read before stay valid", error)

    def _stamp(self) -> tuple[int, int, int]:
        try:
            status = self.file.stat()
        except OSError as error:
            raise ValueError(f"api_keys_file: {str(self.file)!r} cannot be read ({error.strerror})") from error
        return status.st_mtime_ns, status.st_size, status.st_ino


def read_hashes(file: Path) -> dict[str, str]:
    """The labels by hash; empty lines and lines that begin with # count for nothing."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"api_keys_file: {str(file)!r} cannot be read ({reason})") from error
    labels: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(
                f"api_keys_file: line {number} of {str(file)!r} must be LABEL:SHA-256 in hexadecimal, as "
                "`python -m serve_app.http.middleware.keys new LABEL` prints it"
            )
        labels[match[2]] = match[1]
    return labels


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


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


def new_key(label: str) -> tuple[str, str]:
    """A key, and the line for the file. Raises ValueError for a label that a line cannot hold."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    line = f"{label}:{hash_of(key)}"
    if not _LINE.fullmatch(line):
        raise ValueError(f"label {label!r} must have 1 to 64 letters, digits or . _ @ -")
    return key, line


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m serve_app.http.middleware.keys", description=__doc__)
    parser.add_argument("command", choices=["new"])
    parser.add_argument("label", help="who uses the key: letters, digits and . _ @ -")
    label = parser.parse_args(arguments).label
    try:
        key, line = new_key(label)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"add to the file of api_keys_file:  {line}")
    print(f"the key, shown only now:           {key}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
