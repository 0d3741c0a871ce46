"""A real replica: what its stages cannot do is refused, and what observes it needs only a row."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.devices import DeviceError, DeviceProbe
from deployments.errors import OtherVersionError, ReplicaRefusedError, ReplicaUnfitError
from deployments.messages import (
    UNFOLLOWED,
    ComponentCall,
    Conditioning,
    DecodeInputs,
    GenerationRequest,
    OutputFormat,
    Packed,
)
from deployments.observability.observer import Observer, StageWork
from deployments.observability.table import OBSERVERS
from deployments.replicas import device_share
from deployments.replicas.replica import StageReplica
from deployments.replicas.table import REPLICAS, STAGE_REPLICA, ReplicaKind, deployment
from tests.support.whole_replica import ARGUMENTS, MakeReplica, RuntimeContext, make_replica, pretend

__all__ = ["make_replica"]

REQUEST = GenerationRequest("r", "flux", {}, 0, OutputFormat("image", "png"))


async def refusals(replica: Any) -> list[str]:
    """What encode, denoise and decode say, where they refuse."""

    async def denoise() -> None:
        async for _ in replica.denoise(REQUEST, UNFOLLOWED, Conditioning(Packed(None))):
            pass

    said = []
    for call in (
        lambda: replica.encode(REQUEST),
        denoise,
        lambda: replica.decode(REQUEST, DecodeInputs("result", Packed(None))),
    ):
        with pytest.raises(Exception) as refused:
            await call()
        said.append(str(refused.value))
    return said


def test_a_method_of_a_stage_that_is_not_here_is_refused(make_replica: MakeReplica, flux_checkpoint: Path) -> None:
    whole = make_replica(flux_checkpoint, stages=("vae",))
    encode, denoise, _ = asyncio.run(refusals(whole.replica))
    assert encode == "this replica runs vae, it has no encoder stage"
    assert denoise == "this replica runs vae, it has no denoiser stage"


async def from_stage_to_stage(replica: StageReplica, request: GenerationRequest) -> tuple[Conditioning, DecodeInputs]:
    conditioning = await replica.encode(request)
    items = [item async for item in replica.denoise(request, UNFOLLOWED, conditioning)]
    inputs = items[-1]
    assert isinstance(inputs, DecodeInputs)
    return conditioning, inputs


def test_what_another_version_of_the_model_has_made_is_refused(
    make_replica: MakeReplica, flux_checkpoint: Path
) -> None:
    whole = make_replica(flux_checkpoint)
    replica, arguments = whole.replica, {**ARGUMENTS["flux"], "num_inference_steps": 2}
    request = GenerationRequest("r", whole.model, arguments, 0, OutputFormat("image", "png"))
    conditioning, inputs = asyncio.run(from_stage_to_stage(replica, request))
    assert conditioning.making == inputs.making == replica.making[whole.model]
    replica.making = {whole.model: "that of an update"}
    for call in (
        lambda: anext(aiter(replica.denoise(request, UNFOLLOWED, conditioning))),
        lambda: replica.decode(request, inputs),
        lambda: replica.call_component(ComponentCall("vae", "encode", Packed(None), making="earlier")),
    ):
        with pytest.raises(OtherVersionError, match="another version of the model"):
            asyncio.run(call())


def test_a_replica_is_healthy_while_its_engine_lives(make_replica: MakeReplica, flux_checkpoint: Path) -> None:
    whole = make_replica(flux_checkpoint, stages=("denoiser",))
    asyncio.run(whole.replica.check_health())
    whole.denoiser.engine.close()
    with pytest.raises(RuntimeError, match="the engine's thread has ended"):
        asyncio.run(whole.replica.check_health())


class Planted(Observer):
    """Counts bytes and steps of each stage."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, bool]] = {}
        self.steps = 0

    @contextmanager
    def around(self, work: StageWork) -> Iterator[None]:
        work.on_step.append(self.count)
        yield
        self.seen[work.stage] = (work.steps, work.bytes_out > 0)

    def count(self) -> None:
        self.steps += 1

    def describe(self) -> dict[str, Any]:
        return {"planted": self.seen}


def test_a_planted_observer_needs_a_class_and_a_row(make_replica: MakeReplica, flux_checkpoint: Path) -> None:
    planted = Planted()
    whole = make_replica(flux_checkpoint, observers=(*OBSERVERS, lambda replica: planted))
    whole.generate(3)
    assert planted.seen == {"encoder": (0, True), "denoiser": (3, True), "vae": (0, True)}
    assert planted.steps == 3
    inside = asyncio.run(whole.replica.inspect())
    assert inside["planted"] == planted.seen
    assert inside["requests"] == []


