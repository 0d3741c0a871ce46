"""A checkpoint with the shapes of a published model and random weights, to measure speed where no download is.

    python -m benchmarks.real_size flux1-dev FOLDER      (bfloat16, 34 GB on disk)
    python -m benchmarks.real_size wan2.1-1.3b FOLDER    (bfloat16, 14 GB)

Times, memory and throughput of such a model are those of the real one; its pictures are noise. The shapes are
those of the configuration files of black-forest-labs/FLUX.1-dev and Wan-AI/Wan2.1-T2V-1.3B-Diffusers; the
tokenizers are tiny ones of the same classes, because a random model reads no words.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from tests.support.tiny_models.tokenizers import clip_tokenizer, t5_tokenizer

SHARD_BYTES = 4_000_000_000
DTYPE = torch.bfloat16
SPREAD = 0.02  # standard deviation of the weights: activations stay finite through all layers


@dataclass(frozen=True)
class RealSize:
    """A published pipeline: its class and what makes each of its components."""

    pipeline: str
    models: dict[str, Callable[[], torch.nn.Module]]
    others: dict[str, Callable[[], Any]]  # schedulers and tokenizers


def t5_xxl(vocab_size: int) -> dict[str, Any]:
    """The encoder of T5 1.1 and UMT5 in size XXL."""
    shape = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64}
    return {**shape, "vocab_size": vocab_size, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


FLUX1_DEV = RealSize(
    pipeline="FluxPipeline",
    models={
        "transformer": lambda: FluxTransformer2DModel(guidance_embeds=True),
        "text_encoder": lambda: CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, projection_dim=768, max_position_embeddings=77,
            )
        ),
        "text_encoder_2": lambda: T5EncoderModel(T5Config(**t5_xxl(32128))),
        "vae": lambda: AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16, sample_size=1024,
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        ),
    },
    others={
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        "tokenizer": clip_tokenizer,
        "tokenizer_2": t5_tokenizer,
    },
)  # fmt: skip

WAN21_1_3B = RealSize(
    pipeline="WanPipeline",
    models={
        "transformer": lambda: WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30),
        "text_encoder": lambda: UMT5EncoderModel(UMT5Config(**t5_xxl(256384))),
        "vae": lambda: AutoencoderKLWan(),
    },
    others={
        "scheduler": lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "tokenizer": t5_tokenizer,
    },
)

REAL_SIZES = {"flux1-dev": FLUX1_DEV, "wan2.1-1.3b": WAN21_1_3B}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=REAL_SIZES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    write_checkpoint(REAL_SIZES[options.model], options.folder)


def write_checkpoint(model: RealSize, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a folder that diffusers loads; no more than one shard is in memory at a time."""
    classes: dict[str, Any] = {"_class_name": model.pipeline}
    for name, make in model.others.items():
        component = make()
        component.save_pretrained(folder / name)
        classes[name] = [library_of(component), type(component).__name__]
    for name, make in model.models.items():
        component = on_meta(make)
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_config(component, folder / name)
        write_weights(component, folder / name, shard_bytes)
        classes[name] = [library_of(component), type(component).__name__]
    (folder / "model_index.json").write_text(json.dumps(classes, indent=2), encoding="utf-8")


def on_meta(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return make()


def library_of(component: Any) -> str:
    return type(component).__module__.split(".", 1)[0]


def write_config(component: Any, folder: Path) -> None:
    if library_of(component) == "diffusers":
        component.save_config(folder)
    else:
        component.config.architectures = [type(component).__name__]
        component.config.save_pretrained(folder)


def write_weights(component: torch.nn.Module, folder: Path, shard_bytes: int) -> None:
    """Shards and their index, named as the library of the component expects them."""
    stem = "diffusion_pytorch_model" if library_of(component) == "diffusers" else "model"
    shards = list(sharded(component, shard_bytes))
    where: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number, shard in enumerate(shards, 1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        weights = {name: random_weight(name, like, generator) for name, like in shard.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(num_bytes(tensor) for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def sharded(component: torch.nn.Module, shard_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """The parameters and persistent buffers by name, each tensor once."""
    shard: dict[str, torch.Tensor] = {}
    once = {name for name, _ in [*component.named_parameters(), *component.named_buffers()]}
    for name, tensor in component.state_dict().items():
        if name not in once:
            continue  # another name of a weight that is shared
        if shard and sum(map(num_bytes, shard.values())) + num_bytes(tensor) > shard_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    if shard:
        yield shard


def num_bytes(tensor: torch.Tensor) -> int:
    """As it is stored."""
    return tensor.numel() * (DTYPE.itemsize if tensor.is_floating_point() else tensor.itemsize)


def random_weight(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Norms' scales are near 1 and biases 0, as in a trained model."""
    if not like.is_floating_point():
        return torch.arange(like.numel()).reshape(like.shape).to(like.dtype)  # position ids
    if name.endswith("bias"):
        return torch.zeros(like.shape, dtype=DTYPE)
    if like.ndim == 1 or name.endswith("gamma"):
        return torch.ones(like.shape, dtype=DTYPE)
    return torch.empty(like.shape, dtype=DTYPE).normal_(0, SPREAD, generator=generator)


if __name__ == "__main__":
    main()
