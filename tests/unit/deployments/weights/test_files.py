"""Files of weights are read by their headers alone, and a file that is not whole is refused by its name."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from deployments.errors import CheckpointError
from deployments.weights.files import (
    DIFFUSERS_FILES,
    FILE_NAMES,
    S3_WEIGHTS,
    TRANSFORMERS_FILES,
    FileNames,
    open_weight_file,
    weight_files,
)
from deployments.weights.s3 import RangeReader

TENSORS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.bias": np.ones(5, dtype=np.float16)}
WHOLE = save(TENSORS)


def kept_in_memory(data: bytes) -> Callable[[str], tuple[RangeReader, int]]:
    def read(start: int, length: int) -> bytes:
        return data[start : start + length]

    return lambda location: (read, len(data))


@given(st.integers(1, len(WHOLE)))
def test_a_file_cut_anywhere_is_refused_by_its_name(missing: int) -> None:
    with pytest.raises(CheckpointError, match=r"^s3://bucket/a\.safetensors "):
        open_weight_file("s3://bucket/a.safetensors", kept_in_memory(WHOLE[:-missing]))


@given(st.binary(min_size=1, max_size=50))
def test_a_file_with_bytes_too_many_is_refused_by_its_name(extra: bytes) -> None:
    with pytest.raises(
        CheckpointError, match=rf"^it has {len(WHOLE + extra)} bytes, its header declares {len(WHOLE)}$"
    ):
        open_weight_file("it", kept_in_memory(WHOLE + extra))


@given(st.binary(max_size=200))
def test_bytes_that_are_no_safetensors_file_are_refused_by_their_name(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^it is not a safetensors file"):
        open_weight_file("it", kept_in_memory(data))


@pytest.mark.parametrize("header", ["1", "[1]", "null", '"a"', '{"a": 1}', '{"a": {}}', '{"a": {"data_offsets": []}}'])
def test_a_header_that_describes_no_tensors_is_refused(header: str) -> None:
    data = struct.pack("<Q", len(header)) + header.encode()
    with pytest.raises(CheckpointError, match=r"^it is not a safetensors file"):
        open_weight_file("it", kept_in_memory(data))


def test_the_header_says_where_each_tensor_lies() -> None:
    file = open_weight_file("it", kept_in_memory(WHOLE))
    assert file.entries.keys() == TENSORS.keys()
    for name, entry in file.entries.items():
        start, end = entry["data_offsets"]
        assert file.read(file.data_start + start, end - start) == TENSORS[name].tobytes()


def test_a_file_without_tensors_is_whole() -> None:
    assert open_weight_file("it", kept_in_memory(save({}))).entries == {}


@pytest.mark.parametrize(
    ("names", "present", "chosen"),
    [
        (DIFFUSERS_FILES, ("index", "single"), "index"),
        (TRANSFORMERS_FILES, ("index", "single"), "single"),
        (DIFFUSERS_FILES, ("single",), "single"),
        (TRANSFORMERS_FILES, ("index",), "index"),
    ],
)
def test_of_an_index_and_a_single_file_the_librarys_own_choice_is_read(
    names: FileNames, present: tuple[str, ...], chosen: str, tmp_path: Path
) -> None:
    stem = names.shards.partition("-")[0]
    if "single" in present:
        (tmp_path / f"{stem}.safetensors").write_bytes(save({"single": np.zeros(1)}))
    if "index" in present:
        shards = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        for shard in shards:
            (tmp_path / shard).write_bytes(save({f"index in {shard}": np.zeros(1)}))
        index = {"weight_map": {f"index in {shard}": shard for shard in shards}}
        (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))

    found = weight_files(names, tmp_path)

    assert found.is_sharded == (chosen == "index")
    assert {name.partition(" ")[0] for name in found.names} == {chosen}
    assert not found.is_s3


def test_every_library_finds_its_single_file_and_its_shards_by_pattern() -> None:
    for names in FILE_NAMES:
        assert len(names.patterns) == 2
        assert all(pattern.endswith(".safetensors") for pattern in names.patterns)


def test_ranges_are_read_from_a_file_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE)
    (file,) = weight_files(TRANSFORMERS_FILES, tmp_path).files
    start, end = file.entries["b.bias"]["data_offsets"]
    assert file.location == str(path)
    assert file.read(file.data_start + start, end - start) == load_file(path)["b.bias"].tobytes()


def test_a_folder_without_weights_names_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds none of model\.safetensors, model\.safetensors\.index\.json"):
        weight_files(TRANSFORMERS_FILES, tmp_path)


def test_a_damaged_note_of_weights_in_s3_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / S3_WEIGHTS).write_text("{")
    with pytest.raises(CheckpointError, match=rf"{S3_WEIGHTS} cannot be read"):
        weight_files(TRANSFORMERS_FILES, tmp_path)
