"""The environment in which a command line of ours starts other programs of this machine."""

import os

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def environment_of_children(*hosts: str) -> dict[str, str]:
    """This process's own, in which files are UTF-8 whatever the locale and local calls, or `hosts`, need no proxy."""
    return {**os.environ, **without_proxy(*hosts), "PYTHONUTF8": "1"}


def without_proxy(*hosts: str) -> dict[str, str]:
    """The variables by which HTTP clients reach this machine, `hosts`, and whom they named before, directly."""
    named = ",".join(os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")).replace(" ", "")
    directly = ",".join(dict.fromkeys(filter(None, [*named.split(","), *LOOPBACK, *hosts])))
    return {"no_proxy": directly, "NO_PROXY": directly}
