"""Serve one config file on this machine: check it, start `serve run`, show progress, leave nothing behind."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import psutil
import yaml
from ray.serve.schema import ServeDeploySchema

from env_config.children import environment_of_children
from env_config.ray_proxy import wrap_serve_proxies

LOG_FILE = Path("outputs/serve.log")
WHAT_TO_DO = (
    "What to do: correct the value named above, or choose a config that this machine can serve (`make serve "
    f"CONFIG=...`), and start again. The whole log: {LOG_FILE}"
)
TOO_BUSY = "roxies not available after"  # Serve's own bound of a minute, for the first process that answers HTTP
WHEN_TOO_BUSY = (
    "What to do: no value is at fault. The machine was too busy for Serve to begin within a minute: end what else "
    f"computes here, and start again. The whole log: {LOG_FILE}"
)
SERVE = [sys.executable, "-m", "ray.serve.scripts"]
CHECK = [sys.executable, "-m", "serve_app.tools.check_config"]
# Serve kills its proxy when that is silent for 5 s at its start, or three times for 10 s: a machine can take so long
# whose every core imports torch. The environment goes before these.
PATIENCE = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60"}
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HEALTH_PERIOD_S = 0.5
STATUS_PERIOD_S = 8.0  # `serve status` costs a second of CPU
REPEAT_PERIOD_S = 20.0  # the same line of progress again, so that a long load is not taken for a hang
KINDS_TRIES = 6  # of 5 s each: a machine that has just loaded its models may be busy
GRACE_S = 30.0  # for `serve run` to end by itself after SIGINT
LISTENING_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
EXAMPLES = {  # by the kind of media: what it is called, its route, the file and the prompt of an example
    "image": ("picture", "images", "picture.png", "a red apple"),
    "video": ("video", "videos", "video.mp4", "a fox moving left on a blue background"),
}
CAUSE = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Za-z_]\w*(?:Error|Exception)): ", re.MULTILINE)


class LaunchError(Exception):
    """The application cannot start; the text says why and what to do."""


@dataclass(frozen=True)
class Address:
    """Where the application listens, and the route of its ingress there."""

    host: str
    port: int
    route_prefix: str  # "" or "/name"

    @property
    def url(self) -> str:
        host = LISTENING_EVERYWHERE.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}{self.route_prefix}"


def main(arguments: list[str]) -> int:
    """`python -m serve_app.tools.launch CONFIG`: 0 if ended by Ctrl-C or SIGTERM, 1 if it failed, 2 on misuse."""
    if len(arguments) != 1:
        print("usage: python -m serve_app.tools.launch CONFIG", file=sys.stderr)
        return 2
    return run(Path(arguments[0]))


def run(config: Path, tell_ready: Callable[[Address], None] | None = None) -> int:
    """The statuses of `main`; `tell_ready` is called in place of what is printed when the application is ready."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale may lack letters of the config
            stream.reconfigure(errors="backslashreplace")
    try:
        launch(config, tell_ready or print_ready)
    except LaunchError as error:
        print(f"\nTriptych is not running: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def ended_error(log: str) -> LaunchError:
    """`serve run` has ended by itself: with its last lines, and what to do."""
    last = last_lines(log)
    return LaunchError(f"`serve run` ended:\n{last}\n{WHEN_TOO_BUSY if TOO_BUSY in last else WHAT_TO_DO}")


def print_ready(address: Address) -> None:
    print(ready_message(address, kinds_made(address)), flush=True)


def launch(config: Path, tell_ready: Callable[[Address], None] = print_ready) -> None:
    """Serve `config` until a signal raises KeyboardInterrupt.

    Raises LaunchError when the file or its port is no good, the application fails to deploy, or Serve ends.
    """
    print(f"Checking {config} ...", flush=True)
    address = checked_address(config)
    print(f"Starting Ray and Serve; the log is {LOG_FILE}.", flush=True)
    with running_serve(config, address) as serve:
        wait_until_ready(serve, address)
        tell_ready(address)
        serve.wait()
        raise ended_error(plain_log())


def checked_address(config: Path) -> Address:
    """Where `config` will listen; LaunchError for a file with mistakes or a port that is taken."""
    # In a process of its own: the check loads what the application loads.
    check = subprocess.run(
        [*CHECK, str(config)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment_of_children(),
    )
    if check.returncode != 0:
        said = check.stdout or last_lines(check.stderr) or f"its check ended with the status {check.returncode}"
        raise LaunchError(f"correct {config} first:\n{said}")
    address = address_in(config)
    refuse_taken(address, config)
    return address


def address_in(config: Path) -> Address:
    """Where the first application of a checked file will listen. LaunchError where `serve run` cannot read the file."""
    documents = list(yaml.safe_load_all(config.read_text(encoding="utf-8")))
    if any(isinstance(document, Mapping) and document.get("kind") for document in documents):
        raise LaunchError(f"{config} is for Kubernetes (`kubectl apply -f {config}`): choose a Serve config file.")
    if len(documents) != 1:
        raise LaunchError(f"{config} holds {len(documents)} YAML documents, `serve run` reads one: keep one of them.")
    schema = ServeDeploySchema.model_validate(documents[0])
    if not schema.applications:
        raise LaunchError(f"{config} has no application: write one under `applications`.")
    prefix = schema.applications[0].route_prefix or ""
    return Address(schema.http_options.host, schema.http_options.port, prefix.rstrip("/"))


def refuse_taken(address: Address, config: Path) -> None:
    """LaunchError for a port that another program uses, or an address that this machine does not have."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address.host, address.port))
            listener.listen()
    except (OSError, OverflowError, TypeError, ValueError) as error:  # the last three: no address at all
        cause = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise LaunchError(
            f"cannot listen on {address.host}, port {address.port} ({cause}). {who_listens(address.port)}"
            f"Write another host or port under `http_options` in {config}."
        ) from error


def who_listens(port: int) -> str:
    """Who uses a port and how to end it, as far as this user may know; empty where nobody is seen."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            ports = [each.laddr.port for each in process.net_connections("inet") if each.status == psutil.CONN_LISTEN]
            if port in ports:
                name = process.name()
                remedy = f"end it (kill {process.pid})"
                if name.startswith(("ray", "raylet")):
                    remedy = f"an earlier run has left it, and `{sys.executable} -m ray.scripts.scripts stop` ends it"
                return f"The process {process.pid} ({name}) uses the port: {remedy}. "
    return ""


@contextlib.contextmanager
def running_serve(config: Path, address: Address) -> Iterator[subprocess.Popen[bytes]]:
    """`serve run` on a Ray of its own, in a session of its own; all its processes are gone afterwards."""
    wrap_serve_proxies()
    with opened_log() as log:
        serve = subprocess.Popen(
            # `local`: never join, and so never end, another Ray that runs on this machine.
            [*SERVE, "run", "--address", "local", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**PATIENCE, **environment_of_children(address.host)},
        )
    try:
        yield serve
    finally:
        stop(serve)


def opened_log() -> BinaryIO:
    """LaunchError where the working folder cannot be written."""
    try:
        LOG_FILE.parent.mkdir(parents=True, exist_ok=True)
        return LOG_FILE.open("wb")
    except OSError as error:
        raise LaunchError(
            f"the log {LOG_FILE} cannot be written in {Path.cwd()} ({error.strerror}). Start in a folder that you may "
            "write to, or make room there."
        ) from error


def stop(serve: subprocess.Popen[bytes]) -> None:
    """Ask `serve run` to end, wait for GRACE_S at most (a second signal: no longer), end what is left."""
    if serve.poll() is None:
        print("\nStopping (again Ctrl-C: at once) ...", flush=True)
        serve.send_signal(signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt, subprocess.TimeoutExpired):
        serve.wait(GRACE_S)
        psutil.wait_procs(processes_of_session(serve.pid), timeout=5)
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)
    left = processes_of_session(serve.pid)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)
    serve.wait()
    print("Stopped.", flush=True)


