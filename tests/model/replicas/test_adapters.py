"""What a replica tells of the LoRAs that it holds, and how it lets go of one."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from deployments.adapters.fetch import AdapterFile, fetch_file
from deployments.adapters.use import FEATURE
from deployments.messages import GenerationRequest, OutputFormat
from tests.support.adapter_files import lora_tensors, written
from tests.support.tiny_models.checkpoints import load_unsplit, request_arguments
from tests.support.whole_replica import MakeReplica, make_replica

__all__ = ["make_replica"]


def test_a_replica_tells_what_it_holds_and_forgets_it(
    make_replica: MakeReplica, flux_checkpoint: Path, tmp_path: Path
) -> None:
    transformer = load_unsplit(flux_checkpoint).transformer
    first = written(tmp_path, "first", lora_tensors(transformer, "transformer", ("to_q",)))
    second = written(tmp_path, "second", lora_tensors(transformer, "transformer", ("to_q",), rank=4, seed=1))
    arguments = {"adapters": {"first": {"path": first.path, "preload": True}}}
    replica: Any = make_replica(flux_checkpoint, arguments=arguments).replica
    assert replica.description.takes_adapters

    async def asked() -> None:
        [held] = await replica.adapters_held()
        facts = await replica.inspect_adapter(second.plain())
        assert (facts["components"], facts["rank"]) == (["transformer"], 4)
        assert await replica.adapters_held() == (held, facts["digest"])
        await replica.forget_adapter(held)
        await replica.forget_adapter(facts["digest"])
        for _ in range(100):  # the engine's thread takes the layers out
            if not await replica.adapters_held():
                break
            await asyncio.sleep(0.05)
        assert (await replica.inspect())["adapters"]["flux"]["device"]["adapters"] == 0

    asyncio.run(asked())


def test_the_thread_of_the_encoders_waits_for_no_file(
    make_replica: MakeReplica, flux_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load_unsplit(flux_checkpoint).text_encoder
    use = written(tmp_path, "style", lora_tensors(encoder, "text_encoder", ("q_proj",)))
    replica: Any = make_replica(flux_checkpoint, stages=("encoder",)).replica
    threads: list[str] = []

    def fetched(*asked: Any) -> AdapterFile:
        threads.append(threading.current_thread().name)
        return fetch_file(*asked)

    monkeypatch.setattr("deployments.adapters.library.fetch_file", fetched)
    features = {FEATURE: [use.plain()]}
    request = GenerationRequest("r", "m", request_arguments("flux"), 0, OutputFormat("image", "png"), features=features)
    asyncio.run(replica.encode(request))
    assert len(threads) == 1
    assert threads[0].startswith("request")
