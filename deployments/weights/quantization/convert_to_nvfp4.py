"""Makes an NVFP4 checkpoint from one in half precision, so that FP4 layers can be tried.

    python -m deployments.weights.quantization.convert_to_nvfp4 SOURCE DESTINATION

copies a checkpoint folder and quantises the linear layers in the blocks of its transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from safetensors.torch import load_file, save_file

from deployments.weights.quantization.nvfp4 import LAYER_TENSORS, VALUES_PER_SCALE, quantized_tensors


def convert_checkpoint(source: Path, destination: Path) -> dict[str, int]:
    """Copy a pipeline's folder with the linear layers of its transformers' blocks in NVFP4.

    Returns how many layers each transformer has in NVFP4. Layers that already have ModelOpt's tensors are
    kept as they are. Raises ValueError when there is nothing to quantise, FileExistsError for a destination.
    """
    names = [file.parent.name for file in sorted(source.glob("transformer*/config.json"))]
    if not names:
        raise ValueError(f"{source} has no transformer*/config.json")
    shutil.copytree(source, destination)
    counts = {name: convert_transformer(destination / name) for name in names}
    if not any(counts.values()):
        raise ValueError(f"no linear layer of {', '.join(names)} in {source} can be in NVFP4")
    return counts


def convert_transformer(folder: Path) -> int:
    """Rewrite the weights of one transformer in place; returns the number of NVFP4 layers."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wanted = quantizable_layers(config)
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for file in sorted(folder.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(file).items():
            layer = name.removesuffix(".weight")
            if layer in wanted and name.endswith(".weight") and tensor.is_floating_point() and tensor.any():
                quantized = quantized_tensors(tensor)
                tensors |= {f"{layer}.{part}": value.contiguous() for part, value in quantized.items()}
            else:
                tensors[name] = tensor
        save_file(tensors, file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    for index in folder.glob("*.safetensors.index.json"):
        content = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2), encoding="utf-8")
    config["quantization_config"] = {"quant_method": "nvfp4"}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return sum(name.endswith(f".{LAYER_TENSORS[2]}") for name in weight_map)


def quantizable_layers(config: dict[str, Any]) -> set[str]:
    """The linear layers in the lists of blocks; embedders and the last layer decide too much to be rounded."""
    with accelerate.init_empty_weights():
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    return {
        f"{list_name}.{path}"
        for list_name, blocks in model.named_children()
        if isinstance(blocks, torch.nn.ModuleList)
        for path, module in blocks.named_modules()
        if isinstance(module, torch.nn.Linear) and module.in_features % VALUES_PER_SCALE == 0
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.weights.quantization.convert_to_nvfp4", description=__doc__
    )
    parser.add_argument("source", type=Path, help="a checkpoint folder in diffusers' layout")
    parser.add_argument("destination", type=Path, help="a folder that does not exist yet")
    paths = parser.parse_args(arguments)
    for name, count in convert_checkpoint(paths.source, paths.destination).items():
        print(f"{name}: {count} linear layers in NVFP4")


if __name__ == "__main__":
    main()
