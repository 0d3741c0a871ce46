"""What the file of an adapter may hold: LoRA layers, with settings that leave the model's own weights alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from deployments.adapters.fetch import refusal
from deployments.adapters.use import AdapterUse

ALONE = "it cannot be applied to single samples of a batch"


@dataclass(frozen=True)
class Unsupported:
    """A kind of adapter that is no plain LoRA, told by parts of its tensors' names."""

    name: str
    marks: tuple[str, ...]
    why: str


UNSUPPORTED = (
    Unsupported("DoRA", ("dora_scale", "lora_magnitude_vector"), f"{ALONE}, and diffusers leaves its magnitudes out"),
    Unsupported("LoKr", ("lokr_",), ALONE),
    Unsupported("LoHa", ("hada_",), ALONE),
    Unsupported("OFT", ("oft_blocks", "oft_diag", "oft_r", "boft_"), ALONE),
    Unsupported("IA3", ("ia3_l", ".on_input"), ALONE),
    Unsupported("GLoRA", (".a1.weight", ".b1.weight"), ALONE),
    Unsupported("LoCon with a Tucker decomposition", ("lora_mid", "lora_cp"), "diffusers does not read it"),
    Unsupported("SAI's Control LoRA", ("lora_controlnet",), "it replaces layers of the model"),
)

# Of PEFT's LoraConfig: all others must be off or as PEFT has them, for they change more than a layer's two factors.
SETTINGS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode",
        "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core",
        "peft_type", "peft_version", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
        "exclude_modules", "task_type", "use_rslora",
    }
)  # fmt: skip
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    # pissa, olora, corda, eva and loftq write into the model's own weights
    "init_lora_weights": (True, False, "gaussian"),
}


def check_file(use: AdapterUse, path: Path) -> None:
    """Raises InvalidRequestError for what is no safetensors file, is damaged, or holds another kind of adapter."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        said = str(error).replace(str(path), "its file")
        raise refusal(use, f"{path.suffix} was expected, and its file is cut short or is none: {said}") from error
    refuse_unsupported(use, names)


def refuse_unsupported(use: AdapterUse, names: Collection[str]) -> None:
    """Raises InvalidRequestError."""
    if not names:
        raise refusal(use, "its file is empty")
    for kind in UNSUPPORTED:
        for name in names:
            if any(mark in name for mark in kind.marks):
                raise refusal(use, f"it is a {kind.name} ({name}): {kind.why}; plain LoRAs are supported")


def refuse_settings(use: AdapterUse, settings: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError for settings of PEFT's LoraConfig with which more than a LoRA is put in."""
    usual = vars(LoraConfig())
    for name, value in settings.items():
        if name == "use_dora" and value:
            raise refusal(use, f"it is a DoRA (use_dora in its metadata): {ALONE}; plain LoRAs are supported")
        if name in SETTINGS or (name not in PLAIN_VALUES and (not value or value == usual.get(name))):
            continue
        allowed = PLAIN_VALUES.get(name)
        if allowed is None or value not in allowed:
            listed = " and ".join(map(repr, allowed)) if allowed else "none is"
            raise refusal(use, f"its metadata say {name}: {value!r}, {listed} allowed")
