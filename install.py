"""Install this project into the Python that runs this: by uv, which takes a tenth of pip's time, or else by pip.

    python install.py .            python install.py '.[dev]'

Both take packages from where pip is configured to, in the versions of constraints.txt. pip installs where its
configuration has a setting without a counterpart in uv, where uv cannot be had, and where uv fails. torch is there
before: which build of it is right only pip's configuration tells, and uv leaves it as it is.
"""

import ast
import math
import subprocess
import sys
from collections.abc import Mapping

from env_config.children import environment_of_children

# Of a setting that several sections have, the later one counts, as to pip.
SECTIONS = ("global", "install", ":env:")
OTHER_NAMES = {"default-timeout": "timeout"}
# uv's variables by pip's settings.
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX",),
    "extra-index-url": ("UV_INDEX",),
    "find-links": ("UV_FIND_LINKS",),
    "constraint": ("UV_CONSTRAINT",),
    "trusted-host": ("UV_INSECURE_HOST",),
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "proxy": ("HTTPS_PROXY", "HTTP_PROXY"),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "retries": ("UV_HTTP_RETRIES",),
}
# Those that change nothing of what is installed.
OF_PIP_ONLY = {
    "cache-dir", "compile", "config-file", "disable-pip-version-check", "log", "no-cache-dir", "no-color", "no-compile",
    "no-input", "progress-bar", "quiet", "require-virtualenv", "root-user-action", "verbose",
}  # fmt: skip
KEPT = ("UV_CACHE_DIR", "UV_LINK_MODE")  # the others may be for another project
CONSTRAINTS = "constraints.txt"


class UvCannotError(Exception):
    """Why pip has to install."""


def main(project: str) -> int:
    """The exit code. `project` is `.`, with extras in brackets."""
    try:
        by_uv(project)
    except UvCannotError as error:
        print(f"pip installs, as {error}", flush=True)
        return pip("--editable", project)
    return 0


def by_uv(project: str) -> None:
    listed = subprocess.run(program("pip", "config", "list"), stdout=subprocess.PIPE, text=True).stdout
    settings = settings_of(listed)
    if unknown := sorted(settings.keys() - VARIABLES.keys() - OF_PIP_ONLY):
        raise UvCannotError(f"uv has no counterpart of its {', '.join(unknown)}")
    if pip("uv") != 0:
        raise UvCannotError("uv cannot be had")
    if uv(project, variables_of(settings)) != 0:
        raise UvCannotError("uv failed")


def settings_of(listed: str) -> dict[str, str]:
    """pip's settings by name, from the lines of `pip config list`, `SECTION.NAME='VALUE'`."""
    by_section: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        place, _, quoted = line.partition("=")
        section, _, name = place.partition(".")
        if section not in by_section:  # that of another command
            continue
        name, value = OTHER_NAMES.get(name, name), str(ast.literal_eval(quoted))
        if by_section[section].setdefault(name, value) != value:  # newer pips list all files, whichever counts
            raise UvCannotError(f"its {section}.{name} has several values, of which pip knows the one that counts")
    return {name: value for section in SECTIONS for name, value in by_section[section].items() if value}


def variables_of(settings: Mapping[str, str]) -> dict[str, str]:
    """The same settings as uv's variables, with our own constraints."""
    told = {**settings, "constraint": f"{settings.get('constraint', '')} {CONSTRAINTS}"}
    values = {name: " ".join(value.split()) for name, value in told.items()}
    if links := values.get("find-links"):
        values["find-links"] = links.replace(" ", ",")
    if timeout := values.get("timeout"):
        values["timeout"] = str(math.ceil(float(timeout)))  # uv takes whole seconds
    return {variable: value for name, value in values.items() for variable in VARIABLES.get(name, ())}


def uv(project: str, variables: Mapping[str, str]) -> int:
    """Of several indexes it takes the versions that pip would; its own settings (files, UV_*) count for nothing."""
    options = ("--no-config", "--index-strategy", "unsafe-best-match", "--python", sys.executable)
    given = {name: value for name, value in environment_of_children().items() if is_for_any_project(name)}
    command = program("uv", "pip", "install", *options, "--editable", project)
    return subprocess.run(command, env={**given, **variables}).returncode


def is_for_any_project(variable: str) -> bool:
    return not variable.startswith("UV_") or variable in KEPT


def pip(*arguments: str) -> int:
    options = ("--disable-pip-version-check", "--no-compile", "--constraint", CONSTRAINTS)
    return subprocess.run(program("pip", "install", *options, *arguments)).returncode


def program(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
