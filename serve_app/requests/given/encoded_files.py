"""Files inside JSON and forms: base64 and data URLs, in the spellings that callers' libraries produce."""

from __future__ import annotations

import base64
from urllib.parse import unquote_to_bytes

_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITE_SPACE = b" \t\r\n\f\v"


def file_bytes(text: str) -> bytes:
    """The file that `text` stands for: a data URL (RFC 2397) or base64. Raises ValueError for what is neither.

    Base64 may have line breaks, the URL-safe alphabet, or no padding; a data URL may have parameters such as
    `charset`, percent-encoded base64, or percent-encoded bytes instead of base64.
    """
    head, comma, rest = text.partition(",")
    if head[:5].lower() != "data:":
        return _base64(text.encode("ascii"))
    if not comma:
        raise ValueError("a data URL has a comma before its data")
    is_base64 = head.rpartition(";")[2].strip().lower() == "base64"
    data = unquote_to_bytes(rest) if "%" in rest else rest.encode("ascii")
    return _base64(data) if is_base64 else data


def _base64(data: bytes) -> bytes:
    plain = data.translate(_URL_SAFE, _WHITE_SPACE).rstrip(b"=")
    return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
