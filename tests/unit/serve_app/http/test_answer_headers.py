"""The headers that say where the time of an answer went."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.in_process import Server, serving


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path) as server:
        yield server


async def test_server_timing_divides_the_time_of_an_answer_where_the_files_were_made(server: Server) -> None:
    started = time.perf_counter()
    answer = await server.post("/v1/images/generations", json={"prompt": "x"})
    client_ms = 1e3 * (time.perf_counter() - started)
    parts = dict(re.findall(r"(\w+);dur=([\d.]+)", answer.headers["server-timing"]))
    assert list(parts) == ["make", "answer"]
    assert 0 < sum(map(float, parts.values())) < client_ms


async def test_an_answer_for_which_nothing_was_made_has_no_server_timing(server: Server) -> None:
    assert "server-timing" not in (await server.post("/v1/images/generations", json={"prompt": ""})).headers
