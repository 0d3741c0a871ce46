"""By which protocol this terminal shows pictures: as its variables tell, or as it answers."""

from __future__ import annotations

import os
import re
import select
import sys
import time
from collections.abc import Mapping
from typing import Literal

from env_config.command_line import terminal_variables

Protocol = Literal["kitty", "iterm2", "sixel"]
ANSWER_S = 0.3
# https://sw.kovidgoyal.net/kitty/graphics-protocol/#querying-support-and-available-transmission-mediums, and DA1
QUERY = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[c"
ATTRIBUTES = re.compile(rb"\x1b\[\?([\d;]*)c")
SIXEL = b"4"  # among the attributes


def protocol_here() -> Protocol | None:
    """None without a terminal at both ends, and for one that shows no pictures."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    return by_variables(terminal_variables()) or by_answer(answer_of_terminal())


def by_variables(variables: Mapping[str, str]) -> Protocol | None:
    term, program = variables.get("TERM", ""), variables.get("TERM_PROGRAM", "")
    if term.startswith(("screen", "tmux")) or program == "tmux":  # what stands outside does not matter
        return None
    if "KITTY_WINDOW_ID" in variables or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or variables.get("LC_TERMINAL") == "iTerm2":
        return "iterm2"
    return None


def by_answer(answer: bytes) -> Protocol | None:
    """`answer`: to QUERY."""
    if b"_Gi=31;OK" in answer:
        return "kitty"
    attributes = ATTRIBUTES.search(answer)
    return "sixel" if attributes and SIXEL in attributes[1].split(b";") else None


def answer_of_terminal() -> bytes:
    """Empty for one that does not answer in time."""
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    answer, ends = b"", time.monotonic() + ANSWER_S
    try:
        tty.setcbreak(terminal)
        os.write(sys.stdout.fileno(), QUERY)
        while (left := ends - time.monotonic()) > 0 and not ATTRIBUTES.search(answer):
            if select.select([terminal], [], [], left)[0]:
                answer += os.read(terminal, 1024)
    finally:
        termios.tcsetattr(terminal, termios.TCSAFLUSH, before)
    return answer