def processes_of_session(session: int) -> list[psutil.Process]:
    """Every process that descends from the session's first one, wherever Ray has moved it since."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def wait_until_ready(serve: subprocess.Popen[bytes], address: Address) -> None:
    """Print progress until GET /health answers 200; LaunchError if Serve ends or gives an application up."""
    progress = Progress()
    next_status_at = time.monotonic() + STATUS_PERIOD_S
    while True:
        health_status, health = get_json(f"{address.url}/health")
        if health_status == 200:
            return
        if serve.poll() is not None:
            raise ended_error(plain_log())
        if health_status is None:
            progress.show("waiting for Ray and Serve to answer")
        elif health is None or "stages" not in health:
            progress.show("Serve is up, the application is being built")
        else:
            progress.show_stages(health["stages"])
        if time.monotonic() >= next_status_at:
            applications, no_answer = serve_status()
            for line in filter(None, [no_answer, *deployment_messages(applications)]):
                progress.show(line)
            next_status_at = time.monotonic() + STATUS_PERIOD_S
        time.sleep(HEALTH_PERIOD_S)


class Progress:
    """Prints what is news, and after a while without any what is waited for."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.printed_at = -REPEAT_PERIOD_S
        self.seen: set[str] = set()
        self.told: dict[str, set[str]] = {}  # of each stage, since it was ready

    def show(self, line: str) -> None:
        if line not in self.seen or self._is_quiet():
            self._print(line)
            self.seen.add(line)

    def show_stages(self, stages: Mapping[str, Mapping[str, Any]]) -> None:
        """What GET /health says of each deployment, those of the same words together."""
        told = {name: "ready" if stage["ready"] else stage["detail"] or "loading" for name, stage in stages.items()}
        news = {name: words for name, words in told.items() if words not in self.told.get(name, set())}
        for name, words in told.items():  # one that dies and loads again says the same again
            since_ready = self.told.get(name, set()) - {"ready"}
            self.told[name] = {words} if words == "ready" else since_ready | {words}
        if news:
            self._print(together(news))
        elif self._is_quiet():
            self._print(f"still {together({name: words for name, words in told.items() if words != 'ready'} or told)}")

    def _is_quiet(self) -> bool:
        return time.monotonic() - self.printed_at >= REPEAT_PERIOD_S

    def _print(self, line: str) -> None:
        self.printed_at = time.monotonic()
        print(f"[{self.printed_at - self.started_at:4.0f} s] {line}", flush=True)


