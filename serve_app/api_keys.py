"""API keys as a file holds them: a label and the SHA-256 of the key in each line."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from pathlib import Path

logger = logging.getLogger(__name__)

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
                "`python -m serve_app.tools.keys new LABEL` prints it"
            )
        labels[match[2]] = match[1]
    return labels


def hash_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def new_key(label: str) -> tuple[str, str]:
    """A key, and the line for the file. Raises ValueError for a label that a line cannot hold."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    line = f"{label}:{hash_of(key)}"
    if not _LINE.fullmatch(line):
        raise ValueError(f"label {label!r} must have 1 to 64 letters, digits or . _ @ -")
    return key, line
