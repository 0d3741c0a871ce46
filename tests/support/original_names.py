"""Single files as Stable Diffusion is published: all models under the names of its first code, not diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

OF_UNET_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OF_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
OF_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def single_file(pipeline: Any) -> Tensors:
    """The tensors of a pipeline's U-Net, autoencoder and CLIP text encoders, as one file has them."""
    tensors = dict(renamed(pipeline.unet.state_dict(), "model.diffusion_model.", unet_name(pipeline.unet)))
    tensors |= dict(autoencoder(pipeline.vae))
    second = getattr(pipeline, "text_encoder_2", None)
    place = "cond_stage_model.transformer." if second is None else "conditioner.embedders.0.transformer."
    tensors |= {f"{place}text_model.{name}": tensor for name, tensor in clip(pipeline.text_encoder).items()}
    if second is not None:
        tensors |= dict(open_clip(second, "conditioner.embedders.1.model."))
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def renamed(tensors: Mapping[str, torch.Tensor], prefix: str, name_of: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors.items():
        yield prefix + name_of(name), tensor


def unet_name(unet: Any) -> Any:
    step = unet.config.layers_per_block + 1

    def name_of(name: str) -> str:
        module, _, leaf = name.rpartition(".")
        if module in OF_UNET_ENDS:
            return f"{OF_UNET_ENDS[module]}.{leaf}"
        if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name):
            number = 2 * int(match[2]) if match[1] == "resnets" else 1
            return f"middle_block.{number}.{inside(match[1], match[3])}"
        match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name)
        assert match, name
        way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * step}.0.{rest.replace('conv.', 'op.')}"
        if kind == "upsamplers":
            has_attention = "CrossAttn" in unet.config.up_block_types[block]
            return f"output_blocks.{(block + 1) * step - 1}.{2 if has_attention else 1}.{rest}"
        number = 1 + block * step + layer if way == "down" else block * step + layer
        return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}." + inside(
            kind, rest
        )

    return name_of


def inside(kind: str, rest: str) -> str:
    module, _, leaf = rest.rpartition(".")
    return f"{OF_UNET_RESNETS[module]}.{leaf}" if kind == "resnets" else rest


def autoencoder(vae: Any) -> Iterator[tuple[str, torch.Tensor]]:
    last = len(vae.config.block_out_channels) - 1
    for name, tensor in vae.state_dict().items():
        new = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        new = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{last - int(m[1])}.block", new)
        new = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        new = new.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", new):
            new = f"{match[1]}.mid.attn_1.{OF_ATTENTION[match[2]]}.{match[3]}"
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        yield f"first_stage_model.{new}", tensor


def clip(encoder: Any) -> Tensors:
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


OF_OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def open_clip(encoder: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    tensors = clip(encoder)
    yield f"{prefix}text_projection", tensors.pop("text_projection.weight").T
    for name, tensor in tensors.items():
        if name in OF_OPEN_CLIP:
            yield prefix + OF_OPEN_CLIP[name], tensor
            continue
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        assert match, name
        block = f"{prefix}transformer.resblocks.{match[1]}"
        if match[2] == "self_attn.q_proj":
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            yield f"{block}.attn.in_proj_{match[3]}", torch.cat(parts)
        elif match[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            renaming = {"layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn": "attn"}
            module = match[2]
            for old, new in renaming.items():
                module = module.replace(old, new)
            yield f"{block}.{module}.{match[3]}", tensor
