"""Refuses a checkpoint that lacks what from_pretrained would invent in silence: words, settings, schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import transformers
from diffusers import ConfigMixin, ModelMixin
from transformers import FeatureExtractionMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

from deployments.errors import CheckpointError
from deployments.weights.files import read_object, refuse_lfs_pointer

LARGEST_POINTER = 1024  # bytes; git-lfs allows no larger one
WORDS = ("cat", "dog", "red", "seven", "a", "of")  # a tokenizer tells at least two of them apart


@dataclass(frozen=True)
class Kind:
    """What a component of these classes needs in its folder, beside weights."""

    classes: tuple[type, ...]
    check: Callable[[Path, Any], None]  # raises CheckpointError, naming folder and file


def check_complete(folder: Path, classes: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a component whose settings or vocabulary are missing or empty, by file and folder."""
    for name, cls in classes.items():
        if not (folder / name).is_dir():
            raise CheckpointError(
                f"model_index.json names {name}, but the folder {folder / name} is not there: fetch it"
            )
        refuse_pointers(folder / name)
        check_of(cls)(folder / name, cls)


def check_tokenizers(pipeline: Any, folder: Path) -> None:
    """Raises CheckpointError for a loaded tokenizer to which different words are the same."""
    for name, component in pipeline.components.items():
        tokenizer = getattr(component, "tokenizer", component)
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            tokens = {token for word in WORDS for token in tokenizer(word, add_special_tokens=False).input_ids}
            if len(tokens) <= 1:
                raise CheckpointError(
                    f"the tokenizer in {folder / name} makes the same tokens of different words: its files are not "
                    "whole, fetch them again"
                )


def check_of(cls: Any) -> Callable[[Path, Any], None]:
    for kind in KINDS:
        if isinstance(cls, type) and issubclass(cls, kind.classes):
            return kind.check
    return check_tokenizer if getattr(cls, "__name__", "") == "AutoTokenizer" else check_any_settings


def check_model(folder: Path, cls: Any) -> None:
    settings(folder / "config.json")


def check_settings(folder: Path, cls: Any) -> None:
    settings(folder / cls.config_name)


def check_tokenizer(folder: Path, cls: Any) -> None:
    """Its settings (lengths, special tokens) and one of the forms in which it may have its vocabulary."""
    named = settings(folder / "tokenizer_config.json").get("tokenizer_class")
    if getattr(cls, "vocab_files_names", None) is None:  # AutoTokenizer
        cls = getattr(transformers, str(named), transformers.PreTrainedTokenizerFast)
    if (folder / "tokenizer.json").is_file():
        if not holds_words(settings(folder / "tokenizer.json")):
            raise CheckpointError(f"{folder / 'tokenizer.json'} has no vocabulary: fetch it again")
        return
    if any(path.stat().st_size for path in (*folder.glob("*.model"), *folder.glob("tekken.json"))):
        return
    for key, name in cls.vocab_files_names.items():
        if key != "tokenizer_file":
            refuse_without_words(folder / name)
    if set(cls.vocab_files_names) == {"tokenizer_file"}:
        settings(folder / "tokenizer.json")


def holds_words(tokenizer: Mapping[str, Any]) -> bool:
    model = tokenizer.get("model")
    return isinstance(model, dict) and bool(model.get("vocab"))


def refuse_without_words(file: Path) -> None:
    if file.suffix == ".json":
        settings(file)
        return
    if not file.is_file():
        raise CheckpointError(missing(file))
    lines = file.read_bytes().splitlines()
    if not any(line.strip() and not line.startswith(b"#version") for line in lines):
        raise CheckpointError(f"{file} is empty: fetch it again")


def check_preprocessor(folder: Path, cls: Any) -> None:
    """An image processor or feature extractor: its own file, or its part of the file that processors share."""
    shared = folder / "processor_config.json"
    if (folder / "preprocessor_config.json").is_file() or not shared.is_file():
        settings(folder / "preprocessor_config.json")
    elif not any(settings(shared).get(part) for part in ("image_processor", "feature_extractor", "video_processor")):
        raise CheckpointError(f"{shared} has no image_processor, and {missing(folder / 'preprocessor_config.json')}")


def check_processor(folder: Path, cls: Any) -> None:
    parts = signature(cls.__init__).parameters
    if "image_processor" in parts or "feature_extractor" in parts:
        check_preprocessor(folder, cls)
    if "tokenizer" in parts:
        check_tokenizer(folder, transformers.PreTrainedTokenizerFast)


def check_any_settings(folder: Path, cls: Any) -> None:
    files = sorted(folder.glob("*.json"))
    if not files:
        raise CheckpointError(f"{folder} holds no configuration (*.json): fetch the folder again")
    for file in files:
        settings(file)


KINDS = (
    Kind((ModelMixin, PreTrainedModel), check_model),
    Kind((ConfigMixin,), check_settings),  # schedulers, guiders
    Kind((PreTrainedTokenizerBase,), check_tokenizer),
    Kind((ProcessorMixin,), check_processor),
    Kind((ImageProcessingMixin, FeatureExtractionMixin), check_preprocessor),
)


def settings(file: Path) -> dict[str, Any]:
    """The JSON object of a file that must be there and say something. Raises CheckpointError."""
    if not file.is_file():
        raise CheckpointError(missing(file))
    found = read_object(file)
    if not found:
        raise CheckpointError(f"{file} is empty ({{}}): defaults would be made up for all of it. Fetch it again")
    return found


def missing(file: Path) -> str:
    return f"{file.name} is not in {file.parent}: fetch it, or the whole folder"


def refuse_pointers(folder: Path) -> None:
    for file in folder.iterdir():
        if file.is_file() and file.stat().st_size <= LARGEST_POINTER:
            refuse_lfs_pointer(file)
