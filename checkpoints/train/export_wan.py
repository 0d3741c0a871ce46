r"""Assemble the trained parts into a diffusers folder that WanPipeline.from_pretrained loads.

    python -m checkpoints.train.export_wan --high runs/wan_high --low runs/wan_low --decoder runs/wan_decoder \
        --encoder runs/wan_encoder --out checkpoints/emoji-wan
"""

import argparse
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline

from checkpoints.train.clip_prompts import words
from checkpoints.train.tokenizers import case_forms
from checkpoints.train.train_wan import BOUNDARY
from checkpoints.train.wan_parts import WanParts
from checkpoints.train.wan_vae import build_vae


def assemble(high: Path, low: Path, decoder: Path, encoder: Path) -> WanPipeline:
    """The pipeline made of the averaged weights of four training folders, in float32."""
    parts, low_parts = WanParts(), WanParts()
    parts.load_state_dict(_average(high))
    low_parts.load_state_dict(_average(low))
    copy_rows_to_case_forms(parts)
    vae = build_vae()
    trained_half = {"decoder": _average(decoder), "encoder": _average(encoder)}
    for half, name in (
        ("decoder", "decoder"),
        ("decoder", "post_quant_conv"),
        ("encoder", "encoder"),
        ("encoder", "quant_conv"),
    ):
        weights = {
            key.removeprefix(f"{name}."): value
            for key, value in trained_half[half].items()
            if key.startswith(f"{name}.")
        }
        getattr(vae, name).load_state_dict(weights)
    return WanPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder.eval(),
        vae=vae.eval(),
        # Wan's own; the shift puts more of the steps at high noise, as in training.
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=parts.transformer.eval(),
        transformer_2=low_parts.transformer.eval(),
        boundary_ratio=BOUNDARY,
    )


def copy_rows_to_case_forms(parts: WanParts) -> None:
    """Give "Fox" and "FOX" the embedding that training gave "fox"."""
    table = parts.text_encoder.shared.weight
    ids = parts.tokenizer.get_vocab()
    with torch.no_grad():
        for form, word in case_forms(words()).items():
            table[ids["▁" + form]] = table[ids["▁" + word]]


def _average(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(folder / "state.pt", map_location="cpu")["average"]
    return weights


def main() -> None:
    """Read the arguments, assemble, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("high", "low", "decoder", "encoder", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    assemble(arguments.high, arguments.low, arguments.decoder, arguments.encoder).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
