"""The environment in which a command line of ours starts other programs of this machine."""

import os

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def environment_of_children(*hosts: str) -> dict[str, str]:
    """This process's own, in which files are UTF-8 whatever the locale and local calls, or `hosts`, need no proxy."""
    environment = dict(os.environ)
    named = ",".join(environment.get(name, "") for name in ("no_proxy", "NO_PROXY")).replace(" ", "")
    directly = ",".join(dict.fromkeys(filter(None, [*named.split(","), *LOOPBACK, *hosts])))
    return environment | {"no_proxy": directly, "NO_PROXY": directly, "PYTHONUTF8": "1"}
