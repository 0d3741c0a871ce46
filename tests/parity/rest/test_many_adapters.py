"""Forty adapters of a model that has room for eight: the memory is bounded, and what is in use stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deployments.adapters.args import AdapterCacheArgs
from deployments.adapters.library import AdapterLibrary
from deployments.stage_pipeline.loading import load_stage
from tests.support.adapter_files import lora_tensors, written
from tests.support.tiny_models import checkpoint


def test_forty_adapters_share_the_room_of_eight(checkpoints_root: Path, tmp_path: Path) -> None:
    stage = load_stage(checkpoint("flux", checkpoints_root), ("denoiser",))
    transformer: Any = stage.components["transformer"]
    uses = [written(tmp_path, f"s{i}", lora_tensors(transformer, "transformer", ("to_q",), seed=i)) for i in range(40)]
    size = 4 * sum(tensor.numel() for tensor in lora_tensors(transformer, "transformer", ("to_q",)).values())
    args = AdapterCacheArgs(max_device_bytes=8 * size, max_host_bytes=16 * size)
    library = AdapterLibrary(stage, args, tmp_path)
    with library.holding(uses[:1]) as [pinned]:
        for use in uses:
            with library.holding([use]) as [held]:
                assert held.peft_name in transformer.peft_config
            told = library.describe()
            assert told["device"]["bytes"] <= 8 * size
            assert told["host"]["bytes"] <= 16 * size
            assert pinned.peft_name in transformer.peft_config
    assert len(transformer.peft_config) == 8
    assert told["evictions"] == {"host": 24, "device": 32}
    with library.holding(uses[-7:]), library.holding(uses[:1]):  # all are there still
        assert library.describe()["misses"] == told["misses"]
