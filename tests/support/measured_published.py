"""Measurements of published models, kept as JSON, so that plans and configurations are tested without a walk.

    python -m tests.support.measured_published [NAME ...]    measures them again

tests/parity/rest/devices/test_plan.py holds them against what is measured today.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deployments.plan.measured import Measured
from deployments.plan.process import MEASURED

FOLDER = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Order:
    """A model's name at the hub, the size of its request in pixels and frames, and args of the model."""

    repository: str
    width: int
    height: int
    num_frames: int | None = None
    args: dict[str, Any] = field(default_factory=dict)


VAE_IN_FLOAT32 = {"component_dtypes": {"vae": "float32"}}
ORDERS = {
    "FLUX.1-dev": Order("black-forest-labs/FLUX.1-dev", 1024, 1024),
    "FLUX.2-dev": Order("black-forest-labs/FLUX.2-dev", 1024, 1024),
    "Qwen-Image": Order("Qwen/Qwen-Image", 1328, 1328),
    "Qwen-Image-Edit": Order("Qwen/Qwen-Image-Edit", 1024, 1024),
    "Z-Image-Turbo": Order("Tongyi-MAI/Z-Image-Turbo", 1024, 1024, args={"default_arguments": {"guidance_scale": 0.0}}),
    "Wan2.2-T2V-A14B": Order("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 1280, 720, 81, VAE_IN_FLOAT32),
    "Wan2.2-TI2V-5B": Order("Wan-AI/Wan2.2-TI2V-5B-Diffusers", 1280, 704, 121, VAE_IN_FLOAT32),
    "LTX-2": Order("Lightricks/LTX-2", 768, 512, 121),
}


def kept_measurement(repository: str) -> Measured:
    """Of the model of that name at the hub."""
    [name] = [name for name, order in ORDERS.items() if order.repository == repository]
    return MEASURED.validate_json((FOLDER / f"{name}.json").read_bytes())


def measured_as_ordered(name: str, root: Path) -> Measured:
    """A walk through the folder that is written below `root`."""
    from tests.support.published import write_published
    from tests.support.walked import walked

    order = ORDERS[name]
    folder = write_published(name, root)
    found = walked(folder, order.width, order.height, order.num_frames, dtype="bfloat16", **order.args)
    # That there are no files is told of the folder, not of the model.
    notes = tuple(note for note in found.notes if "without files" not in note)
    return replace(found, model=order.repository, notes=notes)


def main(names: list[str]) -> None:
    for name in names or ORDERS:
        with tempfile.TemporaryDirectory() as root:
            measured = measured_as_ordered(name, Path(root))
        (FOLDER / f"{name}.json").write_bytes(MEASURED.dump_json(measured, indent=1))
        print(name, "; ".join(measured.notes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
