"""Recorded outputs that only feed later recorded calls travel without their numbers; all others with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.messages import GenerationRequest, OutputFormat
from deployments.stage_pipeline.loading import load_stage
from deployments.stage_pipeline.sessions.encode import EncoderCall, EncodeSession
from deployments.stage_pipeline.sessions.plays.unread import unread_outputs
from deployments.stages.encode import call_arguments, encode, pack_conditioning, unpack_conditioning
from deployments.tensors.values import MissingTensor, leaves
from tests.support.tiny_models import checkpoint, request_arguments, tiny_patches
from tests.support.toy_pipelines import WIDTH, Toy, ToyStages, same

pytestmark = pytest.mark.filterwarnings("default")


class FeedsALaterCall(Toy):
    """Two encoders in a row; `also_read` is what else becomes of the first one's output."""

    also_read = False

    def words(self) -> torch.Tensor:
        layers = self.text_encoder(torch.ones(1, WIDTH))
        words: torch.Tensor = self.text_encoder.tower(torch.cat(layers).mean(0, keepdim=True))
        return words + layers[0] if self.also_read else words


class ReadsItToo(FeedsALaterCall):
    also_read = True


class DecidesByIt(FeedsALaterCall):
    """A decision leaves no NaN behind."""

    def words(self) -> torch.Tensor:
        layers = self.text_encoder(torch.ones(1, WIDTH))
        words: torch.Tensor = self.text_encoder.tower(torch.cat(layers).mean(0, keepdim=True))
        return words if bool(layers[0].abs().max() < 100) else words * 2


class ReadsItAfterTheLoop(FeedsALaterCall):
    def __call__(self, num_inference_steps: int = 4, generator: Any = None, output_type: str = "pt") -> Any:
        layers = self.text_encoder(torch.ones(1, WIDTH))
        words = self.text_encoder.tower(layers[-1])
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, WIDTH, generator=generator)
        return self.decoded(self.denoised(latents, words) + layers[0])


TOYS: dict[type[Toy], frozenset[int]] = {
    Toy: frozenset(),
    FeedsALaterCall: frozenset({0}),
    ReadsItToo: frozenset(),
    DecidesByIt: frozenset(),
    ReadsItAfterTheLoop: frozenset(),
}


@pytest.mark.parametrize("pipeline_class", TOYS, ids=lambda each: each.__name__)
def test_what_nobody_reads_is_left_out_and_the_picture_stays(pipeline_class: type[Toy], tmp_path: Path) -> None:
    stages = ToyStages(pipeline_class, tmp_path)
    encoder = stages.stages["encoder"]
    calls = EncodeSession(encoder, {}, 0).run()
    assert unread_outputs(encoder, {}, calls) == TOYS[pipeline_class]
    assert same(stages.make().output, stages.truth())
    stages.close()


@pytest.fixture(scope="module")
def ltx2(checkpoints_root: Path) -> Any:
    tiny_patches()
    return load_stage(checkpoint("ltx2", checkpoints_root), ("encoder",))


def test_the_layers_of_a_language_model_stay_where_the_connector_behind_them_was_called(ltx2: Any) -> None:
    arguments = request_arguments("ltx2")
    request = GenerationRequest("r", "ltx2", arguments, 0, OutputFormat("video", "mp4"))
    whole = pack_conditioning(EncodeSession(ltx2, call_arguments(ltx2, request), 0).run(), ltx2.device)
    sent = encode(ltx2, request)
    prompt, connected = unpack_conditioning(sent, ltx2)[:2]
    assert missing(prompt)
    assert not missing(connected)
    assert sent.calls.num_bytes < 0.6 * whole.calls.num_bytes


def missing(call: EncoderCall) -> bool:
    return any(isinstance(leaf, MissingTensor) for leaf in leaves(call.output))


def test_a_kind_of_request_is_played_once_for_each_of_its_settings(ltx2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plays: list[Any] = []
    play: Callable[..., bool] = unread_outputs.__globals__["_is_unread"]
    monkeypatch.setitem(unread_outputs.__globals__, "_is_unread", lambda *args: plays.append(args[3]) or play(*args))
    ltx2.unread_outputs.clear()
    for prompt, steps in (("a cat", 2), ("a dog", 2), ("a dog", 3)):
        arguments = request_arguments("ltx2") | {"prompt": prompt, "num_inference_steps": steps}
        encode(ltx2, GenerationRequest("r", "ltx2", arguments, 0, OutputFormat("video", "mp4")))
    assert len(plays) == 2
