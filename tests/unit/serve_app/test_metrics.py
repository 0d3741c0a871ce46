"""What an ingress tells its meter of requests, keys, its queue and its storage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.errors import StorageError
from deployments.messages import GenerationRequest, Media
from deployments.metrics.metric import hashed
from deployments.metrics.table import OF_THE_INGRESS
from serve_app.api_keys import new_key
from serve_app.making.admission import AdmissionArgs
from serve_app.storage.base import StoredObject
from serve_app.storage.guarded import Patience
from serve_app.storage.local import LocalStorage
from serve_app.storage.spool import SpooledStorage, SpoolUploads
from tests.support.in_process import TEXT_TO_IMAGE, Server, make_at_once, serving, until
from tests.support.recorded_meter import RecordedMeter
from tests.support.stored_files import DATA, KEY

PICTURES = "/v1/images/generations"


@pytest.fixture
def meter() -> RecordedMeter:
    return RecordedMeter()


@pytest.fixture
def server(tmp_path: Path, meter: RecordedMeter) -> Iterator[Server]:
    with serving(tmp_path) as server:
        server.meter = meter
        yield server


# --- requests and keys ---


async def test_requests_are_counted_by_route_and_by_how_they_ended(server: Server, meter: RecordedMeter) -> None:
    async with server.client() as client:
        await client.post(PICTURES, json={"prompt": "x"})
        await client.post(PICTURES, json={"prompt": "x", "num_inference_steps": -1})
        for video in ("video_1", "video_2"):
            await client.get(f"/v1/videos/{video}")
        for address in ("/nothing", "/v1/more/nothing"):
            await client.get(address)
    requests = meter.counted["triptych_requests_total"]
    assert requests == {
        (PICTURES, "2xx", "200"): 1,
        (PICTURES, "4xx", "400"): 1,
        ("/v1/videos/{video_id}", "4xx", "404"): 2,
        ("unrouted", "4xx", "404"): 2,
    }
    assert {key[:2] for key in requests} == set(meter.observed["triptych_request_seconds"])
    assert meter.stands_at["triptych_requests_open"] == {(): 0}


async def test_head_is_counted_by_the_route_that_answered(server: Server, meter: RecordedMeter) -> None:
    async with server.client() as client:
        await client.head("/v1/models")
    assert meter.counted["triptych_requests_total"] == {("/v1/models", "2xx", "200"): 1}


async def test_a_caller_who_hangs_up_is_counted_as_such(server: Server, meter: RecordedMeter) -> None:
    async def never(_: GenerationRequest) -> Media:
        await asyncio.Event().wait()
        raise AssertionError

    server.make = never
    asked = asyncio.ensure_future(server.post(PICTURES, json={"prompt": "x"}))
    await until(lambda: bool(server.requests))
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert meter.counted["triptych_requests_total"] == {(PICTURES, "hung_up", "none"): 1}


async def test_keys_are_told_by_a_hash_with_the_seconds_that_devices_worked_for_them(
    server: Server, meter: RecordedMeter, tmp_path: Path
) -> None:
    key, line = new_key("anna")
    (tmp_path / "keys").write_text(f"{line}\n", encoding="utf-8")
    server.configure(api_keys_file=tmp_path / "keys")
    async with server.client() as client:
        await client.post(PICTURES, json={"prompt": "x"}, headers={"authorization": f"Bearer {key}"})
        await client.post(PICTURES, json={"prompt": "x"})
    anna = hashed("anna")
    assert meter.counted["triptych_key_requests_total"] == {(anna, "2xx"): 1, ("none", "4xx"): 1}
    assert meter.counted["triptych_key_compute_seconds_total"] == {(anna,): pytest.approx(0.012)}
    assert meter.counted["triptych_key_made_total"] == {(anna,): 1}
    assert "anna" not in str(meter.counted)
    assert meter.counted["triptych_requests_total"]["unrouted", "4xx", "401"] == 1


async def test_refusals_say_which_bound_and_the_queue_stands_beside_its_bound(
    server: Server, meter: RecordedMeter
) -> None:
    server.configure(admission=AdmissionArgs(max_queue_s=10, first_guess_s=5))
    let_go = asyncio.Event()

    async def make_later(given: GenerationRequest) -> Media:
        await let_go.wait()
        return await make_at_once(given)

    server.make = make_later
    asked = [asyncio.ensure_future(server.post(PICTURES, json={"prompt": "x", "seed": seed})) for seed in (1, 2, 2, 4)]
    await until(lambda: sum(task.done() for task in asked) == 2)
    await server.service.tell()
    assert meter.counted["triptych_requests_refused_total"] == {("queue",): 2}
    pending = {who: count for (_, who), count in meter.stands_at["triptych_pending"].items()}
    assert pending == {"callers": 2, "waiting_jobs": 0, "running_jobs": 0}
    assert meter.stands_at["triptych_queue_seconds"]["flux", "callers"] == 10
    assert meter.stands_at["triptych_queue_limit_seconds"]["flux", "callers"] == 10
    assert meter.stands_at["triptych_model_info"] == {("flux",): 1}
    assert list(meter.stands_at["triptych_stages_wanted"].values()) == [1]
    assert meter.stands_at["triptych_job_store_up"] == {(): 1}
    let_go.set()
    await asyncio.gather(*asked)


async def test_of_several_models_each_has_its_requests_its_queue_and_its_deployments(
    server: Server, meter: RecordedMeter
) -> None:
    args = {name: {"admission": {"max_queue_s": bound}} for name, bound in (("flux", 10), ("wan", 99))}
    server.configure(several={"flux": TEXT_TO_IMAGE, "wan": TEXT_TO_IMAGE}, models=args)
    for model in ("wan", "wan", "flux", "nothing"):
        await server.post(PICTURES, json={"prompt": "x", "model": model})
    await server.service.tell()
    assert meter.counted["triptych_model_requests_total"] == {("wan", "2xx"): 2, ("flux", "2xx"): 1}
    assert meter.counted["triptych_made_total"] == {("wan", "image"): 2, ("flux", "image"): 1}
    bounds = meter.stands_at["triptych_queue_limit_seconds"]
    assert (bounds["flux", "callers"], bounds["wan", "callers"]) == (10, 99)
    assert set(meter.stands_at["triptych_model_info"]) == {("flux",), ("wan",)}
    assert set(meter.stands_at["triptych_stages_wanted"]) == {("Played-flux",), ("Played-wan",)}


async def test_the_same_request_at_once_is_counted_as_shared(server: Server, meter: RecordedMeter) -> None:
    body = {"prompt": "x", "seed": 1}
    await asyncio.gather(*(server.post(PICTURES, json=body) for _ in range(3)))
    assert sum(meter.counted["triptych_shared_total"].values()) == 3 - len(server.requests)


async def test_an_ingress_begins_its_counters_before_anything_happens(server: Server, meter: RecordedMeter) -> None:
    await server.open()
    server.service.start()
    await until(lambda: bool(meter.stands_at["triptych_job_store_up"]))
    assert tuple(meter.begun) == OF_THE_INGRESS


# --- storage ---


class Flaky(LocalStorage):
    """Shared, as S3 is; does not answer, or refuses, while it is told to."""

    is_shared = True
    hangs = is_down = False

    async def store(self, key: str, data: bytes, content_type: str, metadata: dict[str, str]) -> StoredObject:
        if self.hangs:
            await asyncio.Event().wait()
        if self.is_down:
            raise StorageError("it is down")
        return await super().store(key, data, content_type, metadata)


async def test_the_storage_its_circuit_and_the_spool_are_told(
    tmp_path: Path, meter: RecordedMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_app.storage.spool.OF_CALLERS", Patience(2.0, 1e9, max_calls=4))
    backend = Flaky(tmp_path / "bucket")
    spool = SpooledStorage(backend, tmp_path / "spool", meter=meter)
    await spool.store(KEY, DATA, "image/png", {})
    backend.is_down = True
    await spool.store(KEY, DATA, "image/png", {})
    await spool.tell()
    assert meter.stands_at["triptych_storage_circuit_open"] == {(): 0}, "it answers, if no good answer"
    backend.is_down, backend.hangs = False, True
    await spool.store(KEY, DATA, "image/png", {})
    await spool.tell()
    assert meter.stands_at["triptych_storage_circuit_open"] == {(): 1}
    assert meter.stands_at["triptych_spool_entries"] == {("upload",): 1, ("delete",): 0, ("set_aside",): 0}
    assert meter.stands_at["triptych_spool_bytes"][()] > len(DATA)
    assert meter.stands_at["triptych_spool_oldest_seconds"][()] >= 0
    assert meter.counted["triptych_spooled_total"] == {(): 2}
    backend.hangs = False
    spool.breaker._close()
    await SpoolUploads(spool, lambda _: asyncio.sleep(0)).round()
    await spool.tell()
    assert meter.stands_at["triptych_spool_entries"]["upload",] == 0
    assert meter.stands_at["triptych_spool_oldest_seconds"] == {(): 0}
    assert meter.counted["triptych_stored_bytes_total"] == {("direct",): len(DATA), ("spool",): len(DATA)}
    calls = {key: len(seconds) for key, seconds in meter.observed["triptych_storage_seconds"].items()}
    assert calls == {("store", "ok"): 2, ("store", "error"): 1, ("store", "away"): 1}
