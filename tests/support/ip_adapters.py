"""Tiny IP-Adapters as they are published: random weights under the names that the loaders of diffusers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.tiny_models.text_encoders import clip_image_encoder_with_projection

IMAGE_DIM = 32  # of the embeddings of the tiny image encoder
PICTURE_SIZE = 32
TOKENS = 4  # that a picture becomes; the loaders know no other number


def unet_adapter(unet: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights for each cross attention of a U-Net, and the projection of the picture's embedding."""
    width = unet.config.cross_attention_dim
    tensors = projection(width)
    crossings = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(crossings):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for key in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{2 * number + 1}.{key}.weight"] = torch.empty(attention.to_k.out_features, width)
    return randomized(tensors, seed)


def flux_adapter(transformer: Any, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights for each double block of a Flux transformer."""
    width = transformer.config.joint_attention_dim
    inner = transformer.config.num_attention_heads * transformer.config.attention_head_dim
    tensors = projection(width)
    for number in range(transformer.config.num_layers):
        for key in ("to_k_ip", "to_v_ip"):
            tensors[f"ip_adapter.{number}.{key}.weight"] = torch.empty(inner, width)
            tensors[f"ip_adapter.{number}.{key}.bias"] = torch.empty(inner)
    return randomized(tensors, seed)


def projection(width: int) -> dict[str, torch.Tensor]:
    return {
        "image_proj.proj.weight": torch.empty(TOKENS * width, IMAGE_DIM),
        "image_proj.proj.bias": torch.empty(TOKENS * width),
        "image_proj.norm.weight": torch.empty(width),
        "image_proj.norm.bias": torch.empty(width),
    }


def randomized(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in tensors.items()}


def save_adapter(tensors: dict[str, torch.Tensor], folder: Path, name: str = "adapter.safetensors") -> Path:
    """`folder`/`name`, a .bin file as torch.save writes it in groups, with the image encoder beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".bin"):
        groups: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
        for key, tensor in tensors.items():
            group, _, rest = key.partition(".")
            groups[group][rest] = tensor
        torch.save(groups, folder / name)
    else:
        save_file(tensors, folder / name)
    clip_image_encoder_with_projection(PICTURE_SIZE, 8).save_pretrained(folder / "image_encoder")
    return folder
