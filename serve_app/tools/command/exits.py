"""How the command ends: its exit codes, and the errors that a user reads in one line."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any


class Exit(IntEnum):
    """What a shell gets."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    REFUSED = 4
    SERVERS_FAULT = 5
    INTERRUPTED = 130


MEANINGS = {
    Exit.OK: "it is done; a server was ended by Ctrl-C",
    Exit.FAILED: "it failed: nothing fits, a file is wrong or cannot be written, a job was cancelled, a stage is away",
    Exit.USAGE: "the command line is wrong",
    Exit.UNREACHABLE: "the server cannot be reached",
    Exit.REFUSED: "the server refused it (4xx): the message names the field, the value and what is allowed",
    Exit.SERVERS_FAULT: "the server could not do it (5xx), or it is no Triptych",
    Exit.INTERRUPTED: "interrupted by Ctrl-C; `generate` has asked the server to cancel its job",
}


class CommandError(Exception):
    """What went wrong, in words that say what to do; `details` are the server's."""

    def __init__(self, message: str, exit: Exit = Exit.FAILED, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.exit = exit
        self.details = dict(details or {})

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {"error": {"message": self.message, "exit": int(self.exit), **self.details}}


class Interrupted(CommandError):
    """By Ctrl-C, after what was to be done about it."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Exit.INTERRUPTED)
