"""The registry of tiny models, their checkpoint folders, and their output when nothing is split."""

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModularPipeline

from tests.support.tiny_models import (
    auraflow,
    bria_fibo,
    cogvideox,
    cogview,
    cosmos,
    drawing,
    easyanimate,
    flux,
    flux2,
    hidream,
    hunyuan,
    kandinsky,
    ltx,
    lumina,
    mochi,
    modular,
    pixart,
    prx,
    qwen_image,
    rewiring,
    sana,
    stable_audio,
    stable_cascade,
    stable_diffusion,
    stable_diffusion_3,
    wan,
    z_image,
)
from tests.support.tiny_models.patches import tiny_patches
from tests.support.tiny_models.tiny_model import TinyModel

FAMILIES = (
    flux,
    flux2,
    stable_diffusion,
    stable_diffusion_3,
    qwen_image,
    z_image,
    pixart,
    sana,
    hidream,
    prx,
    bria_fibo,
    cogview,
    lumina,
    auraflow,
    kandinsky,
    stable_cascade,
    wan,
    ltx,
    hunyuan,
    cogvideox,
    cosmos,
    easyanimate,
    mochi,
    stable_audio,
)

TINY_MODELS: dict[str, TinyModel] = {model.name: model for family in FAMILIES for model in family.MODELS}
MODULAR_MODELS: dict[str, TinyModel] = {model.name: model for model in modular.MODELS}
# Those that tests of one mechanism ask for by name; no run goes through all of them.
BY_NAME: dict[str, TinyModel] = {
    model.name: model for model in (*rewiring.MODELS, *drawing.MODELS, wan.ANIMATE)
} | MODULAR_MODELS


def tiny_model(name: str) -> TinyModel:
    return TINY_MODELS[name] if name in TINY_MODELS else BY_NAME[name]


def checkpoint(name: str, root: Path) -> Path:
    """The folder `root`/`name` in the standard diffusers layout; built when it is not there yet.

    Several processes may ask at once: each builds beside the target, the first rename wins. A folder that
    exists is never rebuilt, so `root` should not outlive a change of the builders.
    """
    target = root / name
    if target.exists():
        return target
    model = tiny_model(name)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as workplace:
        folder = Path(workplace) / name
        pipeline, _ = model.build()
        pipeline.save_pretrained(str(folder))
        if model.after_save is not None:
            model.after_save(folder, pipeline)
        _rename_unless_there(folder, target)
    return target


def request_arguments(name: str) -> dict[str, Any]:
    """Keyword arguments of one request; pictures are PIL images, `output_type` is left to the caller."""
    return dict(_request(name))


def load_unsplit(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """The whole pipeline of a checkpoint folder that `checkpoint` made, ready to be called."""
    tiny_patches()
    if not (folder / "model_index.json").is_file():
        return modular.load_modular(folder, dtype)
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    after_load = tiny_model(folder.name).after_load
    if after_load is not None:
        after_load(pipeline)
    return pipeline


def run_unsplit(folder: Path, arguments: dict[str, Any], seed: int, dtype: torch.dtype | None = None) -> list[Any]:
    """The truth: what the whole pipeline returns, as the leaves of its output (tensors, numbers, None)."""
    return call(load_unsplit(folder, dtype), arguments, seed)


def call(pipeline: Any, arguments: dict[str, Any], seed: int) -> list[Any]:
    """Call a pipeline as every comparison does: the global and the request's generator start at `seed`."""
    torch.manual_seed(seed)
    generator = torch.Generator("cpu").manual_seed(seed)
    if isinstance(pipeline, ModularPipeline):
        return modular.call_modular(pipeline, arguments, generator)
    with torch.no_grad():
        output = pipeline(**arguments, generator=generator, output_type="pt")
    return torch.utils._pytree.tree_leaves(dict(output))


@cache
def _request(name: str) -> dict[str, Any]:
    _, request = tiny_model(name).build()
    return request


def _rename_unless_there(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError:
        if not target.exists():
            raise
        shutil.rmtree(folder)