def together(told: Mapping[str, str]) -> str:
    """One line, in which the same words stand once, for all that they are said of."""
    names: dict[str, list[str]] = {}
    for name, words in told.items():
        names.setdefault(words, []).append(name)
    return "; ".join(f"{', '.join(each)}: {words}" for words, each in names.items())


def serve_status() -> tuple[Mapping[str, Any], str]:
    """The applications that `serve status` lists, and why it gave no answer, if it gave none."""
    log = plain_log()
    dashboard = re.search(r"View the dashboard at (http\S+)", log)
    if dashboard is None:
        return {}, ""
    # Ray turns its token on in the process that starts a local Ray, but not in its own command line tools.
    token_mode = ["env", "RAY_AUTH_MODE=token"] if "Token authentication is enabled" in log else []
    command = [*token_mode, *SERVE, "status", "--address", dashboard[1]]
    environment = environment_of_children(urlsplit(dashboard[1]).hostname or "")
    try:
        answer = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=60, check=True, env=environment
        )
    except subprocess.CalledProcessError as error:
        return {}, f"`serve status` failed: {last_lines(error.stderr, 1)}"
    except subprocess.TimeoutExpired:
        return {}, "`serve status` did not answer within a minute"
    return yaml.safe_load(answer.stdout)["applications"], ""


def deployment_messages(applications: Mapping[str, Any]) -> list[str]:
    """What Serve says about deployments that are not up; LaunchError when it has given an application up."""
    all_messages = []
    for name, application in applications.items():
        messages = [
            f"{deployment_name}: {cause_in(deployment['message'])}"
            for deployment_name, deployment in application["deployments"].items()
            if deployment["message"]
        ]
        if application["status"] == "DEPLOY_FAILED":
            causes = messages or [cause_in(application["message"])]
            raise LaunchError("\n".join([f"application {name!r} failed to deploy.", *causes, WHAT_TO_DO]))
        all_messages += messages
    return all_messages


def get_json(url: str) -> tuple[int | None, Any]:
    """The status and the JSON of an answer, None for what there is not."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            status, body = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read()
    except OSError:
        return None, None
    try:
        return status, json.loads(body)
    except ValueError:
        return status, None


def kinds_made(address: Address) -> list[str]:
    """Those of EXAMPLES that the served models make."""
    answer = None
    for _ in range(KINDS_TRIES):
        status, answer = get_json(f"{address.url}/v1/models")  # with API keys it tells nothing: pictures are the rule
        if status is not None:
            break
    models = answer.get("data", []) if isinstance(answer, dict) else []
    made = {model.get("kind") for model in models}
    return [kind for kind in EXAMPLES if kind in made] or ["image"]


def ready_message(address: Address, kinds: Sequence[str] = ("image",)) -> str:
    examples = "\n\n".join(example(address, kind) for kind in kinds)
    return f"""
Ready: {address.url} (all routes: {address.url}/docs; Ctrl-C stops it)

{examples}

OpenAI client:
  OpenAI(base_url="{address.url}/v1", api_key="none")
"""


def example(address: Address, kind: str) -> str:
    """A command that makes one."""
    what, route, name, prompt = EXAMPLES[kind]
    body = json.dumps({"prompt": prompt, "response_format": "b64_json"})
    request = f"curl -sS {address.url}/v1/{route}/generations -H 'Content-Type: application/json' -d '{body}'"
    made = 'base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"])'
    to_file = f'python3 -c \'import base64, json, sys; open("{name}", "wb").write({made})\''
    return f"Make a {what}, {name}:\n  {request} | {to_file}"


def plain_log() -> str:
    """The log of `serve run` without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", LOG_FILE.read_text(encoding="utf-8", errors="replace"))


def cause_in(message: str) -> str:
    """What the last exception in a message of Serve's says, without the traceback before it."""
    raised = list(CAUSE.finditer(message))
    return last_lines(message[raised[-1].start(1) :] if raised else message)


def last_lines(text: str, count: int = 12) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
