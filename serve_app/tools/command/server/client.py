"""Calls of a server, whose refusals and faults are errors of the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from env_config.children import LOOPBACK
from env_config.command_line import api_key_of_environment
from serve_app.tools.command.exits import CommandError, Exit

CONNECT_S = 10.0
QUIET_S = 60.0  # of a stream, which has a sign of life each 15 s
ANSWER_S = 600.0  # a LoRA may be downloaded, a file uploaded
WHAT_TO_DO = {
    401: "give a key with --api-key-file FILE or in the variable OPENAI_API_KEY",
    413: "send smaller or fewer files",
}


@dataclass(frozen=True)
class ServerEvent:
    """A server-sent event."""

    kind: str
    data: Any
    number: int | None = None


@dataclass(frozen=True)
class Content:
    """A file that was made."""

    data: bytes
    content_type: str


class Server:
    """A server as a command asks it; `name` is what errors call it."""

    def __init__(self, client: httpx2.Client, name: str) -> None:
        self._client = client
        self.name = name

    def get(self, path: str, **params: Any) -> Any:
        return self._json("GET", path, params=params)

    def post(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        own = {"Content-Type": "application/json"} if content else {}
        return self._json("POST", path, content=content, headers={**own, **(headers or {})})

    def delete(self, path: str) -> Any:
        return self._json("DELETE", path)

    def content(self, path: str, **params: Any) -> Content:
        answer = self._answer("GET", path, params=params)
        return Content(answer.content, answer.headers.get("content-type", "").partition(";")[0])

    def any_status(self, path: str) -> tuple[int, Any]:
        """Also of an answer that tells of trouble: its status and JSON."""
        with self._reached():
            answer = self._client.get(path)
        return answer.status_code, _json_of(answer, self.name)

    def events(self, path: str, last_number: int = 0) -> Iterator[ServerEvent]:
        """Up to the end of the stream. Raises httpx2.RequestError for a connection that breaks."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(last_number)} if last_number else {})
        timeout = httpx2.Timeout(QUIET_S, connect=CONNECT_S)
        with self._client.stream("GET", path, headers=headers, timeout=timeout) as answer:
            if answer.status_code != 200:
                answer.read()
                raise refusal(answer, self.name)
            if not answer.headers.get("content-type", "").startswith("text/event-stream"):
                raise no_triptych(self.name, "a stream of events")
            yield from events_of(answer.iter_lines())

    def _json(self, method: str, path: str, **options: Any) -> Any:
        return _json_of(self._answer(method, path, **options), self.name)

    def _answer(self, method: str, path: str, **options: Any) -> httpx2.Response:
        with self._reached():
            answer = self._client.request(method, path, **options)
        if answer.status_code >= 300:
            raise refusal(answer, self.name)
        return answer

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise unreachable(self.name, error) from error


@contextmanager
def server_at(url: str, api_key_file: Path | None) -> Iterator[Server]:
    """The server at an address, with the API key of the file or of the environment."""
    base, shown, host = _address(url)
    key = api_key(api_key_file)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx2.Timeout(ANSWER_S, connect=CONNECT_S)
    is_here = host in LOOPBACK  # reached directly, whatever proxy the environment names
    verify = base.startswith("https:") or not is_here  # else no certificates are read, which takes a while
    with httpx2.Client(base_url=base, headers=headers, timeout=timeout, trust_env=not is_here, verify=verify) as client:
        yield Server(client, shown)


def api_key(file: Path | None) -> str:
    """Raises CommandError, whose text has nothing of the key."""
    if file is None:
        key, place = api_key_of_environment(), "OPENAI_API_KEY"
    else:
        place = f"--api-key-file {file}"
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise CommandError(f"{place} cannot be read: {cause}", Exit.USAGE) from None
        if not key:
            raise CommandError(f"{place} is empty: write the key into it", Exit.USAGE)
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise CommandError(f"{place}: a key is one line of printable ASCII characters without blanks", Exit.USAGE)
    return key


def _address(url: str) -> tuple[str, str, str]:
    """The base of all paths, the address as errors show it, and its host. A /v1 at the end, as OpenAI's clients are
    given, is left out."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
        httpx2.URL(url)
    except (ValueError, httpx2.InvalidURL):
        host, parts = None, urlsplit("")
        port = None
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
        raise CommandError(f"--url must be like http://127.0.0.1:8000, got {_without_user(url)!r}", Exit.USAGE)
    path = parts.path.rstrip("/").removesuffix("/v1")
    name = f"[{host}]" if ":" in host else host
    shown = f"{parts.scheme}://{name}{f':{port}' if port else ''}{path}"
    return f"{url.partition('://')[0]}://{parts.netloc}{path}/", shown, host


def _without_user(url: str) -> str:
    return url.rpartition("@")[2]


def unreachable(name: str, error: Exception) -> CommandError:
    cause = str(error) or type(error).__name__
    return CommandError(
        f"{name} cannot be reached ({cause}). Is it running? `triptych serve MODEL` starts one, --url says where.",
        Exit.UNREACHABLE,
    )


def refusal(answer: httpx2.Response, name: str) -> CommandError:
    """What the answer says, in OpenAI's shape or not, and what to do about it."""
    status = answer.status_code
    try:
        error = answer.json()["error"]
        message = str(error["message"])
    except (ValueError, KeyError, TypeError):  # of a proxy, or of another program
        error, message = {}, f"{name} answered {status} {answer.reason_phrase}"
    if param := error.get("param"):
        message += "" if str(param) in message else f" ({param})"
    if after := answer.headers.get("retry-after"):
        message += f"; try again in {after} s"
    if status in WHAT_TO_DO:
        message += f"; {WHAT_TO_DO[status]}"
    if 300 <= status < 400:
        message += f": it is at {answer.headers.get('location', 'another address')}, give that as --url"
    exit = Exit.REFUSED if 400 <= status < 500 else Exit.SERVERS_FAULT
    details = {"status": status, **{each: error.get(each) for each in ("code", "param", "type")}}
    return CommandError(message, exit, details)


def of_each(names: Sequence[str], call: Callable[[str], Any]) -> list[Any]:
    """What `call` answers for each name. Where some are refused the others are done all the same, then that is told."""
    done, refused = dict[str, Any](), dict[str, CommandError]()
    for name in names:
        try:
            done[name] = call(name)
        except CommandError as error:
            if error.exit != Exit.REFUSED:
                raise
            refused[name] = error
    if not refused:
        return list(done.values())
    first = next(iter(refused.values()))
    if len(names) == 1:
        raise first
    lines = [f"{name}: {error.message}" for name, error in refused.items()]
    raise CommandError("\n".join([*lines, *(f"{name}: done" for name in done)]), first.exit, {"done": list(done)})


def _json_of(answer: httpx2.Response, name: str) -> Any:
    try:
        content = answer.json()
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise no_triptych(name, "a JSON object")
    return content


def no_triptych(name: str, expected: str) -> CommandError:
    message = f"{name} answered with something that is not {expected}: is it a Triptych server? --url says where it is"
    return CommandError(message, Exit.SERVERS_FAULT)


def events_of(lines: Iterator[str]) -> Iterator[ServerEvent]:
    """https://html.spec.whatwg.org/multipage/server-sent-events.html, as far as the server writes it."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        else:
            if "data" in fields:
                number = fields.get("id")
                yield ServerEvent(
                    fields.get("event", "message"), json.loads(fields["data"]), int(number) if number else None
                )
            fields = {}
