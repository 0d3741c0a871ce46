"""Writes GGUF files, as the tools of llama.cpp make them of a model's weights."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

BLOCK = 32  # values of a row that Q8_0, Q4_0 and their like quantise together


def write_gguf(folder: Path, file: Path, kind: str = "Q8_0", others: str = "F32") -> Path:
    """The weights in a component's folder, matrices in blocks of `kind`, all else (and odd matrices) as `others`."""
    import gguf

    kinds = {name: gguf.GGMLQuantizationType[name] for name in (kind, others)}
    writer = gguf.GGUFWriter(file, "flux")
    for part in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(part).items():
            fits = tensor.ndim == 2 and tensor.shape[1] % BLOCK == 0
            chosen = kinds[kind if fits else others]
            numbers = gguf.quants.quantize(tensor.float().numpy(), chosen)
            writer.add_tensor(name, numbers, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
