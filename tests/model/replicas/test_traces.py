"""What a real replica tells in the spans of a traced request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from deployments import tracing
from deployments.errors import DeadlineExceededError
from deployments.messages import Checkpoint, Conditioning, DecodeInputs, Envelope, GenerationRequest
from tests.support.engine_parity import CACHE_DIT, CACHED_STEPS
from tests.support.traced import Traces, attributes_of, events_of, trace_of, traces
from tests.support.whole_replica import ARGUMENTS, OUTPUTS, MakeReplica, WholeReplica, make_replica

__all__ = ["make_replica", "traces"]

STEPS = 4
DENOISING = {"checkpoint_every": 1, "max_wait_s": 1.0, "merging": "always"}
IN_A_REPLICA = ["encoder", "denoiser", "vae", "write"]


def request_of(number: int, steps: int = STEPS, **changes: Any) -> GenerationRequest:
    arguments = {**ARGUMENTS["flux"], "num_inference_steps": steps}
    return GenerationRequest(f"r{number}", "flux", arguments, number, OUTPUTS["flux"], **changes)


async def make(
    whole: WholeReplica, request: GenerationRequest, envelope: Envelope, checkpoint: Checkpoint | None = None
) -> list[Checkpoint]:
    """Its way through the stages; the checkpoints that came."""
    conditioning = await whole.replica.encode(request, envelope)
    inputs, made = await denoise(whole, request, envelope, conditioning, checkpoint)
    await whole.replica.decode(request, inputs, envelope)
    return made


async def denoise(
    whole: WholeReplica,
    request: GenerationRequest,
    envelope: Envelope,
    conditioning: Conditioning,
    checkpoint: Checkpoint | None,
) -> tuple[DecodeInputs, list[Checkpoint]]:
    items = [item async for item in whole.replica.denoise(request, envelope, conditioning, checkpoint)]
    assert isinstance(items[-1], DecodeInputs)
    return items[-1], [item for item in items if isinstance(item, Checkpoint)]


def test_the_spans_of_a_replica_tell_steps_batches_checkpoints_and_resumes(
    make_replica: MakeReplica, flux_checkpoint: Path, traces: Traces
) -> None:
    whole = make_replica(flux_checkpoint, arguments={"denoising": DENOISING})
    asyncio.run(make(whole, request_of(0), Envelope()))
    assert traces.spans == [], "nobody traces it"
    with tracing.begun("job", {}):
        envelope = Envelope(trace=tracing.carried())
    parent = traces.one("job")
    traces.forget()

    checkpoints = asyncio.run(make(whole, request_of(1), envelope))
    assert [span.name for span in traces.spans] == IN_A_REPLICA
    assert {trace_of(span) for span in traces.spans} == {trace_of(parent)}
    alone = traces.one("denoiser")
    told = attributes_of(alone)
    assert (told["steps"], told["first_step"], told["forwards"]) == (STEPS, 0, STEPS)
    assert (told["mean_batch"], told["max_batch"], told["batch_mates"], told["merged_forwards"]) == (1, 1, 0, 0)
    assert told["device_s"] > 0
    assert told["waiting_s"] >= 0
    assert min(told["bytes_in"], told["bytes_out"]) > 0
    assert events_of(alone) == ["checkpoint"] * len(checkpoints)
    assert attributes_of(traces.one("write"))["files"] == 1

    traces.forget()
    asyncio.run(make(whole, request_of(1), envelope, checkpoints[1]))
    resumed = traces.one("denoiser")
    assert events_of(resumed)[0] == "resumed"
    assert attributes_of(resumed)["first_step"] == checkpoints[1].step
    assert attributes_of(resumed)["steps"] == STEPS - checkpoints[1].step

    async def together() -> None:
        await asyncio.gather(*(make(whole, request_of(number, steps=8), envelope) for number in (2, 3)))

    asyncio.run(together())  # the first merge is verified, and is none
    traces.forget()
    asyncio.run(together())
    for span in traces.named("denoiser"):
        told = attributes_of(span)
        assert (told["max_batch"], told["batch_mates"]) == (2, 1)
        assert 1 < told["mean_batch"] <= 2
        assert 0 < told["merged_forwards"] <= told["forwards"]

    traces.forget()
    with pytest.raises(DeadlineExceededError):
        asyncio.run(make(whole, request_of(4, deadline_s=1e-6), envelope))
    late = traces.one("denoiser")
    assert events_of(late)[-1] == "deadline passed"
    assert attributes_of(late)["error.type"] == "DeadlineExceededError"
    assert attributes_of(late)["deadline_s"] == 1e-6


def test_the_span_tells_the_steps_that_a_cache_skipped(
    make_replica: MakeReplica, flux_checkpoint: Path, traces: Traces
) -> None:
    whole = make_replica(flux_checkpoint, **CACHE_DIT)
    with tracing.begun("job", {}):
        envelope = Envelope(trace=tracing.carried())
    asyncio.run(make(whole, request_of(0, CACHED_STEPS), envelope))
    assert attributes_of(traces.one("denoiser"))["cached_steps"] == whole.cache_summary()["reused_steps"] > 0
