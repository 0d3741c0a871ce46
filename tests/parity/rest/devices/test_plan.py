"""The memory plan of every tiny model and of the published ones: walked through, and as the audit counted them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from deployments.plan.process import MEASURED
from tests.support.measured_published import FOLDER, ORDERS, measured_as_ordered
from tests.support.published import write_published
from tests.support.tiny_models import TINY_MODELS
from tests.support.walked import component_of, peaks, walked, walked_as_small


@dataclass(frozen=True)
class Audited:
    """GB: weights in bfloat16 (but for a VAE in float32), the denoiser's peak, the decoder's."""

    weights: dict[str, float]
    denoiser: float
    decoder: float
    size: tuple[int, int, int]
    args: dict[str, Any] = field(default_factory=dict)


NO_GUIDANCE = {"default_arguments": {"guidance_scale": 0.0}}  # one forward without the prompt less
AUDIT = {
    "FLUX.1-dev": Audited({"transformer": 23.80}, 1.03, 3.63, (1536, 1536, 1)),
    "Z-Image-Turbo": Audited({"transformer": 12.31, "text_encoder": 8.04}, 0.51, 1.61, (1024, 1024, 1), NO_GUIDANCE),
    "Qwen-Image": Audited({"transformer": 40.86, "text_encoder": 16.58, "vae": 0.25}, 0.66, 6.10, (1328, 1328, 1)),
    "Wan2.2-T2V-A14B": Audited(
        {"transformer": 28.64, "transformer_2": 28.64, "text_encoder": 11.36, "vae": 0.51},
        3.75,
        8.18,
        (832, 480, 81),
        {"component_dtypes": {"vae": "float32"}},
    ),
    "LTX-2": Audited({"transformer": 37.75, "vae": 2.44}, 0, 4.06, (768, 512, 121)),
}


@pytest.mark.parametrize("name", AUDIT)
def test_a_published_model_is_counted_as_the_audit_counted_it(name: str, tmp_path: Path) -> None:
    """Within 10 %: the audit's prompts were shorter than the longest."""
    audited = AUDIT[name]
    folder = write_published(name, tmp_path)
    measured = walked(folder, *audited.size, dtype="bfloat16", **audited.args)
    for component, gigabytes in audited.weights.items():
        assert component_of(measured, component).loaded / 1e9 == pytest.approx(gigabytes, rel=0.01)
    found = peaks(measured)
    assert found["vae.decode"] == pytest.approx(audited.decoder, rel=0.1)
    if audited.denoiser:
        assert found["transformer.forward"] == pytest.approx(audited.denoiser, rel=0.1)


@pytest.mark.parametrize("name", ORDERS)
def test_what_plans_are_tested_with_is_what_is_measured_today(name: str, tmp_path: Path) -> None:
    kept = MEASURED.validate_json((FOLDER / f"{name}.json").read_bytes())
    assert measured_as_ordered(name, tmp_path) == kept


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_tiny_model_is_walked_through(name: str, checkpoints_root: Path) -> None:
    measured = walked_as_small(name, checkpoints_root)
    assert not [note for note in measured.notes if "could not be walked through" in note]
