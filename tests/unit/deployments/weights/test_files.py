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
    S3_WEIGHTS,
    TRANSFORMERS_FILES,
    FileNames,
    form_in,
    open_weight_file,
    read_json,
    stored_form,
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
    with pytest.raises(CheckpointError, match=r"^it is (not a safetensors file|empty|a pointer of git-lfs)"):
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
    stem = names.safetensors[0].partition(".")[0]
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


D, T = "diffusion_pytorch_model", "model"
FORMS = {
    "plain": (DIFFUSERS_FILES, [f"{D}.safetensors"], None, (f"{D}.safetensors", None, False)),
    "plain before variants": (
        TRANSFORMERS_FILES,
        [f"{T}.safetensors", f"{T}.fp16.safetensors"],
        None,
        (f"{T}.safetensors", None, False),
    ),
    "the only variant": (DIFFUSERS_FILES, [f"{D}.fp16.safetensors"], None, (f"{D}.fp16.safetensors", "fp16", False)),
    "any name of a variant": (
        TRANSFORMERS_FILES,
        [f"{T}.non_ema.safetensors"],
        None,
        (f"{T}.non_ema.safetensors", "non_ema", False),
    ),
    "the variant asked for": (
        DIFFUSERS_FILES,
        [f"{D}.fp16.safetensors", f"{D}.safetensors"],
        "fp16",
        (f"{D}.fp16.safetensors", "fp16", False),
    ),
    "one of two variants": (
        DIFFUSERS_FILES,
        [f"{D}.fp16.safetensors", f"{D}.bf16.safetensors"],
        "bf16",
        (f"{D}.bf16.safetensors", "bf16", False),
    ),
    "a component without the variant": (
        DIFFUSERS_FILES,
        [f"{D}.safetensors"],
        "fp16",
        (f"{D}.safetensors", None, False),
    ),
    "shards of a variant": (
        TRANSFORMERS_FILES,
        [f"{T}.safetensors.index.fp16.json", f"{T}.fp16-00001-of-00002.safetensors"],
        None,
        (f"{T}.safetensors.index.fp16.json", "fp16", False),
    ),
    "pickled": (DIFFUSERS_FILES, [f"{D}.bin"], None, (f"{D}.bin", None, True)),
    "pickled variant": (TRANSFORMERS_FILES, ["pytorch_model.fp16.bin"], None, ("pytorch_model.fp16.bin", "fp16", True)),
    "pickled shards": (
        TRANSFORMERS_FILES,
        ["pytorch_model.bin.index.json"],
        None,
        ("pytorch_model.bin.index.json", None, True),
    ),
    "safetensors before pickled": (
        TRANSFORMERS_FILES,
        ["pytorch_model.bin", f"{T}.fp16.safetensors"],
        None,
        (f"{T}.fp16.safetensors", "fp16", False),
    ),
    "the other library's": (DIFFUSERS_FILES, [f"{T}.safetensors", f"{D}-00001-of-00002.safetensors"], None, None),
}


@pytest.mark.parametrize("case", FORMS)
def test_the_form_that_is_read_is_told_from_the_names_of_the_files(case: str) -> None:
    names, here, variant, expected = FORMS[case]
    form = stored_form(names, here, variant)
    assert (form and (form.name, form.variant, form.is_pickled)) == expected


@pytest.mark.parametrize(
    ("here", "variant", "sentence"),
    [
        (("fp16", "bf16"), None, "only in the variants bf16, fp16: choose one of them with `variant:`"),
        (("fp16",), "fp8", "only in the variants fp16, not in 'fp8'"),
    ],
)
def test_a_choice_of_variants_is_left_to_the_user(
    here: tuple[str, ...], variant: str | None, sentence: str, tmp_path: Path
) -> None:
    for name in here:
        (tmp_path / f"model.{name}.safetensors").write_bytes(WHOLE)
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        form_in(TRANSFORMERS_FILES, tmp_path, variant)
    assert str(refusal.value).startswith(str(tmp_path))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"


def test_a_pointer_of_git_lfs_is_told_from_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is a pointer of git-lfs.*git lfs pull"):
        weight_files(TRANSFORMERS_FILES, tmp_path)
    (tmp_path / "config.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"config\.json is a pointer of git-lfs"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "names the file gone.safetensors, which is not there"),
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ([], "must hold a JSON object"),
    ],
)
def test_an_index_that_leads_nowhere_is_refused_by_its_name(index: object, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=sentence) as refusal:
        weight_files(TRANSFORMERS_FILES, tmp_path)
    assert str(refusal.value).startswith(str(file))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"\xef\xbb\xbf{}", "begins with a byte order mark: save it as UTF-8 without one"),
        (b"{", "it is no JSON"),
        (b"", "it is empty"),
        (b"[" * 100_000, "it is no JSON"),
        (b"\xff\xfe\xfd", "it is no JSON"),
        (None, "it is not there"),
    ],
)
def test_a_json_file_that_cannot_be_read_is_named_with_the_cause(
    data: bytes | None, sentence: str, tmp_path: Path
) -> None:
    if data is not None:
        (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"config\.json .*{sentence}"):
        read_json(tmp_path / "config.json")


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
