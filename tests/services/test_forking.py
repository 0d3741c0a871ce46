"""Programs that are forked are what they would be as new processes, and end as those do."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.forking.client import FOLDER, NUMBER, ONE_FOR_ALL_NODES, OWNER, place_and_owner
from tests.support.forking.command import FORKED_PYTHON

ROOT = Path(__file__).resolve().parents[2]
# With one library, for the start of the tests' own server takes as long as all of this file.
SERVER = """if True:
    import sys
    from tests.support.forking import server

    server.LIBRARIES = ("colorsys",)
    server.main(sys.argv[1], int(sys.argv[2]))
"""
TELLS = """if True:
    import found_there, os, sys
    print(sys.argv[1:], os.environ["WORD"], os.getcwd(), sys.stdin.read(), __name__, "colorsys" in sys.modules)
    print("of errors", file=sys.stderr)
    sys.exit(3)
"""


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """Of clients of a server that ends with a process of the test."""
    with tempfile.TemporaryDirectory(prefix="forks-", dir="/tmp") as folder:  # a short path
        with subprocess.Popen(["sleep", "1000"]) as owner:
            server = subprocess.Popen([sys.executable, "-c", SERVER, f"{folder}/tests", str(owner.pid)], cwd=ROOT)
            while not (place := Path(folder, "tests")).exists():
                assert server.poll() is None
            outside = {
                name: value for name, value in os.environ.items() if name not in ("RAY_RAYLET_PID", "RAY_JOB_ID")
            }
            yield outside | {FOLDER: folder, OWNER: str(owner.pid), "WORD": "a word"}
            owner.kill()
        assert server.wait(60) == 0
        assert not place.exists()


def start(environment: dict[str, str], *arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [*FORKED_PYTHON, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("way", ["-c", "-m", "script"])
def test_it_has_its_arguments_environment_folder_and_streams_and_ends_with_its_exit_code(
    way: str, environment: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "telling.py"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/found_there.py").write_text("")
    file.write_text(TELLS)
    arguments: dict[str, Sequence[str]] = {"-c": ("-c", TELLS), "-m": ("-m", "telling"), "script": (str(file),)}
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    there = environment | {"PYTHONPATH": str(tmp_path / "elsewhere")}
    with start(there, *arguments[way], "one", cwd=tmp_path, **pipes) as program:
        told, errors = program.communicate("of the input")
    assert told == f"['one'] a word {tmp_path} of the input __main__ True\n"
    assert errors == "of errors\n"
    assert program.returncode == 3


def test_a_signal_that_ends_it_is_seen(environment: dict[str, str]) -> None:
    with start(environment, "-c", "import os; os.kill(os.getpid(), 11)") as program:
        assert program.wait(60) == -signal.SIGSEGV


def test_it_gets_the_signals_that_its_parent_sends(environment: dict[str, str]) -> None:
    code = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print('ready', flush=True); signal.pause()"
    with start(environment, "-c", code) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.terminate()
        assert program.wait(60) == 7


def test_it_ends_where_its_parent_kills_it(environment: dict[str, str]) -> None:
    with start(environment, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(1000)") as program:
        assert program.stdout is not None
        forked = psutil.Process(int(program.stdout.readline()))
        program.kill()
        forked.wait(60)
    assert program.returncode == -signal.SIGKILL


def test_a_client_that_dies_before_it_said_all_harms_no_other(environment: dict[str, str]) -> None:
    for said in (b"", NUMBER.pack(1000), NUMBER.pack(1000) + b"{"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{environment[FOLDER]}/tests")
            client.sendall(said)
    with start(environment, "-c", "print('there')") as program:
        assert program.communicate()[0] == "there\n"


def test_each_job_of_a_ray_has_a_server_that_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its library reads the job when it is imported."""
    monkeypatch.setenv(FOLDER, "/tmp/forks")
    monkeypatch.setenv(OWNER, "1")
    found = []
    for raylet, job in (("7", "01000000"), ("7", "02000000"), ("8", "01000000")):
        monkeypatch.setenv("RAY_RAYLET_PID", raylet)
        monkeypatch.setenv("RAY_JOB_ID", job)
        found.append(place_and_owner())
    assert [owner for _, owner in found] == ["7", "7", "8"]
    monkeypatch.delenv("RAY_RAYLET_PID")
    assert place_and_owner() == ("/tmp/forks/tests", "1")
    assert len({place for place, _ in [*found, place_and_owner()]}) == 4


def test_nodes_of_one_machine_may_share_a_server_for_each_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {FOLDER: "/tmp/forks", OWNER: "1", ONE_FOR_ALL_NODES: "1"}.items():
        monkeypatch.setenv(name, value)
    found = []
    for raylet, job in (("7", "01000000"), ("8", "01000000"), ("8", "02000000")):
        monkeypatch.setenv("RAY_RAYLET_PID", raylet)
        monkeypatch.setenv("RAY_JOB_ID", job)
        found.append(place_and_owner())
    assert found == [(f"/tmp/forks/{job}", "1") for job in ("01000000", "01000000", "02000000")]
