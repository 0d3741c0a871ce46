"""The check passes for pipelines that are split rightly, and finds and names a fault planted in each part."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FluxPipeline

from deployments.denoising.checkpoint import unpack
from deployments.devices import select_device
from deployments.engine.batching.batches import Batches
from deployments.engine.batching.trial import Trial
from deployments.engine.executor import LocalExecutor
from deployments.errors import HandOffError
from deployments.model import DenoisingArgs, ModelArgs
from deployments.replicas.table import processes_of
from deployments.stage_pipeline.sessions.encode import EncoderCall, EncodeSession
from deployments.stages.decode import decode_output
from deployments.tensors.values import map_values
from deployments.verify.asked import Asked
from deployments.verify.check import check, verify
from deployments.verify.verdict import Outcome, Report
from deployments.verify.whole import Whole, load_whole
from env_config.variables import EnvConfig
from serve_app.app import PLACEMENTS
from tests.support.further import further
from tests.support.tiny_models import checkpoint, tiny_patches

CPU = select_device("cpu")
ENV = EnvConfig.from_environ({"SGLANG_USE_RUNAI_MODEL_STREAMER": "false"})
SMALL = Asked(width=32, height=32, steps=2, arguments={"max_sequence_length": 32})
PARTS = ("unsplit", "encoder", "denoiser", "vae", "engine", "merged", "resumed", "left")


def args_of(folder: Path, **fields: Any) -> ModelArgs:
    return ModelArgs(path=str(folder), name=folder.name, **fields)


def verified(folder: Path, placement: str = "three_stage", asked: Asked | None = None, **fields: Any) -> Report:
    tiny_patches()
    return verify(args_of(folder, **fields), processes_of(PLACEMENTS[placement]), asked or Asked(), ENV, CPU)


def outcomes(report: Report) -> dict[str, Outcome]:
    assert not report.problem, report.problem
    return {verdict.part: verdict.outcome for verdict in report.verdicts}


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("flux", "two_stage"),
        further("sd15_inpaint", "three_stage"),  # needs a picture and a mask
        further("wan21", "one_stage"),  # a video
    ],
)
def test_a_pipeline_that_is_split_rightly_passes(name: str, placement: str, checkpoints_root: Path) -> None:
    report = verified(checkpoint(name, checkpoints_root), placement, Asked(width=32, height=32))
    assert report.passed, report.lines()
    assert tuple(outcomes(report)) == PARTS
    exact = {part: outcome for part, outcome in outcomes(report).items() if part != "merged"}
    assert set(exact.values()) == {"same bits"}, report.lines()


@pytest.fixture(scope="module")
def flux(checkpoints_root: Path) -> Whole:
    tiny_patches()
    folder = checkpoint("flux", checkpoints_root)
    return load_whole(args_of(folder), processes_of(PLACEMENTS["three_stage"]), ENV, CPU)


def checked(whole: Whole, **denoising: Any) -> Report:
    model = ModelArgs(path="flux", name="flux", denoising=DenoisingArgs(**denoising))
    return check(whole, model, SMALL, ENV, CPU)


def test_the_stages_share_the_weights_of_the_whole_and_lack_what_is_elsewhere(flux: Whole) -> None:
    encoder, denoiser, vae = (flux.stages[name].pipeline for name in ("encoder", "denoiser", "vae"))
    whole = flux.unsplit.pipeline
    assert denoiser.transformer is whole.transformer
    assert encoder.text_encoder is whole.text_encoder
    assert denoiser.text_encoder.dtype == whole.text_encoder.dtype
    assert all(parameter.is_meta for parameter in denoiser.text_encoder.parameters())
    assert all(parameter.is_meta for parameter in encoder.vae.decoder.parameters())
    assert all(parameter.is_meta for parameter in vae.vae.encoder.parameters())
    assert vae.vae.decoder is whole.vae.decoder
    assert not any(parameter.is_meta for parameter in whole.vae.parameters())
    assert denoiser.scheduler is not whole.scheduler


def off(value: Any) -> Any:
    """A little larger, if it is a tensor of floating numbers."""
    is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value * 1.01 + 1e-3 if is_floating else value


def answering_wrongly(module: Any, method: str, change: Callable[[Any], Any] = off) -> Any:
    """The module over the same weights, one of whose methods returns something else."""
    wrong, function = copy.copy(module), getattr(module, method)
    wrong.__dict__[method] = lambda *args, **kwargs: map_values(change, function(*args, **kwargs))
    return wrong


@pytest.mark.parametrize(
    ("stage", "component", "method", "place"),
    [
        further("encoder", "text_encoder_2", "forward", "pipeline.encode_prompt[0]"),
        ("denoiser", "transformer", "forward", "vae.decode was given[0][0]"),
        further("vae", "vae", "decode", "output.images"),
    ],
)
def test_a_component_that_answers_wrongly_in_a_stage_is_found_there(
    stage: str, component: str, method: str, place: str, flux: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = flux.stages[stage].pipeline  # type: ignore[index]
    monkeypatch.setitem(vars(pipeline), component, answering_wrongly(getattr(pipeline, component), method))
    report = checked(flux)
    assert not report.passed
    [verdict] = report.mismatches
    assert (verdict.part, verdict.outcome) == (stage, "differs")
    assert verdict.differences[0].place == place
    assert "elements differ by at most" in report.conclusion
    behind = PARTS[PARTS.index(stage) + 1 : PARTS.index("engine")]
    assert [outcomes(report)[part] for part in behind] == ["not judged"] * len(behind)
    assert outcomes(report)["left"] == "same bits"


class Changing(FluxPipeline):
    """Changes in place what its encoder returned, as some pipelines do with lists of features."""

    def __call__(self, prompt: Any = None, **kwargs: Any) -> Any:
        embeds, pooled, _ = self.encode_prompt(prompt, None, max_sequence_length=32)
        embeds.add_(1)
        return super().__call__(prompt_embeds=embeds, pooled_prompt_embeds=pooled, **kwargs)


class ByReference(EncodeSession):
    """Records what it was given and no copy."""

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        if self._inside:
            return function(*args, **kwargs)
        output = self.call_inside(component, function, args, kwargs)
        self.calls.append(EncoderCall(component, method, output, None))
        return output


@pytest.mark.rest
def test_a_record_that_the_pipeline_changes_afterwards_is_found(
    checkpoints_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Changing.__module__ = FluxPipeline.__module__
    Changing.__call__.__signature__ = inspect.signature(FluxPipeline.__call__)  # type: ignore[attr-defined]
    monkeypatch.setattr(diffusers, "FluxPipeline", Changing)
    monkeypatch.setattr("deployments.stages.encode.EncodeSession", ByReference)
    report = verified(checkpoint("flux", checkpoints_root))
    assert report.mismatches[0].part == "encoder"
    assert report.mismatches[0].differences[0].place.startswith("pipeline.encode_prompt")


def test_what_no_hand_off_serves_is_made_with_remote_calls_as_in_the_application(
    flux: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []

    def decode(*args: Any) -> Any:
        decoded.append(args)
        if len(decoded) == 1:
            raise HandOffError("its code fails on numbers that were not handed over")
        return decode_output(*args)

    monkeypatch.setattr("deployments.verify.split.decode_output", decode)
    report = checked(flux)
    assert report.passed, report.lines()
    assert [inputs.kind for *_, inputs in decoded] == ["decoder_calls", "result"]


def test_an_engine_that_changes_a_lone_forward_is_found(flux: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    run = LocalExecutor.run
    monkeypatch.setattr(LocalExecutor, "run", lambda *args: map_values(off, run(*args)))
    report = checked(flux)
    assert [verdict.part for verdict in report.mismatches] == ["engine", "resumed"]


def test_a_merge_that_mixes_the_requests_up_is_found(flux: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = Batches.call_merged
    monkeypatch.setattr(Trial, "_is_right", lambda *args: True)
    monkeypatch.setattr(Batches, "call_merged", lambda *args: merged(*args)[::-1])
    report = checked(flux)
    assert [verdict.part for verdict in report.mismatches] == ["merged"]
    assert "bound 1e-03" in report.conclusion


@pytest.mark.rest
def test_a_resume_from_other_numbers_is_found(flux: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    def unpacked(*args: Any) -> Any:
        saved = unpack(*args)
        return saved | {"outputs": map_values(off, saved["outputs"])}

    monkeypatch.setattr("deployments.denoising.checkpoint.unpack", unpacked)
    report = checked(flux)
    assert [verdict.part for verdict in report.mismatches] == ["resumed"]
    assert "from step 1 of 2" in report.conclusion


@pytest.mark.rest
def test_a_stage_that_changes_shared_weights_is_found(flux: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = flux.unsplit.pipeline.vae.decoder.conv_out.weight
    before = weight.detach().clone()

    def changing(value: Any) -> Any:
        weight.data.mul_(1.5)
        return value

    pipeline = flux.stages["vae"].pipeline
    monkeypatch.setitem(vars(pipeline), "vae", answering_wrongly(pipeline.vae, "decode", changing))
    report = checked(flux)
    weight.data.copy_(before)
    assert [verdict.part for verdict in report.mismatches] == ["left"]


@pytest.mark.rest
def test_what_two_unsplit_calls_deviate_is_measured_and_taken_for_the_same(
    flux: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    dice = torch.Generator().manual_seed(0)

    def shaken(value: Any) -> Any:
        return value + 1e-6 * torch.rand(value.shape, generator=dice) if isinstance(value, torch.Tensor) else value

    for pipeline in (flux.unsplit.pipeline, flux.stages["vae"].pipeline):
        monkeypatch.setitem(vars(pipeline), "vae", answering_wrongly(pipeline.vae, "decode", shaken))
    report = checked(flux)
    assert report.passed, report.lines()
    assert {part for part, outcome in outcomes(report).items() if outcome == "within bounds"} >= {
        "unsplit",
        "vae",
        "left",
    }
    assert "two calls differ" in str(report.verdicts[0])


@pytest.mark.rest
def test_settings_that_never_merge_are_told(flux: Whole) -> None:
    told = {str(checked(flux, **setting).verdicts[5]) for setting in ({"deterministic": True}, {"max_batch_size": 1})}
    assert told == {
        "not merged: `denoising` says deterministic: true",
        "not merged: `denoising` says max_batch_size: 1",
    }


@pytest.mark.rest
def test_the_request_is_as_it_was_asked_for(checkpoints_root: Path, tmp_path: Path) -> None:
    asked = Asked(prompt="dance", width=32, height=16, steps=2, arguments={"guidance_scale": 2.0})
    report = verified(checkpoint("flux", checkpoints_root), asked=asked, default_arguments={"num_inference_steps": 28})
    told = {"prompt": "'dance'", "width": "32", "height": "16", "num_inference_steps": "2", "guidance_scale": "2.0"}
    assert report.request == told
    assert report.passed


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (Asked(arguments={"strength": 0.5}), "FluxPipeline does not take strength"),
        (Asked(arguments={"guidance_scale": "@missing.png"}), "missing.png cannot be read"),
        (Asked(arguments={"sigmas": "tree"}), "answers none of"),
    ],
)
def test_a_request_that_cannot_be_made_is_a_problem_and_no_verdict(asked: Asked, problem: str, flux: Whole) -> None:
    report = check(flux, ModelArgs(path="flux", name="flux"), asked, ENV, CPU)
    assert problem in report.problem
    assert (report.passed, report.verdicts) == (False, ())
