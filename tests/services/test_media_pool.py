"""The pool of processes that write files: the bytes of this process, whatever dies."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from deployments.errors import GenerationFailedError
from deployments.media import pool as pool_module
from deployments.media.files import FileToWrite, write_file
from deployments.media.pool import MAX_DEATHS, MediaPool, MediaWorkerError, StartMethod, workers_for
from deployments.media.shared_memory import in_shared_memory

ROOT = Path(__file__).resolve().parents[2]
METHODS: tuple[StartMethod, ...] = ("fork", "spawn")

# Python 3.12 warns of what the pool is built for: this process has threads when it forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


FILES = {
    "png": FileToWrite("png", [noise(33, 20, 3)], {"seed": 1}),
    "grey png": FileToWrite("png", [noise(8, 8, 1)], {"seed": 1}),
    "jpeg": FileToWrite("jpeg", [noise(33, 20, 4)], {"prompt": "ä", "parameters": {}}, quality=80),
    "webp": FileToWrite("webp", [noise(33, 20, 3)], {"seed": 1}),
    "mp4": FileToWrite("mp4", [noise(17, 32, 3) for _ in range(5)], {"seed": 1}, fps=8.0),
    "mp4 with sound": FileToWrite(
        "mp4",
        [noise(16, 32, 3) for _ in range(5)],
        {"seed": 1},
        fps=8.0,
        samples=np.linspace(-1, 1, 4000, dtype=np.float32).reshape(2, -1),
        sample_rate=8000,
    ),
}


@pytest.fixture(scope="module", params=METHODS)
def pool(request: pytest.FixtureRequest) -> Iterator[MediaPool]:
    pool = MediaPool(request.param)
    yield pool
    pool.close()


@pytest.mark.parametrize("kind", FILES)
def test_the_bytes_are_those_of_this_process(kind: str, pool: MediaPool) -> None:
    assert pool.write(FILES[kind]) == write_file(FILES[kind])


def test_what_is_written_reaches_a_worker_through_shared_memory_and_not_through_the_pipe() -> None:
    video = FileToWrite("mp4", [noise(64, 64, 3) for _ in range(9)], {"seed": 1}, fps=8.0)
    with in_shared_memory(video) as shared:
        assert len(shared.pickled) < 2000
        assert sum(end - begin for begin, end in shared.places) == video.num_bytes


def test_the_memory_is_gone_when_the_file_is_written_and_when_the_worker_dies(
    pool: MediaPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = [os.getpid(), *pool.process_ids]
    before = [shared_memory_of(each) for each in processes]
    pool.write(FILES["mp4"])
    assert [shared_memory_of(each) for each in processes] == before
    with in_shared_memory(FILES["mp4"]):
        assert shared_memory_of(os.getpid()) == before[0] + 1
    [busy, other] = pool.process_ids
    os.kill(busy, signal.SIGKILL)
    for _ in range(2):  # each of the workers has a turn
        pool.write(FILES["mp4"])
    assert busy not in pool.process_ids
    assert shared_memory_of(os.getpid()) == before[0]
    assert shared_memory_of(other) == 0


def shared_memory_of(process_id: int) -> int:
    """Blocks that the process has open or mapped."""
    opened = [os.readlink(each) for each in Path(f"/proc/{process_id}/fd").iterdir() if each.is_symlink()]
    mapped = Path(f"/proc/{process_id}/maps").read_text().splitlines()
    return sum("triptych-media" in each for each in [*opened, *mapped])


def test_there_is_a_worker_for_each_cpu_of_the_replica_and_two_at_least() -> None:
    assert [workers_for(cpus) for cpus in (0, 0.5, 1, 3, 8, 200)] == [2, 2, 2, 3, 8, 16]


def test_the_files_are_written_elsewhere_and_two_at_a_time(pool: MediaPool) -> None:
    assert os.getpid() not in pool.process_ids
    assert len(set(pool.process_ids)) == 2
    for process_id in pool.process_ids:
        assert psutil.Process(process_id).ppid() == os.getpid()
    slow = FileToWrite("webp", [noise(1024, 1024, 3)], {})
    with ThreadPoolExecutor(2) as threads:
        writing = [threads.submit(pool.write, slow) for _ in range(2)]
        assert all(file.result() == write_file(slow) for file in writing)
    assert pool.describe()["idle"] == 2


def test_a_worker_that_dies_is_replaced_and_the_file_is_written(pool: MediaPool) -> None:
    before = pool.process_ids
    for process_id in before:
        os.kill(process_id, signal.SIGKILL)
    assert pool.write(FILES["png"]) == write_file(FILES["png"])
    assert pool.write(FILES["png"]) == write_file(FILES["png"])
    assert not set(before) & set(pool.process_ids)


def test_a_worker_that_dies_while_it_writes_is_replaced_and_the_file_is_written(pool: MediaPool) -> None:
    slow = FileToWrite("mp4", [noise(720, 1280, 3)] * 40, {}, fps=8.0)
    before = pool.process_ids
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(pool.write, slow)
        busy = wait_until_one_is_busy(before)
        assert not writing.done()
        busy.kill()
        assert writing.result() == write_file(slow)
    assert busy.pid not in pool.process_ids


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers are looked at often, and their successors are forked: no thread here holds a lock of a library."""
    worker = pool_module._Worker
    monkeypatch.setattr(pool_module, "WATCH_S", 0.1)
    monkeypatch.setattr(pool_module, "_Worker", lambda method: worker("fork"))


