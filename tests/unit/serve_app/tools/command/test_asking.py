"""`triptych` against a server: the real application on a real port, with stages that are played."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deployments.messages import GenerationRequest, Media, MediaFile
from serve_app.api_keys import new_key
from serve_app.tools.command.exits import Exit
from serve_app.tools.command.main import run
from serve_app.tools.command.server.client import Server
from serve_app.tools.command.shown.progress import Lines
from tests.support.in_process import description
from tests.support.played_page import INPAINTING, TEXT_TO_VIDEO, ServedPage, served_page

Said = pytest.CaptureFixture[str]
FLUX = description("FluxPipeline", takes_adapters=True)
NOWHERE = "http://127.0.0.1:9"  # the port of `discard`, which nobody serves


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPage]:
    folder = tmp_path_factory.mktemp("command")
    (folder / "loras").mkdir()
    (folder / "loras" / "ink.safetensors").touch()
    with served_page(folder / "outputs", describing=FLUX, adapter_places=(str(folder / "loras"),)) as served:
        served.server.pace.step_s = 0.001
        yield served


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, and no key of whoever runs the tests."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(page: ServedPage, *arguments: str) -> int:
    return run([*arguments, "--url", page.url])


def document(said: Said) -> Any:
    """All that is on stdout, which is one JSON document."""
    return json.loads(said.readouterr().out)


# --- generate --------------------------------------------------------------------------------------------------------


def test_a_picture_is_made_with_its_progress_on_stderr(page: ServedPage, here: Path, capsys: Said) -> None:
    assert (
        asked(page, "generate", "a fox", "-o", "fox.png", "--seed", "7", "--steps", "8", "--size", "64x48") == Exit.OK
    )
    with Image.open(here / "fox.png") as picture:
        assert (picture.size, picture.format) == ((64, 48), "PNG")
    said = capsys.readouterr()
    assert said.out == ""
    assert "step 8 of 8" in said.err
    assert "fox.png: seed 7" in said.err


@pytest.mark.rest
def test_json_tells_the_files_their_seeds_and_what_was_made(page: ServedPage, capsys: Said) -> None:
    assert asked(page, "generate", "flux", "foxes", "-o", "fox.webp", "-n", "2", "--json") == Exit.OK
    told = document(capsys)
    assert [file["path"] for file in told["files"]] == ["fox-1.webp", "fox-2.webp"]
    assert all(Path(file["path"]).stat().st_size == file["bytes"] for file in told["files"])
    assert (told["kind"], told["model"]) == ("image", "flux")


@pytest.mark.rest
def test_without_a_name_a_file_is_called_by_its_kind_and_seed_and_none_is_overwritten(
    page: ServedPage, here: Path
) -> None:
    for _ in range(2):
        assert asked(page, "generate", "a fox", "--seed", "7", "-q") == Exit.OK
    assert sorted(each.name for each in here.iterdir()) == ["picture-7-2.png", "picture-7.png"]


@pytest.mark.rest
def test_to_stdout_go_the_bytes_of_the_file_alone(page: ServedPage, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert asked(page, "generate", "a fox", "-o", "-") == Exit.OK
    assert capsysbinary.readouterr().out.startswith(b"\x89PNG")


@pytest.mark.parametrize("moment", ["while it runs", "while it is asked for"])
def test_ctrl_c_cancels_the_job_on_the_server(
    moment: str, page: ServedPage, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    monkeypatch.setattr(page.server.pace, "is_held", True)
    if moment == "while it runs":
        monkeypatch.setattr(Lines, "say", interrupt_at("started", Lines.say))
    else:
        monkeypatch.setattr(Server, "post", interrupted_once(Server.post))
    assert asked(page, "generate", "a fox") == Exit.INTERRUPTED
    assert "is cancelled" in capsys.readouterr().err
    monkeypatch.undo()
    assert asked(page, "jobs", "list", "--limit", "1", "--json") == Exit.OK
    assert [job["status"] for job in document(capsys)["jobs"]] == ["cancelled"]


def interrupt_at(text: str, say: Callable[..., None]) -> Callable[..., None]:
    def said(self: Lines, told: str) -> None:
        say(self, told)
        if told == text:
            raise KeyboardInterrupt

    return said


def interrupted_once(post: Callable[..., Any]) -> Callable[..., Any]:
    """The first call is answered by the server, but the answer does not come here."""
    calls = 0

    def posted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        answer = post(*arguments)
        if calls == 1:
            raise KeyboardInterrupt
        return answer

    return posted


@pytest.mark.rest
def test_pictures_masks_and_other_arguments_are_sent_under_the_fields_of_the_model(
    tmp_path: Path, capsys: Said
) -> None:
    for name, mode in (("a.png", "RGB"), ("mask.png", "L")):
        Image.new(mode, (32, 32)).save(tmp_path / name)
    with served_page(tmp_path / "outputs", describing=INPAINTING) as page:
        page.server.pace.step_s = 0
        given = "--image a.png --mask mask.png --set sigmas=[1,0.5] --set mode=fast"
        assert asked(page, "generate", "a fox", *given.split(), "-o", "b.png") == Exit.OK
        [request] = page.server.requests
    assert {"image", "mask_image"} <= request.arguments.keys()
    assert request.arguments["sigmas"] == [1, 0.5]


@pytest.mark.rest
def test_a_video_is_asked_for_where_the_model_makes_videos(tmp_path: Path, capsys: Said) -> None:
    async def make(request: GenerationRequest) -> Media:
        return Media((MediaFile(b"a video", "video/mp4", 32, 32, num_frames=5, fps=8),), {"denoise": 0.1})

    with served_page(tmp_path / "outputs", describing=TEXT_TO_VIDEO) as page:
        page.server.make, page.server.pace.step_s = make, 0
        assert asked(page, "generate", "a fox", "--set", "num_frames=5", "-o", "fox.mp4", "--json") == Exit.OK
        assert asked(page, "generate", "a fox", "-o", "fox.png") == Exit.USAGE
    said = capsys.readouterr()
    assert json.loads(said.out)["kind"] == "video"
    assert "-o: a file must end in .mp4" in said.err


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate"], "name a MODEL and a PROMPT"),
        (["generate", "a", "b", "c", "--url", NOWHERE], "put the prompt into quotes"),
        (["generate", "m", "a fox", "--api-key-file", "key"], "--api-key-file: of no effect without --url"),
        (["generate", "a fox", "--url", NOWHERE, "--dtype", "float16"], "--dtype: of no effect with --url"),
        (["generate", "a fox", "--url", NOWHERE, "--size", "64"], "--size must be like 512x512, got '64'"),
        (["generate", "a fox", "--url", NOWHERE, "--image", "no.png"], "there is no file 'no.png'"),
        (["generate", "a fox", "--url", NOWHERE, "--set", "steps"], "--set must be like guidance_scale=3.5"),
        (["generate", "a fox", "--url", NOWHERE, "--set", "image=@no.png"], "--set image: there is no file 'no.png'"),
        (["generate", "a fox", "--url", NOWHERE, "--lora", "neon:much"], "--lora must be like NAME or NAME:0.8"),
        (["generate", "a fox", "--url", NOWHERE, "-o", "no/fox.png"], "there is no folder"),
        (["generate", "a fox", "--url", NOWHERE, "-o", "."], "-o .: it is a folder"),
        (["generate", "a fox", "--url", NOWHERE, "-o", "-", "-n", "2"], "-o - takes one file, -n asks for 2"),
        (["generate", "a fox", "--url", NOWHERE, "--lora", "a.safetensors"], "--lora a.safetensors: of no effect"),
        (["status", "--url", "http://a\x01/"], "--url must be like http://127.0.0.1:8000"),
        (["generate", "a fox", "--url", NOWHERE, "-o", "-", "--json"], "would both write to stdout"),
        (["generate", "a fox", "--url", NOWHERE, "--show", "kitty"], "--show kitty: stdout is no terminal"),
        (["status", "--url", "ftp://host"], "--url must be like http://127.0.0.1:8000, got 'ftp://host'"),
        (["status", "--url", "http://host:port"], "--url must be like http://127.0.0.1:8000"),
        (["status", "--url", NOWHERE, "--api-key-file", "no"], "--api-key-file no cannot be read: No such file"),
        (["jobs", "show"], "Missing argument 'ID'"),
        (["statsu"], "there is no command 'statsu': did you mean 'status'?"),
        (["plan", "m", "--gpu", "H99"], "gpu 'H99' must be a size such as 24GB, or one of"),
    ],
)
def test_a_wrong_command_line_is_told_in_words_with_status_2(arguments: list[str], said: str, capsys: Said) -> None:
    assert run(arguments) == Exit.USAGE
    told = capsys.readouterr().err
    assert said in told
    assert "Traceback" not in told


def test_a_wrong_command_line_is_a_document_too_where_json_is_asked_for(capsys: Said) -> None:
    assert run(["jobs", "show", "--json"]) == Exit.USAGE
    error = document(capsys)["error"]
    assert (error["exit"], "Missing argument 'ID'" in error["message"]) == (2, True)


@pytest.mark.parametrize(
    "arguments", [["generate", "a fox"], ["status"], ["jobs", "list"], ["models"], ["loras", "list"]]
)
def test_a_server_that_cannot_be_reached_has_a_status_of_its_own(arguments: list[str], capsys: Said) -> None:
    assert run([*arguments, "--url", NOWHERE, "--json"]) == Exit.UNREACHABLE
    said = capsys.readouterr()
    assert f"{NOWHERE} cannot be reached" in said.err
    assert json.loads(said.out)["error"]["exit"] == 3


def test_a_refusal_is_told_in_the_words_of_the_server(page: ServedPage, capsys: Said) -> None:
    assert asked(page, "generate", "a fox", "--set", "guidance=3", "--json") == Exit.REFUSED
    said = capsys.readouterr()
    error = json.loads(said.out)["error"]
    assert (error["status"], error["param"]) == (400, "guidance")
    assert "guidance_scale" in said.err


@pytest.mark.parametrize(("status", "exit"), [(429, Exit.REFUSED), (503, Exit.SERVERS_FAULT)])
def test_a_server_without_room_says_when_to_try_again(status: int, exit: Exit, page: ServedPage, capsys: Said) -> None:
    page.server.refusals.append((status, 12))
    assert asked(page, "generate", "a fox") == exit
    assert "too many requests are waiting; try again in 12 s" in capsys.readouterr().err


@pytest.mark.rest
def test_a_job_that_fails_ends_with_the_status_of_its_fault(
    page: ServedPage, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    async def fail(request: Any) -> Any:
        raise OSError("the disk is gone")

    monkeypatch.setattr(page.server, "make", fail)
    assert asked(page, "generate", "a fox", "--seed", "99") == Exit.SERVERS_FAULT
    told = capsys.readouterr().err
    assert "failed: internal error" in told
    assert "disk" not in told


@pytest.mark.rest
def test_a_key_is_sent_from_its_file_or_the_environment_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    key, line = new_key("someone")
    (tmp_path / "keys").write_text(f"{line}\n")
    (tmp_path / "keys").chmod(0o600)
    (tmp_path / "key").write_text(f"{key}\n")
    with served_page(tmp_path / "outputs", api_keys_file=tmp_path / "keys") as page:
        assert asked(page, "models", "--api-key-file", "key") == Exit.OK
        monkeypatch.setenv("OPENAI_API_KEY", key)
        assert asked(page, "models") == Exit.OK
        monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
        assert asked(page, "models", "--json") == Exit.REFUSED
    said = capsys.readouterr()
    assert "give a key with --api-key-file FILE" in said.err
    assert key not in said.out + said.err
    assert "sk-wrong" not in said.out + said.err


# --- jobs, LoRAs, models, status -------------------------------------------------------------------------------------


@pytest.mark.rest
def test_a_job_is_listed_shown_watched_and_downloaded(page: ServedPage, here: Path, capsys: Said) -> None:
    assert asked(page, "generate", "a fox", "-o", "fox.png", "--json") == Exit.OK
    job = document(capsys)["job"]
    assert asked(page, "jobs", "list", "--json") == Exit.OK
    assert job in [each["id"] for each in document(capsys)["jobs"]]
    assert asked(page, "jobs", "list", "--status", "failed", "--status", "queued", "--json") == Exit.OK
    assert job not in [each["id"] for each in document(capsys)["jobs"]]
    for arguments in (["list"], ["list", "--status", "completed"], ["show", job], ["watch", job]):
        assert asked(page, "jobs", *arguments) == Exit.OK
        told = capsys.readouterr().out
        assert job in told
        assert "completed" in told
    assert asked(page, "jobs", "download", job, "-o", "again.png") == Exit.OK
    assert (here / "again.png").read_bytes() == (here / "fox.png").read_bytes()


def test_a_job_that_is_not_there_is_refused(page: ServedPage, capsys: Said) -> None:
    assert asked(page, "jobs", "cancel", "job_none") == Exit.REFUSED
    assert "there is no job 'job_none'" in capsys.readouterr().err
    assert asked(page, "jobs", "show", "../models") == Exit.REFUSED


def test_loras_are_added_listed_and_removed(page: ServedPage, capsys: Said) -> None:
    path = str(page.server.folder.parent / "loras" / "ink.safetensors")
    assert asked(page, "loras", "add", "ink", path, "--scale", "0.5", "--model", "flux") == Exit.OK
    assert asked(page, "generate", "a fox", "--lora", "ink:0.7", "-o", "ink.png") == Exit.OK
    [use] = page.server.requests[-1].features["loras"]
    assert (use["name"], use["scale"]) == ("ink", 0.7)
    capsys.readouterr()
    assert asked(page, "loras", "list", "--json") == Exit.OK
    assert [(each["name"], each["scale"]) for each in document(capsys)["loras"]] == [("ink", 0.5)]
    assert asked(page, "loras", "remove", "flux:ink") == Exit.OK
    assert asked(page, "loras", "remove", "ink") == Exit.REFUSED
    assert asked(page, "loras", "add", "ink", "/etc/passwd") == Exit.REFUSED


@pytest.mark.rest
def test_the_models_are_told_and_what_one_takes(page: ServedPage, capsys: Said) -> None:
    assert asked(page, "models") == Exit.OK
    assert "flux" in capsys.readouterr().out
    assert asked(page, "models", "flux") == Exit.OK
    assert "guidance_scale" in capsys.readouterr().out
    assert asked(page, "models", "other") == Exit.REFUSED


def test_status_tells_stages_replicas_and_the_queue(page: ServedPage, capsys: Said) -> None:
    assert asked(page, "status") == Exit.OK
    told = capsys.readouterr().out
    assert "flux, ready" in told
    assert told.count("Denoiser") == 2
    assert "let in: 0" in told
    assert asked(page, "status", "--json") == Exit.OK
    seen = document(capsys)
    assert (seen["ready"], seen["models"]) == (True, ["flux"])
    assert [each["name"] for each in seen["cluster"]["deployments"]] == ["Encoder", "Denoiser", "VAE"]


@pytest.mark.rest
def test_status_says_what_a_server_without_its_page_does_not_tell(tmp_path: Path, capsys: Said) -> None:
    with served_page(tmp_path / "outputs", playground=False) as page:
        assert asked(page, "status") == Exit.OK
    told = capsys.readouterr().out
    assert "Denoiser  ready" in told.replace("   ", "  ")
    assert "playground: false" in told