def test_a_replica_reports_the_load_of_each_of_its_stages(make_replica: MakeReplica, flux_checkpoint: Path) -> None:
    whole = make_replica(flux_checkpoint)
    whole.generate(2)
    stats = asyncio.run(whole.replica.record_autoscaling_stats())
    for stage in ("encoder", "denoiser", "vae"):
        assert (stats[f"{stage}_arrived"], stats[f"{stage}_present"]) == (1, 0)
        assert stats[f"{stage}_busy_s"] > 0
    assert stats["load_s"] > 0


def test_a_replica_tells_what_it_does_and_nothing_of_where_it_is(
    make_replica: MakeReplica, flux_checkpoint: Path
) -> None:
    whole = make_replica(flux_checkpoint)
    whole.generate(2)
    activity = asyncio.run(whole.replica.activity())
    assert set(activity) == {"replica_id", "stages", "loads", "requests", "engine"}
    assert {stage: load["arrived"] for stage, load in activity["loads"].items()} == {
        "encoder": 1,
        "denoiser": 1,
        "vae": 1,
    }
    assert activity["engine"]["batch_sizes"] == {1: activity["engine"]["batches"]}
    assert activity["requests"] == []
    assert str(flux_checkpoint) not in str(activity)


STICKY = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
COMPONENT = {"encoder": "text_encoder", "denoiser": "transformer", "vae": "vae"}


def dead(*_: Any, **__: Any) -> Any:
    raise STICKY


@pytest.mark.parametrize("stage", ["encoder", "denoiser", "vae"])
def test_a_dead_device_ends_the_replica_and_not_the_request(
    stage: str, make_replica: MakeReplica, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_replica(flux_checkpoint)
    module = whole.replica.stage.components[COMPONENT[stage]]
    monkeypatch.setattr(module, "decode" if stage == "vae" else "forward", dead)
    with pytest.raises(torch.AcceleratorError):  # the device answers: the error is the request's own
        whole.generate(2)
    asyncio.run(whole.replica.check_health())
    monkeypatch.setattr(DeviceProbe, "__call__", dead)
    with pytest.raises(ReplicaUnfitError, match="illegal memory access"):
        whole.generate(2)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        asyncio.run(whole.replica.check_health())
    assert all("illegal memory access" in said for said in asyncio.run(refusals(whole.replica)))


def test_a_replica_that_ray_gave_no_gpu_does_not_start(
    make_replica: MakeReplica, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "cuda")
    monkeypatch.setattr(RuntimeContext, "get_assigned_resources", lambda _: {"CPU": 1.0})
    with pytest.raises(DeviceError, match=r"ray_actor_options.num_gpus is 0: .* above 0 and at most 1"):
        make_replica(flux_checkpoint, stages=("denoiser",))


def test_an_idle_replica_on_a_shared_gpu_gives_memory_back_when_its_health_is_asked(
    make_replica: MakeReplica, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "cuda")
    monkeypatch.setattr(RuntimeContext, "get_assigned_resources", lambda _: {"GPU": 0.3})
    given_back: list[str] = []
    monkeypatch.setattr(device_share, "give_back_memory", lambda device: given_back.append(device.name))
    monkeypatch.setattr(device_share, "IDLE_S", 0.0)
    whole = make_replica(flux_checkpoint)
    for expected in (1, 1, 2):
        if expected == 2:
            whole.generate(2)
        asyncio.run(whole.replica.check_health())
        assert given_back == ["cuda"] * expected
    with whole.replica.threads.under_way.work("something"):
        asyncio.run(whole.replica.check_health())
    assert given_back == ["cuda"] * 2


@pytest.mark.parametrize("kind", REPLICAS.values(), ids=lambda kind: kind.name)
def test_every_deployment_tells_its_health_by_the_same_replica(kind: ReplicaKind) -> None:
    bound = deployment(kind)
    assert bound.func_or_class == STAGE_REPLICA
    assert STAGE_REPLICA.endswith(f".{StageReplica.__name__}")
    assert bound._deployment_config.health_check_period_s == 2


@pytest.mark.parametrize("thread", ["threads", "engine"])
def test_a_hung_device_ends_the_replica(
    thread: str, make_replica: MakeReplica, flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoding or a forward that does not end, seen by the clock."""
    whole = make_replica(flux_checkpoint)
    asyncio.run(whole.replica.check_health())
    under_way = (whole.denoiser.engine if thread == "engine" else whole.replica.threads).under_way
    with under_way.work("it hangs"):
        monkeypatch.setattr(under_way, "_clock", lambda: time.monotonic() + 3601)
        with pytest.raises(RuntimeError, match=r"has not ended for 3601 s, at most 3600 s are allowed"):
            asyncio.run(whole.replica.check_health())
        with pytest.raises(ReplicaRefusedError, match="has not ended"):
            whole.generate(2)


def test_requests_of_an_engine_whose_thread_has_ended_are_done_by_others(
    make_replica: MakeReplica, flux_checkpoint: Path
) -> None:
    whole = make_replica(flux_checkpoint)
    whole.denoiser.engine.close()
    with pytest.raises(ReplicaRefusedError, match="the engine's thread has ended"):
        whole.generate(2)
