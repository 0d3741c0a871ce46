"""The pipeline classes that diffusers exports, and the families that people look for by name."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# The base classes, what only finds a class, and what runs without torch.
NO_PIPELINE = re.compile(r"^(Diffusion|Modular)Pipeline$|^AutoPipeline|Onnx|PipelineOutput$")
PIPELINES_BY_ANOTHER_NAME = frozenset({"SanaWMLTX2Refiner"})

# The longest beginning of a class's name -> its family. Classes of no family here are in the long table alone.
FAMILIES = {
    "AnimateDiff": "AnimateDiff",
    "AudioLDM2": "AudioLDM 2",
    "AuraFlow": "AuraFlow",
    "AceStep": "ACE-Step",
    "BriaFibo": "Bria Fibo",
    "Chroma": "Chroma",
    "CogVideoX": "CogVideoX",
    "CogView": "CogView",
    "Cosmos": "Cosmos",
    "EasyAnimate": "EasyAnimate",
    "Flux": "FLUX.1",
    "Flux2": "FLUX.2",
    "Flux3": "FLUX.3",
    "GlmImage": "GLM-Image",
    "HiDream": "HiDream",
    "HunyuanDiT": "HunyuanDiT",
    "HunyuanImage": "HunyuanImage",
    "HunyuanVideo": "HunyuanVideo",
    "HunyuanSkyreels": "SkyReels",
    "IF": "DeepFloyd IF",
    "Kandinsky": "Kandinsky",
    "Kolors": "Kolors",
    "LTX": "LTX-Video",
    "LTX2": "LTX-2",
    "LatentConsistencyModel": "Latent Consistency",
    "LongCat": "LongCat",
    "Lumina": "Lumina",
    "Marigold": "Marigold",
    "Mochi": "Mochi 1",
    "OmniGen": "OmniGen",
    "PRX": "PRX",
    "PixArt": "PixArt",
    "QwenImage": "Qwen-Image",
    "Sana": "Sana",
    "SkyReelsV2": "SkyReels",
    "StableAudio": "Stable Audio",
    "StableCascade": "Stable Cascade",
    "StableDiffusion": "Stable Diffusion 1 and 2",
    "StableDiffusion3": "Stable Diffusion 3",
    "StableDiffusionXL": "SDXL",
    "StableVideoDiffusion": "Stable Video Diffusion",
    "Wan": "Wan",
    "ZImage": "Z-Image",
}


def exported_pipelines() -> list[str]:
    """Names of the installed diffusers, read from its `__init__.py`: nothing is imported."""
    return _names("pipelines")


def exported_modular_pipelines() -> list[str]:
    """The same of pipelines that are made of blocks."""
    return [name for name in _names("modular_pipelines") if is_modular(name)]


def is_modular(name: str) -> bool:
    return name.endswith("ModularPipeline")


def family_of(class_name: str) -> str | None:
    beginnings = [each for each in FAMILIES if class_name.startswith(each)]
    return FAMILIES[max(beginnings, key=len)] if beginnings else None


def exported_class(pipeline_class: Any) -> Any:
    """The class itself, or the exported one that a test's own class builds on."""
    import diffusers

    found = (each for each in pipeline_class.__mro__ if getattr(diffusers, each.__name__, None) is each)
    return next(found, pipeline_class)


def _names(part: str) -> list[str]:
    """What `_import_structure[part]` gets, wherever the file says it."""
    spec = find_spec("diffusers")
    assert spec is not None
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_part(node.func, part):
            names |= {each.value for each in ast.walk(node) if _is_word(each)} - {part}
        if isinstance(node, ast.Assign) and _is_subscript(node.targets[0], part):
            names |= {each.value for each in ast.walk(node.value) if _is_word(each)}
    return sorted(name for name in names if _is_pipeline(name))


def _is_part(function: ast.expr, part: str) -> bool:
    """`_import_structure[part].extend` or `.append`."""
    return isinstance(function, ast.Attribute) and _is_subscript(function.value, part)


def _is_subscript(node: ast.expr, part: str) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == part


def _is_word(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_pipeline(name: str) -> bool:
    return name in PIPELINES_BY_ANOTHER_NAME or ("Pipeline" in name and not NO_PIPELINE.search(name))
