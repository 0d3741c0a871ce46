"""A model made of several others is loaded, and stood for, from the folders of its members."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, MultiAdapter, MultiControlNetModel, T2IAdapter, UNet2DConditionModel

from deployments.errors import CheckpointError
from deployments.stage_pipeline.roles import is_denoiser
from deployments.stage_pipeline.skeleton import build_from_config, skeleton
from deployments.weights.containers import is_container, member_folders, members
from deployments.weights.load import load_component

CPU = torch.device("cpu")


def controlnet() -> ControlNetModel:
    return ControlNetModel(
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        cross_attention_dim=4,
        conditioning_embedding_out_channels=(4,),
        norm_num_groups=2,
    )


def adapter() -> T2IAdapter:
    return T2IAdapter(channels=[8], num_res_blocks=1, downscale_factor=2)


CASES: dict[str, Any] = {
    "controlnet": lambda: MultiControlNetModel([controlnet(), controlnet(), controlnet()]),
    "adapter": lambda: MultiAdapter([adapter(), adapter()]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_container_is_loaded_with_the_weights_of_each_member(name: str, tmp_path: Path) -> None:
    real = CASES[name]()
    real.save_pretrained(str(tmp_path / name))
    assert is_container(type(real))
    assert len(member_folders(tmp_path / name)) == len(members(real))
    loaded = load_component(type(real), tmp_path / name, torch.float32, CPU, use_streamer=False)
    assert type(loaded) is type(real)
    assert not loaded.training
    theirs = real.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("name", CASES)
def test_a_container_elsewhere_has_a_skeleton_of_the_same_shapes(name: str, tmp_path: Path) -> None:
    real = CASES[name]()
    real.save_pretrained(str(tmp_path / name))
    bones = skeleton(type(real), tmp_path / name, CPU, torch.bfloat16)
    assert isinstance(bones, type(real))
    assert all(parameter.is_meta for parameter in bones.parameters())
    for twin in (bones, bones.meta_twin(), build_from_config(type(real), tmp_path / name)):
        shapes = {key: tensor.shape for key, tensor in twin.state_dict().items()}
        assert shapes == {key: tensor.shape for key, tensor in real.state_dict().items()}
    assert (bones.device, bones.dtype) == (CPU, torch.bfloat16)


def test_several_controlnets_are_a_denoiser_and_one_model_is_no_container() -> None:
    assert is_denoiser("controlnet", MultiControlNetModel)
    assert not is_container(UNet2DConditionModel)
    assert not is_container(ControlNetModel)


def test_a_member_whose_class_is_not_known_is_refused_by_its_file(tmp_path: Path) -> None:
    CASES["adapter"]().save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "adapter_1" / "config.json").write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(CheckpointError, match=r"adapter_1/config\.json names the model 'NoSuchModel'"):
        load_component(MultiAdapter, tmp_path / "adapter", torch.float32, CPU, use_streamer=False)
