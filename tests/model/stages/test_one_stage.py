"""One process with all the stages makes what three make, whatever class of output its pipeline has."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.errors import DeviceFullError, ReplicaUnfitError
from deployments.messages import STAGES, DecodeInputs, Envelope, GenerationRequest, OutputFormat
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.loading import load_stage
from deployments.stage_pipeline.outputs import media_kind
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode
from tests.support.further import further
from tests.support.tiny_models import checkpoint, request_arguments, run_unsplit, tiny_patches
from tests.support.toy_pipelines import Toy, ToyStages, same

pytestmark = pytest.mark.filterwarnings("default")


# Outputs with fields that are None and asked for, with all of their fields, and of videos.
@pytest.mark.parametrize("name", ["sd15", "kandinsky22", further("flux"), further("wan21"), further("ltx2")])
def test_one_process_makes_the_numbers_of_the_unsplit_pipeline(name: str, checkpoints_root: Path) -> None:
    tiny_patches()
    folder, arguments = checkpoint(name, checkpoints_root), request_arguments(name)
    stage = load_stage(folder)
    kind = media_kind(type(stage.pipeline))
    request = GenerationRequest("r", name, arguments, 0, OutputFormat(kind, "png" if kind == "image" else "mp4"), True)
    denoiser = DenoiserStage(stage)
    inputs, _ = denoiser.denoise(request, encode(stage, request))
    denoiser.engine.close()
    made = numbers(torch.utils._pytree.tree_leaves(dict(decode_output(stage, request, inputs))))
    truth = numbers(run_unsplit(folder, arguments, 0))
    assert len(made) == len(truth) > 0
    assert all(torch.equal(a, b) for a, b in zip(made, truth, strict=True))


def numbers(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class InOneProcess:
    """All stages of a tiny model in one process."""

    def __init__(self, name: str, checkpoints_root: Path) -> None:
        tiny_patches()
        self.name = name
        self.stage = load_stage(checkpoint(name, checkpoints_root))
        self.denoiser = DenoiserStage(self.stage, DenoisingArgs(max_wait_s=0.0))

    def request(self, name: str = "r") -> GenerationRequest:
        return GenerationRequest(name, self.name, request_arguments(self.name), 0, OutputFormat("image", "png"))

    def denoise(self, request: GenerationRequest) -> DecodeInputs:
        return self.denoiser.denoise(request, encode(self.stage, request))[0]


@pytest.fixture
def flux(checkpoints_root: Path) -> Iterator[InOneProcess]:
    made = InOneProcess("flux", checkpoints_root)
    yield made
    made.denoiser.engine.close()


def test_the_decoder_runs_in_the_thread_that_decodes_and_is_handed_the_latents_as_they_are(
    flux: InOneProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, given = [], []

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread().name)
        given.append(latents)
        return real(latents, *args, **kwargs)

    real = flux.stage.pipeline.vae.decode
    monkeypatch.setattr(flux.stage.pipeline.vae, "decode", decode)
    request = flux.request()
    inputs = flux.denoise(request)
    assert threads == []
    assert inputs.kind == "decoder_calls"
    [kept] = flux.stage.handed_over.values()
    decode_output(flux.stage, request, inputs)
    assert threads == [threading.current_thread().name]
    assert given[0] is kept.decoder_calls[0].args[0], "no copy of it was made"
    assert not flux.stage.handed_over
    first = given[0].clone()
    decode_output(flux.stage, request, inputs)
    assert torch.equal(given[1], first), "a second time, and elsewhere, the message is read"


def test_other_requests_go_on_while_a_picture_is_decoded(flux: InOneProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    real, is_decoding, may_go_on = flux.stage.pipeline.vae.decode, threading.Event(), threading.Event()
    request = flux.request()
    decode_output(flux.stage, request, flux.denoise(request))  # shows that it draws no random numbers
    truth = flux.denoise(request)
    conditioning = encode(flux.stage, request)

    def decode(*args: Any, **kwargs: Any) -> Any:
        is_decoding.set()
        assert may_go_on.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(flux.stage.pipeline.vae, "decode", decode)
    with ThreadPoolExecutor(1) as thread:
        decoding = thread.submit(decode_output, flux.stage, request, truth)
        assert is_decoding.wait(60)
        other, _ = flux.denoiser.denoise(flux.request("other"), conditioning)
        assert not decoding.done()
        may_go_on.set()
        decoding.result()
    assert [each.tobytes() for each in other.content.buffers] == [each.tobytes() for each in truth.content.buffers]


def test_hand_offs_that_nobody_decodes_do_not_pile_up(flux: InOneProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.stage_pipeline.hand_off.MOST_KEPT", 2)
    made = [flux.denoise(flux.request()) for _ in range(3)]
    assert list(flux.stage.handed_over) == [inputs.token for inputs in made[1:]]


class DecodesInItsLoop(Toy):
    """What it decodes feeds back into the latents."""

    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        latents = super().denoised(latents, words)
        self.scheduler.set_timesteps(2)
        return super().denoised(latents + self.vae.decode(latents), words)


class DifferentiatesInItsLoop(Toy):
    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        latents = super().denoised(latents, words)
        self.scheduler.set_timesteps(2)
        with torch.enable_grad():
            seen = self.vae.decode(latents.detach().requires_grad_())
        return super().denoised(latents + seen.detach(), words)


@pytest.mark.parametrize(("pipeline_class", "told"), [(DecodesInItsLoop, []), (DifferentiatesInItsLoop, ["INFO"])])
def test_a_decoder_that_the_loop_needs_is_called_at_once(
    pipeline_class: type[Toy], told: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "deployments")
    stages = ToyStages(pipeline_class, tmp_path, processes=(STAGES,))
    made = stages.make()
    assert [each.levelname for each in caplog.records if "needs remote calls" in each.message] == told
    assert same(made.output, stages.truth())
    assert made.is_remote
    stages.close()


class UpcastsTheVae(Toy):
    """As Stable Diffusion XL: what the decoder is handed hangs on the dtype in which the pipeline finds it."""

    def decoded(self, latents: torch.Tensor) -> Any:
        if self.vae.dtype == torch.float32:
            self.vae.to(dtype=torch.float64)
            latents = latents.to(next(iter(self.vae.parameters())).dtype)
        return super().decoded(latents)


def test_nobody_finds_a_decoder_as_another_request_has_cast_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = ToyStages(UpcastsTheVae, tmp_path, processes=(STAGES,))
    stages.make()  # shows that the decoder draws no random numbers
    stage, denoiser = stages.stages["vae"], stages.denoiser
    request = GenerationRequest("r", "toy", {}, 0, OutputFormat("image", "png"))
    conditioning = encode(stage, request)
    truth, _ = denoiser.denoise(request, conditioning)
    real, is_decoding, may_go_on = stage.pipeline.vae.decode, threading.Event(), threading.Event()

    def decode(latents: torch.Tensor) -> torch.Tensor:
        is_decoding.set()
        may_go_on.wait(0.3)  # nobody sets it while pipelines' code waits for this one
        return real(latents)

    monkeypatch.setattr(stage.pipeline.vae, "decode", decode)
    with ThreadPoolExecutor(1) as thread:
        decoding = thread.submit(decode_output, stage, request, truth)
        assert is_decoding.wait(60)
        other, _ = denoiser.denoise(request, conditioning)
        may_go_on.set()
        decoding.result()
    assert [each.tobytes() for each in other.content.buffers] == [each.tobytes() for each in truth.content.buffers]
    stages.close()


@pytest.mark.parametrize("error", [ReplicaUnfitError("the device failed"), torch.OutOfMemoryError("full")], ids=repr)
def test_a_round_that_fails_after_a_decoding_was_noted_fails_the_request(error: Exception, tmp_path: Path) -> None:
    class FailsLater(Toy):
        def decoded(self, latents: torch.Tensor) -> Any:
            self.vae.decode(latents)
            raise error

    stages = ToyStages(FailsLater, tmp_path)
    with pytest.raises((ReplicaUnfitError, DeviceFullError)):
        stages.make(envelope=Envelope(complete_hand_off=True))
    stages.close()
