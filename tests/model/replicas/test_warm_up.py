"""A replica makes the requests of `warm_up` before it takes any, tells how far it is, and refuses wrong ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch._inductor.runtime.cache_dir_utils import cache_dir

from deployments.accelerations import compile as compile_row
from deployments.errors import CheckpointError
from deployments.messages import STAGES, GenerationRequest, OutputFormat
from deployments.stage_pipeline.loading import load_stage
from deployments.stages.encode import encode
from deployments.stages.warm_up import warm_vae
from tests.support.whole_replica import MakeReplica, make_replica

__all__ = ["make_replica"]

SMALL = {"size": "32x32", "num_inference_steps": 2, "max_sequence_length": 32}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    monkeypatch.setattr("deployments.replicas.replica.tell_start", lambda *said: lines.append(said))
    return lines


class EncoderHandle:
    """The encoder's deployment, for a replica that starts: its event loop is not there to wait in."""

    def __init__(self, folder: Path) -> None:
        self.stage = load_stage(folder, ("encoder",))
        self.asked: list[GenerationRequest] = []
        self.encode = SimpleNamespace(remote=self._encode)

    def _encode(self, request: GenerationRequest) -> Any:
        self.asked.append(request)
        return SimpleNamespace(result=lambda: encode(self.stage, request))


def test_a_whole_replica_is_warm_when_it_is_there(
    make_replica: MakeReplica, flux_checkpoint: Path, told: list[tuple[str, ...]]
) -> None:
    arguments = {"warm_up": [SMALL, {**SMALL, "guidance_scale": 2.0, "size": "48x32"}]}
    whole = make_replica(flux_checkpoint, arguments=arguments)
    statistics = whole.denoiser.engine.statistics
    assert statistics.forwards >= 2 * 3 * 2  # of each request alone, and of two at once
    assert statistics.merged > 0, "whatever the first merge costs"
    assert not whole.denoiser.engine.batches.joining.always
    assert whole.denoiser.engine.batches.axes["transformer"].arguments[("hidden_states",)] == 0
    assert {said[:2] for said in told} == {("app", "+".join(STAGES))}
    texts = [said[2] for said in told]
    assert texts[0] == "warming up, request 1 of 2: encoding"
    assert "warming up, request 2 of 2: step 2 of 2" in texts
    assert texts[-1] == ""
    before = statistics.forwards
    assert whole.generate(2).files
    assert statistics.forwards == before + 2


def test_a_replica_of_one_stage_warms_up_that_stage(
    make_replica: MakeReplica, flux_checkpoint: Path, told: list[tuple[str, ...]]
) -> None:
    encoder = EncoderHandle(flux_checkpoint)
    arguments = {"warm_up": [SMALL]}
    denoiser = make_replica(flux_checkpoint, stages=("denoiser",), arguments=arguments, others={"encoder": encoder})
    assert denoiser.denoiser.engine.statistics.forwards >= 6
    encoder.asked.clear()
    vae = make_replica(flux_checkpoint, stages=("vae",), arguments=arguments, others={"encoder": encoder})
    assert [request.arguments["width"] for request in encoder.asked] == [32]
    assert vae.replica.media_pool is not None
    assert vae.replica.media_pool.describe() is not None
    assert ("app", "vae", "warming up, request 1 of 1: decoding") in told


def test_a_vae_stage_that_lacks_memory_warms_up_by_another_try(
    flux_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, stage = load_stage(flux_checkpoint, ("encoder",)), load_stage(flux_checkpoint, ("vae",))
    real, tries = stage.pipeline.vae.decode, [0]

    def decode(*args: Any, **kwargs: Any) -> Any:
        tries[0] += 1
        if tries[0] == 1:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return real(*args, **kwargs)

    monkeypatch.setattr(stage.pipeline.vae, "decode", decode)
    arguments = {"prompt": "a boat", "height": 32, "width": 32, "num_inference_steps": 2}
    request = GenerationRequest("warm-up-1", "flux", arguments, 0, OutputFormat("image", "png"))
    decoded = warm_vae(stage, request, encode(encoder, request))
    assert decoded is not None
    assert decoded.files
    assert tries == [2]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"nmu_steps": 2}, r"warm_up\[0\].nmu_steps: FluxPipeline does not take it; it takes .*num_inference_steps"),
        ({"num_inference_steps": "four"}, r"warm_up\[0\].num_inference_steps: must be integer, got 'four'"),
        ({"num_inference_steps": 0}, r"warm_up\[0\].num_inference_steps: must be at least 1, got 0"),
        ({"height": 33}, r"warm_up\[0\].height: must be a positive multiple of \d+, got 33"),
        ({"size": "big"}, r"warm_up\[0\].size: must be like 1024x1024, got 'big'"),
        ({**SMALL, "max_sequence_length": 513}, r"warm_up\[0\]: .*max_sequence_length"),
    ],
)
def test_what_the_model_would_refuse_stops_the_start_by_name(
    given: dict[str, Any], sentence: str, make_replica: MakeReplica, flux_checkpoint: Path, told: list[tuple[str, ...]]
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        make_replica(flux_checkpoint, stages=("encoder",), arguments={"warm_up": [given]})


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of nodes of what a played compiler was given."""
    given: list[int] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        given.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(compile_row, "BACKEND", compiler)
    yield given
    torch.compiler.reset()


def test_a_denoiser_that_warms_up_compiles_for_lone_requests_and_batches(
    make_replica: MakeReplica,
    flux_checkpoint: Path,
    graphs: list[int],
    told: list[tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FluxTransformer2DModel, "_repeated_blocks", ["AdaLayerNormZeroSingle"])  # small graphs
    whole = make_replica(flux_checkpoint, arguments={"warm_up": [SMALL], "compile": "regional"})
    assert cache_dir() == str(whole.replica.env.runtime.cache_root / "torchinductor")
    warm, compiled_s = len(graphs), whole.denoiser.compiled.compilation_s
    assert warm >= 2
    assert compiled_s > 0
    for index in range(2):
        whole.generate(2, f"r{index}")
    assert len(graphs) == warm
    assert whole.denoiser.compiled.compilation_s == compiled_s


def test_a_checkpoint_of_compiled_forwards_is_of_no_use_without_them(
    make_replica: MakeReplica, flux_checkpoint: Path
) -> None:
    whole = make_replica(flux_checkpoint, stages=("denoiser",))
    denoiser, request = whole.denoiser, GenerationRequest("r", "flux", {}, 0, OutputFormat("image", "png"))
    plain, fixed = (denoiser.fingerprint_for(replace(request, deterministic=each)) for each in (False, True))
    assert plain == fixed
    denoiser.stage.switches["transformer"] = compile_row.Switch("regional")
    assert denoiser.fingerprint_for(request) != plain
    assert denoiser.fingerprint_for(replace(request, deterministic=True)) == fixed  # its forwards are never compiled
