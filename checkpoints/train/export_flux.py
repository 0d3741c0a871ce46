r"""Assemble the trained parts into a diffusers folder that FluxPipeline.from_pretrained loads.

    python -m checkpoints.train.export_flux --flux runs/flux --decoder runs/decoder --encoder runs/encoder \
        --out checkpoints/emoji-flux
"""

import argparse
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from checkpoints.train.flux_parts import FluxParts
from checkpoints.train.prompts import words
from checkpoints.train.tokenizers import case_forms
from checkpoints.train.train_vae import build_vae


def assemble(flux: Path, decoder: Path, encoder: Path) -> FluxPipeline:
    """The pipeline made of the averaged weights of three training folders, in float32."""
    parts = FluxParts()
    parts.load_state_dict(torch.load(flux / "state.pt", map_location="cpu")["average"])
    copy_rows_to_case_forms(parts)
    vae = build_vae()
    vae.decoder.load_state_dict(torch.load(decoder / "state.pt", map_location="cpu")["average"])
    vae.encoder.load_state_dict(torch.load(encoder / "state.pt", map_location="cpu")["average"])
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),  # more of the steps at high noise, as in training
        vae=vae.eval(),
        text_encoder=parts.clip.eval(),
        tokenizer=parts.clip_tokenizer,
        text_encoder_2=parts.t5.eval(),
        tokenizer_2=parts.t5_tokenizer,
        transformer=parts.transformer.eval(),
    )


def copy_rows_to_case_forms(parts: FluxParts) -> None:
    """Give "Fox" and "FOX" the embedding that training gave "fox"."""
    table = parts.t5.shared.weight
    ids = parts.t5_tokenizer.get_vocab()
    with torch.no_grad():
        for form, word in case_forms(words()).items():
            table[ids["▁" + form]] = table[ids["▁" + word]]


def main() -> None:
    """Read the arguments, assemble, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("flux", "decoder", "encoder", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    assemble(arguments.flux, arguments.decoder, arguments.encoder).save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
