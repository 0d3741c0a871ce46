"""Install this project into the Python that runs this: by uv, which takes a tenth of pip's time, or else by pip.

    python install.py .            python install.py '.[dev]'

Both take packages from where pip is configured to, in the versions of constraints.txt. pip installs where its
configuration has a setting without a counterpart in uv, where uv cannot be had, and where uv fails. torch is there
before: which build of it is right only pip's configuration tells, and uv leaves it as it is.
"""

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from env_config.children import environment_of_children

PIP = (sys.executable, "-m", "pip")
# Of a setting that several places have, the later one counts, as to pip.
SECTIONS = ("global", "install", ":env:")
# uv's variables by pip's settings; lists are separated by spaces, but where the name of the list says otherwise.
VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "retries": "UV_HTTP_RETRIES",
}
BY_COMMAS = ("find-links",)
# Those that change nothing of what is installed.
OF_PIP_ONLY = {
    "cache-dir", "compile", "disable-pip-version-check", "log", "no-cache-dir", "no-color", "no-compile", "no-input",
    "progress-bar", "quiet", "require-virtualenv", "root-user-action", "verbose",
}  # fmt: skip
CONSTRAINTS = "constraints.txt"


def main(project: str) -> int:
    """The exit code. `project` is `.`, with extras in brackets."""
    settings = settings_of(subprocess.run([*PIP, "config", "list"], stdout=subprocess.PIPE, text=True).stdout)
    if unknown := sorted(settings.keys() - VARIABLES.keys() - OF_PIP_ONLY):
        print(f"pip installs, as uv has no counterpart of its {', '.join(unknown)}", flush=True)
    elif pip("uv") != 0:
        print("pip installs, as uv cannot be had", flush=True)
    elif uv(project, variables_of(settings)) != 0:
        print("pip installs, as uv failed", flush=True)
    else:
        return 0
    return pip("--editable", project)


def settings_of(listed: str) -> dict[str, str]:
    """pip's settings by name, from the lines of `pip config list`, `SECTION.NAME='VALUE'`."""
    by_section: dict[str, dict[str, str]] = {section: {} for section in SECTIONS}
    for line in listed.splitlines():
        place, _, value = line.partition("=")
        section, _, name = place.partition(".")
        if section in by_section:  # others are those of other commands
            by_section[section][name] = str(ast.literal_eval(value))
    return {name: value for section in SECTIONS for name, value in by_section[section].items()}


def variables_of(settings: Mapping[str, str]) -> dict[str, str]:
    """The same settings as uv's variables, with our own constraints."""
    told = {"constraint": "", **settings}
    told["constraint"] = f"{told['constraint']} {CONSTRAINTS}"
    return {
        VARIABLES[name]: ("," if name in BY_COMMAS else " ").join(value.split())
        for name, value in told.items()
        if name in VARIABLES
    }


def pip(*arguments: str) -> int:
    options = ("--disable-pip-version-check", "--no-compile", "--constraint", CONSTRAINTS)
    return subprocess.run([*PIP, "install", *options, *arguments]).returncode


def uv(project: str, variables: Mapping[str, str]) -> int:
    """Of several indexes it takes the versions that pip would, and it reads no settings of its own."""
    options = ("--no-config", "--index-strategy", "unsafe-best-match", "--python", sys.executable)
    command = [Path(sys.executable).with_name("uv"), "pip", "install", *options, "--editable", project]
    return subprocess.run(command, env={**environment_of_children(), **variables}).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
