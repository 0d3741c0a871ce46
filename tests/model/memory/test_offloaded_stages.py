"""Stages whose weights are on the host make the bytes of stages that hold them, whatever shares the engine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.devices import select_device
from deployments.engine.fiber import CancelledStage
from deployments.messages import STAGES, Checkpoint, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs, ModelArgs
from deployments.modules import AccelerationError
from deployments.stages.build import build_stage
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoiseRun, DenoisingFollower
from deployments.stages.encode import encode
from env_config.variables import EnvConfig
from tests.support.further import all_but
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches

CPU = select_device("cpu")
ALL = ("text_encoder", "text_encoder_2", "transformer", "vae")


class OneProcess:
    """All stages of a tiny model, with its components offloaded so."""

    def __init__(self, name: str, root: Path, offload: dict[str, Any]) -> None:
        tiny_patches()
        self.name = name
        model = ModelArgs.model_validate({"path": str(checkpoint(name, root)), "name": name, "offload": offload})
        self.stage = build_stage(model, STAGES, EnvConfig(), CPU)
        args = DenoisingArgs(max_wait_s=1.0, checkpoint_every=1, merging="always")
        self.denoiser = DenoiserStage(self.stage, args, encode=lambda request: encode(self.stage, request))

    def request(self, seed: int = 0, deterministic: bool = True) -> GenerationRequest:
        arguments = request_arguments(self.name) | {"num_inference_steps": 4}
        output = OutputFormat("image", "png") if self.name == "flux" else OutputFormat("video", "mp4")
        return GenerationRequest(f"r{seed}", self.name, arguments, seed, output, deterministic)

    def make(
        self, request: GenerationRequest, resume_from: Checkpoint | None = None, **told: Any
    ) -> list[torch.Tensor]:
        follower = DenoisingFollower(**told)
        inputs, _ = self.denoiser.denoise(request, encode(self.stage, request), resume_from, follower=follower)
        leaves = torch.utils._pytree.tree_leaves(dict(decode_output(self.stage, request, inputs)))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    @property
    def moves(self) -> list[str]:
        """The components that came as a whole, in their order."""
        waiting: Any = self.stage.memory._waiting
        moves: list[str] = waiting.moves
        return moves

    def close(self) -> None:
        self.denoiser.engine.close()


@pytest.fixture(scope="module")
def whole(checkpoints_root: Path) -> Iterator[OneProcess]:
    made = OneProcess("flux", checkpoints_root, {})
    yield made
    made.close()


def same(made: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    return len(made) == len(truth) > 0 and all(torch.equal(a, b) for a, b in zip(made, truth, strict=True))


KINDS: dict[str, dict[str, Any]] = {
    "group": dict.fromkeys(ALL, "group"),
    "leaf": {name: {"kind": "group", "level": "leaf"} for name in ALL},
    "model": dict.fromkeys(ALL, "model"),
    "mixed": {"text_encoder_2": "model", "transformer": {"kind": "group", "blocks_per_group": 2}},
}


@pytest.mark.parametrize("kind", all_but(["group", "model"], KINDS))
def test_offloaded_stages_make_the_same_bytes_merged_resumed_and_after_a_cancelled_one(
    kind: str, whole: OneProcess, checkpoints_root: Path
) -> None:
    offloaded = OneProcess("flux", checkpoints_root, KINDS[kind])
    truth = whole.make(whole.request())
    checkpoints: list[Checkpoint] = []
    assert same(offloaded.make(offloaded.request(), checkpoint=checkpoints.append), truth)

    with pytest.raises(CancelledStage):
        offloaded.make(offloaded.request(1), started=cancel_soon(offloaded))
    assert same(offloaded.make(offloaded.request(), checkpoints[1]), truth)

    together = [offloaded.request(seed, deterministic=False) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(offloaded.make, together))  # the first merges are held against lone forwards
        made = list(threads.map(offloaded.make, together))
    assert offloaded.denoiser.engine.statistics.merged > 0
    for request, pictures in zip(together, made, strict=True):
        expected = whole.make(whole.request(request.seed))
        torch.testing.assert_close(pictures[0], expected[0], rtol=1e-4, atol=1e-4)
    offloaded.close()


def cancel_soon(process: OneProcess) -> Any:
    def started(run: DenoiseRun) -> None:
        process.denoiser.engine.cancel(run.fiber)

    return started


def test_components_come_by_turns_and_none_stays_when_there_is_nothing_to_do(checkpoints_root: Path) -> None:
    """One process with all stages: encoders, denoiser and autoencoder one after another, and not again at each step."""
    process = OneProcess("flux", checkpoints_root, dict.fromkeys(ALL, "model"))
    process.denoiser.encode = None  # no look at the batch axes
    process.make(process.request())
    assert [name for name in process.moves if name != "vae"] == ["text_encoder", "text_encoder_2", "transformer"]
    waiting: Any = process.stage.memory._waiting
    assert waiting.present is None
    with waiting.visit("vae"):
        pass
    process.denoiser.engine.executor.free_memory()  # as for a batch that did not fit
    assert waiting.present is None
    process.close()


def test_the_experts_of_wan22_change_places_once_a_request(checkpoints_root: Path) -> None:
    experts = {"transformer": "model", "transformer_2": "model"}
    plain, process = (OneProcess("wan22", checkpoints_root, offload) for offload in ({}, experts))
    process.denoiser.encode = None
    truth = [plain.make(plain.request(seed)) for seed in (0, 1)]
    assert same(process.make(process.request(0)), truth[0])
    assert process.moves == ["transformer", "transformer_2"]
    with ThreadPoolExecutor(2) as threads:  # one is further than the other: they take turns
        made = list(threads.map(process.make, [process.request(0), process.request(1)]))
    assert same(made[0], truth[0])
    assert same(made[1], truth[1])
    plain.close()
    process.close()


def test_a_component_that_the_model_lacks_is_refused_by_name(checkpoints_root: Path) -> None:
    with pytest.raises(AccelerationError, match="offload names transformer_2; the models are"):
        OneProcess("flux", checkpoints_root, {"transformer_2": "model"})


def test_a_whole_forward_whose_weights_come_and_go_in_it_is_not_compiled(checkpoints_root: Path) -> None:
    given = {"compile": "whole", "offload": {"transformer": "model"}}
    model = ModelArgs.model_validate({"path": str(checkpoint("flux", checkpoints_root)), "name": "flux", **given})
    with pytest.raises(AccelerationError, match=r"compile: transformer: whole .* regional is allowed"):
        build_stage(model, ("denoiser",), EnvConfig(), CPU)
