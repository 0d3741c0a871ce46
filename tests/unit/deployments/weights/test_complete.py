"""What from_pretrained would invent in silence is refused: by the name of the file and its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import ClassifierFreeGuidance
from transformers import AutoTokenizer, CLIPTokenizer, LlamaTokenizer, ProcessorMixin, T5Tokenizer
from transformers.image_processing_base import ImageProcessingMixin

from deployments.errors import CheckpointError
from deployments.stage_pipeline.roles import read_layout
from deployments.weights.complete import check_complete, check_tokenizers

EMOJI = Path(__file__).parents[4] / "checkpoints" / "emoji-flux"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The model that ships with the project, without its weights."""
    return shutil.copytree(EMOJI, tmp_path / "flux", ignore=shutil.ignore_patterns("*.safetensors"))


def check(folder: Path) -> None:
    check_complete(folder, read_layout(folder).classes)


def test_a_whole_checkpoint_passes(checkpoint: Path) -> None:
    check(checkpoint)


def remove(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink()


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": remove,
    "0 bytes": lambda file: file.write_text(""),
    "{}": lambda file: file.write_text("{}"),
    "a list": lambda file: file.write_text("[]"),
    "cut": lambda file: file.write_text('{"a": '),
    "byte order mark": lambda file: file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes()),
    "pointer of git-lfs": lambda file: file.write_text(POINTER),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "transformer/config.json",
        "vae/config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer_config.json",
        "tokenizer_2/tokenizer.json",
    ],
)
def test_a_file_of_settings_or_words_that_is_not_whole_is_refused_by_its_name(
    name: str, damage: str, checkpoint: Path
) -> None:
    for other in (checkpoint / name).parent.glob("*.model"):
        other.unlink()
    DAMAGES[damage](checkpoint / name)
    with pytest.raises(CheckpointError) as refusal:
        check(checkpoint)
    assert Path(name).name in str(refusal.value) or "spiece.model" in str(refusal.value)
    assert str((checkpoint / name).parent) in str(refusal.value)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2", "scheduler", "text_encoder", "vae"])
def test_a_folder_that_is_missing_is_refused_by_its_name(name: str, checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / name)
    with pytest.raises(CheckpointError, match=rf"{checkpoint / name} is not there"):
        check(checkpoint)


class PairProcessor(ProcessorMixin):
    def __init__(self, image_processor: Any = None, tokenizer: Any = None) -> None:
        pass


class Pictures(ImageProcessingMixin):
    pass


WORDS = json.dumps({"model": {"type": "BPE", "vocab": {"cat": 0}}})
NO_WORDS = json.dumps({"model": {"type": "BPE", "vocab": {}}})
SETTINGS = json.dumps({"model_max_length": 77})
MERGES = "#version: 0.2\nc a\n"
# (class, files, what the refusal names; None where the files are enough)
COMPONENTS: dict[str, tuple[Any, dict[str, str], str | None]] = {
    "tokenizer.json is enough": (CLIPTokenizer, {"tokenizer.json": WORDS}, None),
    "an empty vocabulary": (CLIPTokenizer, {"tokenizer.json": NO_WORDS}, "tokenizer.json"),
    "vocabulary and merges": (CLIPTokenizer, {"vocab.json": '{"cat": 0}', "merges.txt": MERGES}, None),
    "no merges": (CLIPTokenizer, {"vocab.json": '{"cat": 0}'}, "merges.txt"),
    "merges of 0 bytes": (CLIPTokenizer, {"vocab.json": '{"cat": 0}', "merges.txt": ""}, "merges.txt"),
    "merges with a heading only": (
        CLIPTokenizer,
        {"vocab.json": '{"cat": 0}', "merges.txt": "#version: 0.2\n"},
        "merges.txt",
    ),
    "no vocabulary": (CLIPTokenizer, {"merges.txt": MERGES}, "vocab.json"),
    "sentencepiece": (T5Tokenizer, {"spiece.model": "words"}, None),
    "no sentencepiece": (T5Tokenizer, {}, "spiece.model"),
    "sentencepiece of 0 bytes": (T5Tokenizer, {"spiece.model": ""}, "spiece.model"),
    "Llama without words": (LlamaTokenizer, {}, "tokenizer.model"),
    "any tokenizer": (AutoTokenizer, {"tokenizer.json": WORDS}, None),
    "any tokenizer without words": (AutoTokenizer, {}, "tokenizer.model"),
    "processor": (PairProcessor, {"tokenizer.json": WORDS, "preprocessor_config.json": SETTINGS}, None),
    "processor in one file": (
        PairProcessor,
        {"tokenizer.json": WORDS, "processor_config.json": '{"image_processor": {"size": 1}}'},
        None,
    ),
    "processor without pictures": (PairProcessor, {"tokenizer.json": WORDS}, "preprocessor_config.json"),
    "processor without its part": (
        PairProcessor,
        {"tokenizer.json": WORDS, "processor_config.json": '{"a": 1}'},
        "preprocessor_config.json",
    ),
    "processor without words": (PairProcessor, {"preprocessor_config.json": SETTINGS}, "tokenizer.model"),
    "pictures": (Pictures, {"preprocessor_config.json": SETTINGS}, None),
    "no settings of pictures": (Pictures, {}, "preprocessor_config.json"),
    "empty settings of pictures": (Pictures, {"preprocessor_config.json": "{}"}, "preprocessor_config.json"),
    "guider": (ClassifierFreeGuidance, {"guider_config.json": '{"a": 1}'}, None),
    "no guider": (ClassifierFreeGuidance, {}, "guider_config.json"),
    "an unknown kind": (object, {"anything.json": '{"a": 1}'}, None),
    "an unknown kind without settings": (object, {"tokenizer_config.json": ""}, "tokenizer_config.json"),
}


@pytest.mark.parametrize("case", COMPONENTS)
def test_each_kind_of_component_needs_its_own_files(case: str, tmp_path: Path) -> None:
    cls, files, named = COMPONENTS[case]
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(SETTINGS)
    for name, text in files.items():
        (folder / name).write_text(text)
    if named is None:
        check_complete(tmp_path, {"part": cls})
        return
    with pytest.raises(CheckpointError) as refusal:
        check_complete(tmp_path, {"part": cls})
    assert named in str(refusal.value)
    assert str(folder) in str(refusal.value)


def test_a_tokenizer_to_which_all_words_are_the_same_is_refused(tmp_path: Path) -> None:
    invented = CLIPTokenizer()
    pipeline = SimpleNamespace(components={"tokenizer": invented, "scheduler": object()})
    with pytest.raises(CheckpointError, match=rf"{tmp_path / 'tokenizer'} makes the same tokens of different words"):
        check_tokenizers(pipeline, tmp_path)
    check_tokenizers(
        SimpleNamespace(components={"tokenizer": CLIPTokenizer.from_pretrained(EMOJI / "tokenizer")}), EMOJI
    )
