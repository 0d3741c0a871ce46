"""What a command line reads of its environment: variables of OpenAI's clients and of terminals, none of ours."""

import os
from collections.abc import Mapping

TERMINAL_VARIABLES = ("TERM", "TERM_PROGRAM", "LC_TERMINAL", "KITTY_WINDOW_ID", "KONSOLE_VERSION")


def api_key_of_environment() -> str:
    """OPENAI_API_KEY, as OpenAI's client reads it; empty without one."""
    return os.environ.get("OPENAI_API_KEY", "").strip()


def terminal_variables() -> Mapping[str, str]:
    """By which terminals tell their kind."""
    return {name: os.environ[name] for name in TERMINAL_VARIABLES if os.environ.get(name)}


def set_variables(variables: Mapping[str, str]) -> None:
    """Of this process and its children, before a library reads them."""
    os.environ.update(variables)
