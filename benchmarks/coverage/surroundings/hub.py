"""What the tests take from the hub, made here at random: tiny tokenizers, processors and models by repository id.

After `install` every `from_pretrained` of transformers and diffusers takes a known repository id for a folder, which is
made at its first use. Other ids go on to the library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Make = Callable[[Path], None]
REPOSITORIES: dict[str, Make] = {}


def repository(*names: str) -> Callable[[Make], Make]:
    """The function makes the content of these repositories in a folder."""

    def register(make: Make) -> Make:
        REPOSITORIES.update(dict.fromkeys(names, make))
        return make

    return register


def install(root: Path) -> None:
    """Each repository is a folder below `root`."""
    import diffusers
    import transformers
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from benchmarks.coverage.surroundings import pipelines, text_models, vision_models  # noqa: F401  (they register)

    for cls in (
        diffusers.DiffusionPipeline,
        diffusers.ModelMixin,
        transformers.AutoConfig,
        transformers.AutoFeatureExtractor,
        transformers.AutoImageProcessor,
        transformers.AutoModel,
        transformers.AutoProcessor,
        transformers.AutoTokenizer,
        transformers.PreTrainedConfig,
        transformers.PreTrainedModel,
        transformers.ProcessorMixin,
        FeatureExtractionMixin,
        ImageProcessingMixin,
        PreTrainedTokenizerBase,
    ):
        _redirect(cls, root)


def _redirect(cls: Any, root: Path) -> None:
    original = cls.__dict__["from_pretrained"].__func__

    def from_pretrained(klass: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        return original(klass, _folder_of(name, root), *args, **kwargs)

    cls.from_pretrained = classmethod(from_pretrained)


def _folder_of(name: Any, root: Path) -> Any:
    if not isinstance(name, str) or name not in REPOSITORIES:
        return name
    folder = root / name.replace("/", "--")
    if not (folder / ".made").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            REPOSITORIES[name](folder)
        (folder / ".made").touch()
    return str(folder)
