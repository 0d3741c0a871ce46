"""The files of the page, read once, and the headers that they are sent with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "web"
INDEX = "index.html"
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' blob: data:",
    "media-src": "'self' blob:",
    "connect-src": "'self'",
    "frame-ancestors": "'none'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "require-trusted-types-for": "'script'",  # a text that is put into the page as HTML is an error
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again with the ETag: a 304 where nothing has changed
}


@dataclass(frozen=True)
class PageFile:
    """A file as it is sent."""

    data: bytes
    content_type: str
    tag: str  # its ETag


def page_files(folder: Path = FOLDER) -> Mapping[str, PageFile]:
    """By the name under the folder, such as `js/app.js`."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in CONTENT_TYPES)
    return {path.relative_to(folder).as_posix(): _page_file(path) for path in files}


def _page_file(path: Path) -> PageFile:
    data = path.read_bytes()
    return PageFile(data, CONTENT_TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"')
