"""Two components are one only where every setting and every number of their files is the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from deployments.weights.files import TRANSFORMERS_FILES
from deployments.weights.shared import same_files
from deployments.weights.shared.same_files import Stored, difference

CONFIG = {"d_model": 4, "_name_or_path": "a", "transformers_version": "5.0", "vision": {"_name_or_path": "b", "d": 1}}
WEIGHTS = {name: np.arange(12, dtype=np.float32).reshape(3, 4) + n for n, name in enumerate(("w", "x", "y"))}


def component(
    folder: Path, config: Mapping[str, Any] = CONFIG, weights: Mapping[str, Any] = WEIGHTS, shards: int = 1
) -> Stored:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors")
    else:
        names = {name: f"model-{n + 1}-of-{shards}.safetensors" for n, name in enumerate(weights)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        for name, file in names.items():
            save_file({name: weights[name]}, folder / file)
    return Stored(folder, TRANSFORMERS_FILES)


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"config": CONFIG | {"_name_or_path": "c", "transformers_version": "4.9", "vision": {"d": 1}}},
        {"shards": 3},
        {"weights": dict(reversed(WEIGHTS.items()))},
    ],
    ids=["a copy", "from elsewhere", "in shards", "in another order"],
)
def test_what_has_the_same_settings_and_numbers_is_one(tmp_path: Path, other: dict[str, Any]) -> None:
    assert difference(component(tmp_path / "a"), component(tmp_path / "b", **other)) is None


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"config": CONFIG | {"d_model": 5}}, "its config.json says otherwise"),
        ({"config": CONFIG | {"vision": {"d": 2}}}, "its config.json says otherwise"),
        ({"config": CONFIG | {"torch_dtype": "float16"}}, "its config.json says otherwise"),
        ({"weights": {"w": WEIGHTS["w"], "x": WEIGHTS["x"]}}, "its weights are others, such as y"),
        ({"weights": WEIGHTS | {"y": WEIGHTS["y"].astype(np.float16)}}, "its y is F32 [3, 4], not F16 [3, 4]"),
        ({"weights": WEIGHTS | {"y": WEIGHTS["y"].reshape(4, 3)}}, "its y is F32 [3, 4], not F32 [4, 3]"),
        ({"weights": WEIGHTS | {"x": np.nextafter(WEIGHTS["x"], np.float32(9))}}, "its x has other numbers"),
        ({"weights": WEIGHTS | {"x": -0.0 * WEIGHTS["x"]}}, "its x has other numbers"),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_what_differs_anywhere_is_another(tmp_path: Path, other: dict[str, Any], told: str, shards: int) -> None:
    if len(other.get("weights", WEIGHTS)) < shards:
        shards = 2
    assert difference(component(tmp_path / "a"), component(tmp_path / "b", **other, shards=shards)) == told


def test_another_file_of_settings_tells_two_apart(tmp_path: Path) -> None:
    one, other = component(tmp_path / "a"), component(tmp_path / "b")
    (other.folder / "generation_config.json").write_text('{"max_length": 7}')
    assert difference(one, other) == "its generation_config.json says otherwise"


def test_the_dtype_of_a_configuration_does_not_count_where_another_is_chosen(tmp_path: Path) -> None:
    one = component(tmp_path / "a", CONFIG | {"dtype": "float32"})
    other = component(tmp_path / "b", CONFIG | {"torch_dtype": "float32"})
    assert difference(one, other) == "its config.json says otherwise"
    assert difference(one, other, is_dtype_chosen=True) is None


def test_links_to_one_file_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = component(tmp_path / "a"), component(tmp_path / "b")
    (other.folder / "model.safetensors").unlink()
    (other.folder / "model.safetensors").symlink_to(one.folder / "model.safetensors")

    def never(*_: Any) -> bool:
        raise AssertionError

    monkeypatch.setattr(same_files, "same_blocks", never)
    assert difference(one, other) is None


def test_numbers_are_read_to_the_first_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_files, "BLOCK", 8)
    read: list[int] = []
    reader = b"abcdefghijklmnopqrst".__getitem__

    def part(start: int, length: int) -> bytes:
        read.append(start)
        return reader(slice(start, start + length))

    def other(start: int, length: int) -> bytes:
        return b"abcdefghiXklmnopqrst"[start : start + length]

    assert not same_files.same_blocks(part, 0, other, 0, 20)
    assert read == [0, 8]
    assert same_files.same_blocks(part, 16, other, 16, 4)


def test_a_gguf_file_counts_in_place_of_the_own_weights(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.gguf", "b.gguf", "c.gguf")]
    for file, content in zip(files, (b"12345", b"12345", b"12346"), strict=True):
        file.write_bytes(content)
    stored = [Stored(component(tmp_path / file.stem).folder, TRANSFORMERS_FILES, None, str(file)) for file in files]
    assert difference(stored[0], stored[1]) is None
    assert difference(stored[0], stored[2]) == "its weights are others"
    assert difference(stored[0], Stored(stored[0].folder, TRANSFORMERS_FILES)) == "its weights are others"