@pytest.mark.usefixtures("quick")
def test_workers_that_are_stopped_are_replaced_and_the_files_are_written() -> None:
    pool = MediaPool("fork")
    before = pool.process_ids
    for process_id in before:
        os.kill(process_id, signal.SIGSTOP)
    large = FileToWrite("png", [noise(1024, 1024, 3)], {})  # more than a pipe holds: already sending it waits
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(pool.write, [large, FILES["png"]])) == [write_file(large), write_file(FILES["png"])]
    assert not set(before) & set(pool.process_ids)
    assert not any(psutil.pid_exists(process_id) for process_id in before)
    pool.close()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("hang", ["waits for ever", "computes for ever"])
def test_a_file_that_never_ends_is_given_up_and_the_next_one_is_written(
    hang: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "write_file", HANGS[hang])
    monkeypatch.setattr(pool_module, "MAX_DEATHS", 2)
    monkeypatch.setattr(pool_module, "STALLED_S", 0.3)
    pool = MediaPool("fork", num_workers=1, file_timeout_s=None if hang == "waits for ever" else 0.5)
    with pytest.raises(GenerationFailedError, match="stood still" if hang == "waits for ever" else "within 0.5 s"):
        pool.write(FILES["jpeg"])
    assert pool.write(FILES["png"]) == write_file(FILES["png"])
    pool.close()


def wait_for_ever(file: FileToWrite) -> object:
    """But for the file by which a worker proves itself."""
    if file.format != "png":
        time.sleep(3600)
    return write_file(file)


def compute_for_ever(file: FileToWrite) -> object:
    while file.format != "png":
        pass
    return write_file(file)


HANGS = {"waits for ever": wait_for_ever, "computes for ever": compute_for_ever}


@pytest.mark.usefixtures("quick")
def test_a_file_that_crashes_each_worker_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "write_file", crash)
    pool = MediaPool("fork", num_workers=1)
    with pytest.raises(GenerationFailedError, match=f"died {MAX_DEATHS} times in a row"):
        pool.write(FILES["jpeg"])
    assert pool.write(FILES["png"]) == write_file(FILES["png"])
    pool.close()


def crash(file: FileToWrite) -> object:
    if file.format != "png":
        os.kill(os.getpid(), signal.SIGSEGV)
    return write_file(file)


def test_a_file_that_cannot_be_written_is_refused_and_the_worker_lives_on(pool: MediaPool) -> None:
    before = pool.process_ids
    with pytest.raises(GenerationFailedError, match="cannot be written: KeyError: 'gif'"):
        pool.write(FileToWrite("gif", [noise(8, 8, 3)], {}))
    assert pool.write(FILES["png"]) == write_file(FILES["png"])
    assert pool.process_ids == before


@pytest.mark.parametrize("method", METHODS)
def test_the_workers_end_with_a_process_that_is_killed(method: StartMethod) -> None:
    code = f"""
        from deployments.media.pool import MediaPool
        if __name__ == "__main__":
            print(*MediaPool("{method}").process_ids, flush=True)
            input()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout
    workers = [psutil.Process(int(word)) for word in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert alive == []


def test_a_spawned_worker_loads_no_torch() -> None:
    pool = MediaPool("spawn", num_workers=1)
    code = "import deployments.media.pool, sys; print('torch' in sys.modules, 'ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    [process_id] = pool.process_ids
    assert "libtorch" not in Path(f"/proc/{process_id}/maps").read_text()
    pool.close()


def test_a_forked_worker_holds_no_file_or_socket_of_the_process_that_forked_it(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w"):
        pool = MediaPool("fork", num_workers=2)
        for process_id in pool.process_ids:
            targets = [os.readlink(fd) for fd in Path(f"/proc/{process_id}/fd").iterdir() if int(fd.name) > 2]
            assert len(targets) == 2, "the pipe to the replica, and the one that tells of its end"
        pool.close()


def test_a_worker_that_does_not_start_is_refused_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.media.pool._serve", end_at_once)
    with pytest.raises(MediaWorkerError, match="SGLANG_DIFFUSION_WORKER_MULTIPROC_METHOD=fork"):
        MediaPool("fork", num_workers=1)


def end_at_once(_: object) -> None:
    os._exit(1)


def test_closing_ends_the_processes() -> None:
    pool = MediaPool("fork", num_workers=2)
    processes = [psutil.Process(process_id) for process_id in pool.process_ids]
    pool.close()
    assert not any(process.is_running() for process in processes)
    assert multiprocessing.active_children() == [] or not {p.pid for p in multiprocessing.active_children()} & set(
        pool.process_ids
    )


def wait_until_one_is_busy(process_ids: list[int]) -> psutil.Process:
    processes = [psutil.Process(process_id) for process_id in process_ids]
    used = {process.pid: process.cpu_times().user for process in processes}
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up:
        for process in processes:
            if process.cpu_times().user > used[process.pid] + 0.1:
                return process
        time.sleep(0.01)
    raise AssertionError("no worker became busy")
