"""What the library puts into a model is what diffusers' `load_lora_weights` puts there, and it goes again."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.hooks import apply_group_offloading
from peft.tuners.tuners_utils import BaseTunerLayer

from deployments.adapters.args import AdapterCacheArgs
from deployments.adapters.fetch import AdapterFile, fetch_file
from deployments.adapters.inject import inject
from deployments.adapters.library import AdapterLibrary
from deployments.adapters.use import AdapterUse
from deployments.errors import StageUnavailableError
from deployments.messages import STAGES, StageName
from deployments.stage_pipeline.loading import StagePipeline, load_stage
from tests.support.adapter_files import (
    Tensors,
    adapter_state,
    assert_same_state,
    kohya_tensors,
    lora_tensors,
    written,
)
from tests.support.tiny_models import checkpoint
from tests.support.tiny_models.checkpoints import load_unsplit

ATTENTION = ("to_q", "to_k", "to_v")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")  # kohya's are known by the last
KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te1_text_model", "text_encoder_2": "lora_te2_text_model"}
COMPONENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {"transformer": (*ATTENTION, "proj_mlp"), "text_encoder": CLIP},
    "sdxl": {"unet": ATTENTION, "text_encoder": CLIP, "text_encoder_2": CLIP},
}


def library_of(stage: StagePipeline, cache_root: Path, **args: Any) -> AdapterLibrary:
    return AdapterLibrary(stage, AdapterCacheArgs(**args), cache_root)


def layers_in(model: torch.nn.Module) -> int:
    return sum(isinstance(module, BaseTunerLayer) for module in model.modules())


def file_for(pipeline: Any, ends: dict[str, tuple[str, ...]], seed: int = 0) -> Tensors:
    tensors: Tensors = {}
    for index, (name, each) in enumerate(ends.items()):
        tensors |= lora_tensors(getattr(pipeline, name), name, each, seed=seed + index)
    return tensors


def of_diffusers(pipeline: Any, name: str) -> Tensors:
    return file_for(pipeline, COMPONENTS[name])


def of_kohya(pipeline: Any, name: str) -> Tensors:
    return kohya_tensors(of_diffusers(pipeline, name), KOHYA, alpha=1.0)


def of_kohya_for_flux(pipeline: Any, name: str) -> Tensors:
    """By BFL's names, whose one projection is diffusers' three."""
    generator = torch.Generator().manual_seed(3)
    path = "lora_unet_double_blocks_1_img_attn_qkv"
    return {
        f"{path}.lora_down.weight": torch.randn(4, 32, generator=generator),
        f"{path}.lora_up.weight": torch.randn(96, 4, generator=generator),
        f"{path}.alpha": torch.tensor(2.0),
    }


def with_alphas(pipeline: Any, name: str) -> Tensors:
    tensors = of_diffusers(pipeline, name)
    layers = sorted({key.partition(".lora_")[0] for key in tensors if key.startswith("transformer.")})
    return tensors | {f"{layer}.alpha": torch.tensor(float(index + 1)) for index, layer in enumerate(layers)}


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("flux", of_diffusers),
        ("flux", of_kohya_for_flux),
        ("flux", with_alphas),
        ("sdxl", of_kohya),
    ],
)
def test_after_loading_each_layer_is_that_of_load_lora_weights(
    name: str, made: Callable[[Any, str], Tensors], checkpoints_root: Path, tmp_path: Path
) -> None:
    folder = checkpoint(name, checkpoints_root)
    unsplit = load_unsplit(folder)
    use = written(tmp_path, "style", made(unsplit, name))
    unsplit.load_lora_weights(use.path, adapter_name="expected")
    unsplit.set_adapters(["expected"])
    expected = {each: adapter_state(getattr(unsplit, each), "expected") for each in COMPONENTS[name]}
    stage = load_stage(folder, STAGES)
    library = library_of(stage, tmp_path)
    with library.holding([use], COMPONENTS[name]) as [held]:
        assert held.components == {each for each, state in expected.items() if state}
        for each in held.components:
            assert_same_state(adapter_state(stage.components[each], held.peft_name), expected[each])


def test_settings_in_the_files_header_scale_as_they_do_in_diffusers(flux_checkpoint: Path, tmp_path: Path) -> None:
    unsplit = load_unsplit(flux_checkpoint)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": list(ATTENTION), "use_rslora": True, "lora_dropout": 0.5}
    layers = lora_tensors(unsplit.transformer, "", ATTENTION)
    FluxPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=settings)
    use = AdapterUse("style", str(tmp_path))
    unsplit.load_lora_weights(use.path, adapter_name="expected")
    unsplit.set_adapters(["expected"])
    stage = load_stage(flux_checkpoint, ("denoiser",))
    library = library_of(stage, tmp_path)
    with library.holding([use]) as [held]:
        found = adapter_state(stage.components["transformer"], held.peft_name)
    assert_same_state(found, adapter_state(unsplit.transformer, "expected"))
    assert library.fetched(use).describe()["alphas"] == {"transformer": True}


@pytest.mark.parametrize("stages", [("encoder",), ("denoiser",)])
def test_a_process_puts_in_what_its_own_models_get_and_knows_the_rest(
    stages: tuple[StageName, ...], flux_checkpoint: Path, tmp_path: Path
) -> None:
    use = written(tmp_path, "style", of_diffusers(load_unsplit(flux_checkpoint), "flux"))
    stage = load_stage(flux_checkpoint, stages)
    library = library_of(stage, tmp_path)
    fetched = library.fetched(use)
    assert fetched.components == {"transformer", "text_encoder"}
    assert fetched.describe()["layers"] == {"transformer": 18, "text_encoder": 12}
    with library.holding([use], fetched.components) as [held]:
        assert held.components == {"transformer", "text_encoder"} & stage.components.keys()
        assert layers_in(stage.components[min(held.components)]) == fetched.parts[min(held.components)].num_layers


def test_the_two_experts_of_wan_get_what_is_meant_for_each(checkpoints_root: Path, tmp_path: Path) -> None:
    folder = checkpoint("wan22", checkpoints_root)
    unsplit = load_unsplit(folder)
    plain = lora_tensors(unsplit.transformer, "transformer", ATTENTION)
    low = lora_tensors(unsplit.transformer_2, "transformer_2", ATTENTION, seed=5)
    use = written(tmp_path, "plain", plain)
    unsplit.load_lora_weights(use.path, adapter_name="plain")
    unsplit.load_lora_weights(use.path, adapter_name="second", load_into_transformer_2=True)
    stage = load_stage(folder, ("denoiser",))
    library = library_of(stage, tmp_path)
    second = AdapterUse("second", use.path, component="transformer_2")
    both = written(tmp_path, "both", plain | low)
    with library.holding([use, second, both]) as [first, other, of_both]:
        assert first.components == {"transformer"}
        assert other.components == {"transformer_2"}
        assert of_both.components == {"transformer", "transformer_2"}
        models = stage.components
        assert_same_state(
            adapter_state(models["transformer"], first.peft_name), adapter_state(unsplit.transformer, "plain")
        )
        assert_same_state(
            adapter_state(models["transformer_2"], other.peft_name), adapter_state(unsplit.transformer_2, "second")
        )
        found = adapter_state(models["transformer_2"], of_both.peft_name)
        assert all(torch.equal(found[key.removeprefix("transformer_2.")], tensor) for key, tensor in low.items())


def test_twelve_adapters_share_the_room_of_three(flux_checkpoint: Path, tmp_path: Path) -> None:
    stage = load_stage(flux_checkpoint, ("denoiser",))
    transformer: Any = stage.components["transformer"]
    uses = [written(tmp_path, f"s{i}", lora_tensors(transformer, "transformer", ("to_q",), seed=i)) for i in range(12)]
    size = 4 * sum(tensor.numel() for tensor in lora_tensors(transformer, "transformer", ("to_q",)).values())
    library = library_of(stage, tmp_path, max_device_bytes=3 * size, max_host_bytes=6 * size)
    with library.holding(uses[:1]) as [pinned]:
        for use in uses:
            with library.holding([use]) as [held]:
                assert held.peft_name in transformer.peft_config
            told = library.describe()
            assert told["device"]["bytes"] <= 3 * size
            assert told["host"]["bytes"] <= 6 * size
            assert pinned.peft_name in transformer.peft_config
    assert len(transformer.peft_config) == 3
    assert told["evictions"] == {"host": 6, "device": 9}
    with library.holding(uses[-2:]), library.holding(uses[:1]):  # all are there still
        assert library.describe()["misses"] == told["misses"]


def lacks_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def lacks_memory_in_diffusers() -> None:
    """Its way out of a loading that has failed fails too."""
    try:
        lacks_memory()
    except torch.OutOfMemoryError:
        raise KeyError("peft_config")  # noqa: B904


@pytest.mark.parametrize("fail", [lacks_memory, lacks_memory_in_diffusers])
def test_where_memory_is_lacking_those_that_no_request_uses_make_room(
    fail: Callable[[], None], flux_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load_stage(flux_checkpoint, ("denoiser",))
    transformer: Any = stage.components["transformer"]
    uses = [written(tmp_path, f"s{i}", lora_tensors(transformer, "transformer", ("to_q",), seed=i)) for i in range(4)]
    library = library_of(stage, tmp_path)
    others: list[int] = []
    stage.memory.when_lacking(lambda: others.append(len(transformer.peft_config)))

    def with_room_for_two(*args: Any) -> int:
        if len(getattr(transformer, "peft_config", ())) >= 2:
            fail()
        return inject(*args)

    monkeypatch.setattr("deployments.adapters.library.inject", with_room_for_two)
    with library.holding(uses[:1]) as [pinned]:
        for use in uses[1:]:
            with library.holding([use]) as [held]:
                assert set(transformer.peft_config) == {pinned.peft_name, held.peft_name}
        assert others == [1, 1], "what others keep goes too"
        with (
            library.holding(uses[1:2]),
            pytest.raises(torch.OutOfMemoryError),
            library.holding(uses[2:3]),
        ):
            pytest.fail("both are in use")
    library.evict_idle(["transformer"])
    assert layers_in(transformer) == 0
    assert library.describe()["device"]["bytes"] == 0


def test_a_compiled_model_keeps_the_empty_layers_of_its_last_adapter(flux_checkpoint: Path, tmp_path: Path) -> None:
    """It is compiled with them."""
    stage = load_stage(flux_checkpoint, ("denoiser",))
    stage.switches["transformer"] = "compiled"
    transformer: Any = stage.components["transformer"]
    uses = [written(tmp_path, f"s{i}", lora_tensors(transformer, "transformer", ("to_q",), seed=i)) for i in range(2)]
    layer: Any = transformer.get_submodule("transformer_blocks.0.attn.to_q")
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    before, weights = layer(x), sum(each.numel() for each in transformer.parameters())
    library = library_of(stage, tmp_path)
    found = set()
    for use in uses:
        with library.holding([use]) as [held]:
            assert list(transformer.peft_config) == [held.peft_name]
            found.add(id(transformer.get_submodule("transformer_blocks.0.attn.to_q")))
            expected = load_unsplit(flux_checkpoint).transformer
            expected.load_lora_adapter(use.path, adapter_name="expected")
            assert_same_state(adapter_state(transformer, held.peft_name), adapter_state(expected, "expected"))
        library.evict_idle(["transformer"])
        assert not getattr(transformer, "peft_config", None)
        assert torch.equal(transformer.get_submodule("transformer_blocks.0.attn.to_q")(x), before)
        assert sum(each.numel() for each in transformer.parameters()) == weights
    assert len(found) == 1, "one layer for both"


def test_a_model_computes_as_before_while_no_adapter_is_applied_and_after_the_last(
    flux_checkpoint: Path, tmp_path: Path
) -> None:
    stage = load_stage(flux_checkpoint, ("denoiser",))
    transformer: Any = stage.components["transformer"]
    use = written(tmp_path, "style", lora_tensors(transformer, "transformer", ("to_q", "proj_mlp")))
    layer: Any = transformer.get_submodule("transformer_blocks.0.attn.to_q")
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    before = layer(x)
    library = library_of(stage, tmp_path)
    with library.holding([use]):
        assert torch.equal(transformer.get_submodule("transformer_blocks.0.attn.to_q")(x), before)
        library.forget(library.fetched(use).digest)
        assert layers_in(transformer) == 8  # it is in use
    assert layers_in(transformer) == 0
    assert transformer.get_submodule("transformer_blocks.0.attn.to_q") is layer
    assert library.held() == ()
    assert library.describe()["device"] == {"adapters": 0, "bytes": 0, "max_bytes": 1024**3}


def test_many_requests_for_one_adapter_load_it_once(flux_checkpoint: Path, tmp_path: Path) -> None:
    stage = load_stage(flux_checkpoint, ("denoiser",))
    use = written(tmp_path, "style", lora_tensors(stage.components["transformer"], "transformer", ("to_q",)))
    library = library_of(stage, tmp_path)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(library.fetched, [use] * 16))
    assert library.describe()["misses"] == {"host": 1}
    assert len({each.digest for each in found}) == 1
    assert library.held() == (found[0].digest,)
    assert [tier for tier, _ in library.take_seconds()] == ["host"]


def test_a_file_that_is_replaced_is_another_adapter(flux_checkpoint: Path, tmp_path: Path) -> None:
    stage = load_stage(flux_checkpoint, ("denoiser",))
    transformer: Any = stage.components["transformer"]
    library = library_of(stage, tmp_path)
    use = written(tmp_path, "style", lora_tensors(transformer, "transformer", ("to_q",)))
    with library.holding([use]) as [first]:
        written(tmp_path, "style", lora_tensors(transformer, "transformer", ("to_q", "to_k"), seed=9))
        with library.holding([use]) as [second]:
            assert first.peft_name != second.peft_name
            assert set(transformer.peft_config) == {first.peft_name, second.peft_name}


def test_a_copy_from_elsewhere_is_compared_with_its_place_where_no_digest_is_known(
    flux_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load_stage(flux_checkpoint, ("denoiser",))
    layers = [lora_tensors(stage.components["transformer"], "transformer", ("to_q",), seed=seed) for seed in (0, 1)]
    copies = [fetch_file(written(tmp_path, name, each), tmp_path) for name, each in zip("ab", layers, strict=True)]
    there = replace(copies[0], stamp=None)

    def fetched(*_: Any) -> AdapterFile:
        os.utime(there.path)  # as another process does that uses it
        return there

    monkeypatch.setattr("deployments.adapters.library.fetch_file", fetched)
    library = library_of(stage, tmp_path)
    use = AdapterUse("style", "s3://bucket/style.safetensors")
    first = library.fetched(use)
    assert library.fetched(use) is first
    there = replace(copies[1], stamp=None)  # the object was replaced
    assert library.fetched(use).digest == copies[1].digest != first.digest
    assert library.fetched(replace(use, digest=first.digest)) is first


def test_a_file_that_changes_while_it_is_read_is_nobodys_fault(
    flux_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load_stage(flux_checkpoint, ("denoiser",))
    use = written(tmp_path, "style", lora_tensors(stage.components["transformer"], "transformer", ("to_q",)))

    def and_cut(*asked: Any) -> AdapterFile:
        file = fetch_file(*asked)
        file.path.write_bytes(b"half of another")
        return file

    library = library_of(stage, tmp_path)
    monkeypatch.setattr("deployments.adapters.library.fetch_file", and_cut)
    with pytest.raises(StageUnavailableError, match="is being replaced; try again"):
        library.fetched(use)
    assert library.held() == ()


def test_what_a_request_has_fetched_is_there_for_it_whatever_the_budget(flux_checkpoint: Path, tmp_path: Path) -> None:
    stage = load_stage(flux_checkpoint, ("denoiser",))
    use = written(tmp_path, "style", lora_tensors(stage.components["transformer"], "transformer", ("to_q",)))
    library = library_of(stage, tmp_path, max_host_bytes=0)
    found = library.fetched(use)
    Path(use.path).unlink()
    with library.holding([replace(use, digest=found.digest)]) as [held]:
        assert held.peft_name == found.peft_name
    assert library.describe()["host"]["bytes"] == 0


def test_groups_of_blocks_that_a_stream_exchanges_know_the_tensors_that_are_there(
    flux_checkpoint: Path, tmp_path: Path
) -> None:
    """As on an accelerator: the stream itself is played."""
    stage = load_stage(flux_checkpoint, ("denoiser",))
    transformer: Any = stage.components["transformer"]
    apply_group_offloading(transformer, onload_device=stage.device, num_blocks_per_group=1)
    groups = [
        hook.group
        for module in transformer.modules()
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
        if hasattr(hook, "group")
    ]
    for group in groups:
        group.stream, group.low_cpu_mem_usage = "played", True
        group.cpu_param_dict = group._init_cpu_param_dict()
    before = sum(len(group.cpu_param_dict) for group in groups)
    use = written(tmp_path, "style", lora_tensors(transformer, "transformer", ("to_q",)))
    library = library_of(stage, tmp_path)
    with library.holding([use]):
        told = [set(map(id, group.cpu_param_dict)) for group in groups]
        assert sum(map(len, told)) > before
        for group, known in zip(groups, told, strict=True):
            assert {id(each) for module in group.modules for each in module.parameters()} <= known
        library.forget(library.fetched(use).digest)
    assert sum(len(group.cpu_param_dict) for group in groups) == before


def test_nothing_of_a_file_stays_in_what_has_converted_it(flux_checkpoint: Path, tmp_path: Path) -> None:
    stage = load_stage(flux_checkpoint, ("denoiser",))
    use = written(tmp_path, "style", lora_tensors(stage.components["transformer"], "transformer", ("to_q",)))
    library = library_of(stage, tmp_path, max_host_bytes=0)
    kept = weakref.ref(next(iter(library.fetched(use).parts["transformer"].tensors.values())))
    gc.collect()
    assert kept() is None


def test_half_precision_weights_get_half_precision_layers_as_in_diffusers(
    flux_checkpoint: Path, tmp_path: Path
) -> None:
    unsplit = load_unsplit(flux_checkpoint, torch.bfloat16)
    use = written(tmp_path, "style", of_diffusers(unsplit, "flux"))
    unsplit.load_lora_weights(use.path, adapter_name="expected")
    unsplit.set_adapters(["expected"])
    stage = load_stage(flux_checkpoint, STAGES, dtype=torch.bfloat16)
    with library_of(stage, tmp_path).holding([use], COMPONENTS["flux"]) as [held]:
        for each in held.components:
            found = adapter_state(stage.components[each], held.peft_name)
            assert_same_state(found, adapter_state(getattr(unsplit, each), "expected"))


def test_loading_draws_no_random_numbers_of_requests(flux_checkpoint: Path, tmp_path: Path) -> None:
    stage = load_stage(flux_checkpoint, ("encoder",))
    use = written(tmp_path, "style", lora_tensors(stage.components["text_encoder"], "text_encoder", CLIP))
    state = torch.get_rng_state()
    with library_of(stage, tmp_path).holding([use], ["text_encoder"]):
        assert torch.equal(torch.get_rng_state(), state)
