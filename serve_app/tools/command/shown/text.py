"""Text of others as a terminal may get it."""

from __future__ import annotations


def printable(text: str) -> str:
    """Its lines, without anything by which it would steer the terminal."""
    return "".join(each if each.isprintable() or each == "\n" else " " for each in text)
