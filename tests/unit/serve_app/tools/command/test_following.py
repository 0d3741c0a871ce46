"""A job is followed through what may happen to the connection, and to the process of a model that is loaded here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx2
import pytest

from serve_app.tools.command.exits import CommandError, Exit
from serve_app.tools.command.main import run
from serve_app.tools.command.server import following, here
from serve_app.tools.command.server.client import Server, ServerEvent, events_of, of_each
from serve_app.tools.command.server.following import begin, check_end, follow
from serve_app.tools.command.server.here import Order, served_here
from serve_app.tools.command.shown.progress import Nothing
from serve_app.tools.command.shown.text import printable
from serve_app.tools.command.subcommands import generating
from serve_app.tools.command.subcommands.asked import Asked

STEP = ServerEvent("step", {"progress": 10, "step": 1, "num_steps": 8}, 1)
COMPLETED = ServerEvent("completed", {}, 2)


class Streams(Server):
    """A server whose streams of events end as they are told."""

    def __init__(self, *streams: list[ServerEvent | Exception]) -> None:
        self.name = "http://server"
        self.streams = list(streams)
        self.asked: list[int] = []  # from which event on

    def events(self, path: str, last_number: int = 0) -> Iterator[ServerEvent]:
        self.asked.append(last_number)
        for each in self.streams.pop(0) if self.streams else [httpx2.ConnectError("refused")]:
            if isinstance(each, Exception):
                raise each
            yield each


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following.time, "sleep", lambda seconds: None)


@pytest.mark.parametrize("end", [[STEP, httpx2.ReadError("lost")], [STEP]])
def test_a_lost_connection_is_taken_up_where_it_broke(end: list[ServerEvent | Exception]) -> None:
    server = Streams(end, [httpx2.ConnectError("refused")], [COMPLETED])
    assert follow(server, "job_1", Nothing()) is COMPLETED
    assert server.asked == [0, 1, 1]


def test_a_server_that_stays_away_is_told_with_how_to_go_on() -> None:
    with pytest.raises(CommandError, match="The job goes on: `triptych jobs watch job_1`") as raised:
        follow(Streams([STEP]), "job_1", Nothing())
    assert raised.value.exit == Exit.UNREACHABLE


@pytest.mark.parametrize(
    ("kind", "data", "exit"),
    [
        ("failed", {"error": {"message": "no", "type": "invalid_request_error"}}, Exit.REFUSED),
        ("failed", {"error": {"message": "no", "type": "server_error"}}, Exit.SERVERS_FAULT),
        ("cancelled", {"error": {"message": "no", "code": "cancelled"}}, Exit.FAILED),
        ("deleted", {}, Exit.FAILED),
    ],
)
def test_the_end_of_a_job_decides_the_exit_code(kind: str, data: dict[str, Any], exit: Exit) -> None:
    with pytest.raises(CommandError) as raised:
        check_end("job_1", ServerEvent(kind, data))
    assert raised.value.exit == exit


@pytest.mark.parametrize("tells_at", [3, 99])
def test_a_model_that_is_not_ready_is_asked_again_and_then_told(tells_at: int) -> None:
    class Slow(Server):
        num_asked = 0

        def get(self, path: str, **params: Any) -> Any:
            self.num_asked += 1
            return {"asked": {"makes": "image"} if self.num_asked == tells_at else None}

    client: Any = None
    asked = Slow(client, "http://server")
    if tells_at == 3:
        assert generating.details_of(asked, "m", Nothing())["asked"] == {"makes": "image"}
        return
    with pytest.raises(CommandError, match="the model is not ready yet: try again"):
        generating.details_of(asked, "m", Nothing())


class Posts(Server):
    """A server whose answers to a POST are told."""

    def __init__(self, *causes: Exception | None) -> None:
        self.name = "http://server"
        self.causes = list(causes)
        self.asked: list[Any] = []

    def post(self, path: str, body: Any = None, headers: Any = None) -> Any:
        self.asked.append((path, headers["Idempotency-Key"]))
        if cause := self.causes.pop(0):
            raise CommandError("it cannot be reached", Exit.UNREACHABLE) from cause
        return {"id": "job_1"}


def test_a_job_whose_answer_is_lost_is_asked_for_again_by_the_same_key() -> None:
    server = Posts(httpx2.ReadError("lost"), None)
    assert begin(server, "/v1/images/generations", {}, "key") == "job_1"
    assert server.asked == [("v1/images/generations", "key")] * 2


def test_a_server_that_is_not_there_is_asked_once() -> None:
    server = Posts(httpx2.ConnectError("refused"))
    with pytest.raises(CommandError):
        begin(server, "/v1/images/generations", {}, "key")
    assert len(server.asked) == 1


def test_no_route_of_a_server_leads_to_another() -> None:
    server = Posts(None)
    begin(server, "http://elsewhere/v1/images", {}, "key")
    assert server.asked == [("v1/http://elsewhere/v1/images", "key")]


def test_no_name_that_a_server_gives_leads_out_of_the_folder() -> None:
    job = {"kind": "/etc/x", "result": {"output_format": "../../y", "data": [{"seed": "../1"}]}}
    assert generating.places(None, job, 1) == [Path("-etc-x----1.------y")]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CommandError("it is away", Exit.UNREACHABLE)])
def test_what_ends_the_command_after_the_job_says_how_to_fetch_it(error: BaseException) -> None:
    told = "`triptych jobs download job_1` fetches it"
    with pytest.raises(CommandError, match=told), generating.told_how_to_fetch("job_1"):
        raise error


def test_text_of_a_server_does_not_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\nc\r") == "a [2Jb\nc "


def test_where_one_is_refused_the_others_are_done() -> None:
    asked: list[str] = []

    def call(name: str) -> str:
        asked.append(name)
        if name == "a":
            raise CommandError("there is no a", Exit.REFUSED)
        return name

    with pytest.raises(CommandError, match="a: there is no a\nb: done") as raised:
        of_each(["a", "b"], call)
    assert (asked, raised.value.exit, raised.value.details) == (["a", "b"], Exit.REFUSED, {"done": ["b"]})


def test_two_files_of_one_name_are_no_two_loras(tmp_path: Path) -> None:
    files = [tmp_path / each / "ink.safetensors" for each in ("a", "b")]
    for each in files:
        each.parent.mkdir()
        each.touch()
    with pytest.raises(click.UsageError, match="two files are called ink"):
        Asked(loras=tuple(map(str, files))).files_of_loras()


def test_signs_of_life_are_no_events() -> None:
    lines = [": still working", "", "id: 3", "event: step", 'data: {"step": 1}', "", "data: 1", ""]
    assert list(events_of(iter(lines))) == [ServerEvent("step", {"step": 1}, 3), ServerEvent("message", 1)]


ANSWERS = {
    'print(\'{"problem": "it has no model_index.json", "exit": 1}\')': "it has no model_index.json",
    "import sys; sys.exit('the library is not here')": "ended with the status 1:\nthe library is not here",
}


@pytest.mark.parametrize("code", ANSWERS)
def test_a_model_that_cannot_be_loaded_here_is_told(code: str) -> None:
    with pytest.raises(CommandError, match=ANSWERS[code]), served_here(Order("m"), [sys.executable, "-c", code]):
        pass


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (["org/m", "a fox"], Order(model="org/m", device="cpu")),
        (["org/m", "a fox", "--dtype", "float16"], Order(model="org/m", dtype="float16", device="cpu")),
        (["my.yaml", "a fox", "--application", "b"], Order(config="{here}/my.yaml", application="b")),
        (
            ["m", "a fox", "--lora", "ink.safetensors:0.5"],
            Order("m", loras={"ink": "{here}/ink.safetensors"}, device="cpu"),
        ),
    ],
)
def test_a_model_a_config_and_files_of_loras_are_ordered(
    words: list[str], order: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered: list[Order] = []

    def take(given: Order) -> None:
        ordered.append(given)
        raise CommandError("it is enough")

    monkeypatch.setattr(here, "served_here", take)
    monkeypatch.setattr("serve_app.tools.command.machine.lines_of_driver", list)
    monkeypatch.chdir(tmp_path)
    Path("ink.safetensors").touch()
    assert run(["generate", *words]) == Exit.FAILED
    config = order.config and order.config.format(here=tmp_path)
    loras = {name: path.format(here=tmp_path) for name, path in order.loras.items()}
    assert ordered == [Order(**{**vars(order), "config": config, "loras": loras})]


def test_an_application_is_chosen_from_a_config_only() -> None:
    assert run(["generate", "org/m", "a fox", "--application", "b"]) == Exit.USAGE
    assert generating.is_serve_config("a.yml")
