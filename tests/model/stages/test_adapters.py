"""The text-encoder parts of a request's LoRAs: at work in its own encoder calls, and in nobody else's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.adapters.use import FEATURE, AdapterUse
from deployments.devices import select_device
from deployments.errors import AdapterReplacedError, CheckpointError, InvalidRequestError
from deployments.messages import STAGES, ComponentCall, Conditioning, GenerationRequest, OutputFormat
from deployments.model import ModelArgs
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from deployments.stage_pipeline.sessions.denoise import call_directly
from deployments.stages.adapters import answer_with_adapters, described, preload
from deployments.stages.build import build_stage
from deployments.stages.denoise import DenoiserStage
from deployments.stages.encode import encode, unpack_conditioning
from deployments.tensors.global_generators import global_states
from deployments.tensors.packing import pack, unpack
from deployments.tensors.values import tensors
from env_config.variables import EnvConfig
from tests.support.adapter_files import lora_tensors, written
from tests.support.tiny_models import checkpoint
from tests.support.tiny_models.checkpoints import request_arguments

CPU = select_device("cpu")
CLIP = ("q_proj", "k_proj", "fc1")


@pytest.fixture(scope="module")
def folder(checkpoints_root: Path) -> Path:
    return checkpoint("sdxl", checkpoints_root)


@pytest.fixture
def stage(folder: Path, tmp_path: Path) -> StagePipeline:
    return built(folder, tmp_path)


def built(folder: Path, cache_root: Path, stages: Any = ("encoder",), **args: Any) -> StagePipeline:
    env = EnvConfig.model_validate({"runtime": {"cache_root": cache_root}})
    return build_stage(ModelArgs(path=str(folder), name="m", **args), stages, env, CPU)


def style(stage: StagePipeline, folder: Path, seed: int = 0, **more: Any) -> AdapterUse:
    layers: dict[str, torch.Tensor] = {}
    for index, name in enumerate(("text_encoder", "text_encoder_2")):
        layers |= lora_tensors(stage.components[name], name, CLIP, seed=seed + index)
    return written(folder, f"style{seed}", layers, **more)


def asked(*uses: AdapterUse) -> GenerationRequest:
    features = {FEATURE: [use.plain() for use in uses]} if uses else {}
    return GenerationRequest("r", "m", request_arguments("sdxl"), 0, OutputFormat("image", "png"), features=features)


def encoded(stage: StagePipeline, *uses: AdapterUse) -> list[torch.Tensor]:
    calls = unpack_conditioning(encode(stage, asked(*uses)), stage)
    return list(tensors([call.output for call in calls]))


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def differs(found: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(found, other, strict=True))


def test_encoders_return_what_those_of_diffusers_do_at_the_scale_of_each(
    stage: StagePipeline, folder: Path, tmp_path: Path
) -> None:
    plain = encoded(stage)
    scale = {"text_encoder": 0.5, "text_encoder_2": 2.0}
    use = style(stage, tmp_path, scale=scale)
    reference = load_stage(folder, STAGES)
    reference.pipeline.load_lora_weights(use.path, adapter_name="style")
    reference.pipeline.set_adapters("style", scale)
    found = encoded(stage, use)
    assert_equal(found, encoded(replace(reference, stages=("encoder",))))
    assert differs(found, plain)
    assert_equal(encoded(stage), plain)  # the next request has none of it
    assert_equal(encoded(stage, replace(use, scale=0.0)), plain)


def test_two_adapters_of_one_request_add_up_and_requests_do_not_mix(stage: StagePipeline, tmp_path: Path) -> None:
    first, second = style(stage, tmp_path), style(stage, tmp_path, seed=7)
    alone = [encoded(stage, first), encoded(stage, second)]
    both = encoded(stage, first, second)
    assert differs(both, alone[0])
    assert differs(both, alone[1])
    assert_equal(encoded(stage, first), alone[0])
    assert_equal(encoded(stage, first, second), both)


def test_a_call_of_another_stage_brings_the_adapters_of_its_request(stage: StagePipeline, tmp_path: Path) -> None:
    ids = torch.tensor([[1, 2, 3]])
    arguments = pack(((ids,), {"return_dict": False}, global_states(stage.device), {}))
    call = ComponentCall("text_encoder", "forward", arguments)

    def answered(call: ComponentCall) -> list[torch.Tensor]:
        return list(tensors(unpack(answer_with_adapters(stage, call).outcome, stage.device)[0]))

    plain = answered(call)
    use = style(stage, tmp_path)
    assert differs(answered(replace(call, adapters=(use.plain(),))), plain)
    assert_equal(answered(call), plain)


def test_an_adapter_of_the_configuration_may_be_there_before_the_first_request(
    stage: StagePipeline, folder: Path, tmp_path: Path
) -> None:
    use = style(stage, tmp_path)
    args = {"style": {"path": use.path, "preload": True}, "later": {"path": str(tmp_path / "not there.safetensors")}}
    loaded = built(folder, tmp_path, adapters=args)
    model = ModelArgs(path=str(folder), name="m", adapters=args)
    assert preload(loaded, model) == ["adapters: style is in text_encoder and text_encoder_2"]
    assert described(loaded, use)["digest"] in loaded.adapters.held()
    assert_equal(encoded(loaded, use), encoded(stage, use))


def test_one_that_cannot_be_loaded_at_the_start_is_named(folder: Path, tmp_path: Path) -> None:
    args = {"style": {"path": str(tmp_path / "nowhere" / "x.safetensors"), "preload": True}}
    with pytest.raises(CheckpointError, match=r"adapters\.style: the adapter 'style' cannot be used"):
        preload(built(folder, tmp_path, adapters=args), ModelArgs(path=str(folder), name="m", adapters=args))


def test_adapters_for_a_model_that_takes_none_stop_the_start(checkpoints_root: Path, tmp_path: Path) -> None:
    svd = checkpoint("svd", checkpoints_root)
    with pytest.raises(CheckpointError, match="adapters: StableVideoDiffusionPipeline takes no LoRA"):
        built(svd, tmp_path, ("denoiser",), adapters={"style": "artist/style"})
    with pytest.raises(InvalidRequestError, match="takes no LoRA"):
        described(built(svd, tmp_path, ("denoiser",)), AdapterUse("style", "artist/style"))


@pytest.mark.parametrize(
    ("given", "named"),
    [({"scale": {"text_encodr": 0}}, r"scale\.text_encodr: 'text_encodr'"), ({"component": "vae"}, "component: 'vae'")],
)
def test_a_component_that_can_have_none_stops_the_start(
    given: dict[str, Any], named: str, folder: Path, tmp_path: Path
) -> None:
    """Else it would be of no effect."""
    with pytest.raises(CheckpointError, match=rf"adapters\.style\.{named} can have no LoRA, but unet and text_encoder"):
        built(folder, tmp_path, adapters={"style": {"path": "artist/style", **given}})


def test_all_encoders_of_a_request_use_one_content(stage: StagePipeline, tmp_path: Path) -> None:
    use = style(stage, tmp_path)
    around: list[list[str]] = []
    adapters_of = stage.adapters.holding

    def replaced_meanwhile(uses: Any, components: Any) -> Any:
        around.append([each.digest for each in uses])
        Path(use.path).write_bytes(b"another")
        return adapters_of(uses, components)

    stage.adapters.holding = replaced_meanwhile
    assert len(encoded(stage, use)) > 0
    assert len({str(each) for each in around}) == 1
    assert around[0][0]


def test_weights_that_are_kept_in_float8_take_none_and_the_sentence_names_the_precision(
    folder: Path, tmp_path: Path
) -> None:
    args = {"precision": {"unet": "layerwise"}}
    held = built(folder, tmp_path, ("denoiser",), **args)
    assert not held.adapters.takes_adapters
    use = written(tmp_path, "style", lora_tensors(held.components["unet"], "unet", ("to_q",)))
    with pytest.raises(InvalidRequestError, match="layerwise"):
        described(held, use)


def test_a_forward_that_finds_no_memory_is_made_when_the_idle_adapters_of_all_models_here_are_gone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = built(folder, tmp_path, STAGES)
    models = {name: stage.components[name] for name in ("unet", "text_encoder")}
    layers = lora_tensors(models["unet"], "unet", ("to_q",)) | lora_tensors(
        models["text_encoder"], "text_encoder", CLIP
    )
    with stage.adapters.holding([written(tmp_path, "style", layers)], models):
        pass
    room: list[int] = []

    def with_little_room(module: Any, *args: Any) -> Any:
        room.append(sum(bool(getattr(model, "peft_config", None)) for model in models.values()))
        if room[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return call_directly(module, *args)

    denoiser = DenoiserStage(stage)
    monkeypatch.setattr(denoiser.compiled, "_call", with_little_room)
    try:
        inputs, _ = denoiser.denoise(asked(), encode(stage, asked()))
        assert inputs.content.num_bytes > 0
        assert room[:2] == [2, 0]
        assert not any(room[1:])
    finally:
        denoiser.engine.close()


def test_a_decoding_that_finds_no_memory_has_the_idle_adapters_leave_the_denoiser_in_its_own_thread(
    folder: Path, tmp_path: Path
) -> None:
    stage = built(folder, tmp_path, STAGES)
    unet, denoiser = stage.components["unet"], DenoiserStage(stage)
    with stage.adapters.holding([written(tmp_path, "style", lora_tensors(unet, "unet", ("to_q",)))]):
        pass
    threads: list[bool] = []
    take_out = stage.adapters.evict_idle

    def evict_idle(components: Any) -> None:
        if "unet" in components:
            threads.append(denoiser.engine.is_here)
        take_out(components)

    stage.adapters.evict_idle = evict_idle

    def work() -> str:
        if getattr(unet, "peft_config", None):
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return "made"

    try:
        assert stage.memory.run(work) == "made"
        assert threads == [True]
    finally:
        denoiser.engine.close()


def test_the_denoiser_uses_the_contents_that_the_encoders_have_used_or_the_request_starts_again(
    folder: Path, tmp_path: Path
) -> None:
    """Where nobody has looked into the file before: it is replaced between the two."""
    encoder, denoising = built(folder, tmp_path), built(folder, tmp_path, ("denoiser",))
    unet, text = denoising.components["unet"], encoder.components["text_encoder"]

    contents = [
        lora_tensors(unet, "unet", ("to_q",), seed=seed) | lora_tensors(text, "text_encoder", CLIP, seed=seed)
        for seed in range(2)
    ]

    def use(number: int) -> AdapterUse:
        return written(tmp_path, "style", contents[number])

    request = asked(use(0))
    conditioning = encode(encoder, request)
    [digest] = conditioning.adapters.values()
    denoiser = DenoiserStage(denoising)

    def used(conditioning: Conditioning) -> str:
        denoiser.denoise(request, conditioning)
        found: str = denoiser.recent_summaries[FEATURE][-1]["style"]
        return found

    try:
        use(1)
        with pytest.raises(AdapterReplacedError, match="its file was replaced"):
            used(conditioning)
        again = encode(encoder, request)
        assert used(again) == again.adapters["style"] != digest
        use(0)
        assert used(again) == again.adapters["style"], "it is in memory still"
        assert used(conditioning) == digest
    finally:
        denoiser.engine.close()
