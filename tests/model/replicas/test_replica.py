"""A real replica: what its stages cannot do is refused, and what observes it needs only a row."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.devices import DeviceProbe
from deployments.errors import ReplicaRefusedError, ReplicaUnfitError
from deployments.messages import UNFOLLOWED, Conditioning, DecodeInputs, GenerationRequest, OutputFormat, Packed
from deployments.observability.observer import Observer, StageWork
from deployments.observability.table import OBSERVERS
from tests.support.whole_replica import MakeReplica, make_replica

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


def test_requests_of_an_engine_whose_thread_has_ended_are_done_by_others(
    make_replica: MakeReplica, flux_checkpoint: Path
) -> None:
    whole = make_replica(flux_checkpoint)
    whole.denoiser.engine.close()
    with pytest.raises(ReplicaRefusedError, match="the engine's thread has ended"):
        whole.generate(2)
