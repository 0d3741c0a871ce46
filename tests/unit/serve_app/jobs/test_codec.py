"""Stored requests and checkpoints of this version, of others and damaged ones: read as far as they are good."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.messages import Checkpoint, GenerationRequest, InputImage, OutputFormat, Packed, RequestWarning
from serve_app.jobs.codec import (
    VERSION,
    Asked,
    UnreadableRowError,
    asked_from_json,
    checkpoint_from_bytes,
    checkpoint_to_bytes,
    previews_from_json,
    requests_from_json,
    requests_to_json,
)

ROWS = Path(__file__).with_name("rows")  # as each version wrote them
PNG, JPEG = InputImage(b"png"), InputImage(b"jpeg")
PICTURES = [PNG.data, JPEG.data]
REQUESTS = [
    GenerationRequest(
        "job_1",
        "flux",
        {"prompt": ["a", "b"], "image": PNG, "references": [PNG, JPEG], "scale": 1.5, "flag": None},
        2**61,
        OutputFormat("image", "webp", 80),
        deterministic=True,
        deadline_s=30.0,
        features={"cache_dit": {"enable": True, "residual_diff_threshold": 0.2}},
    ),
    GenerationRequest("job_2", "wan", {"prompt": "a cat"}, 7, OutputFormat("video", "mp4", None, 24.0)),
]
PREVIEWS = {0: [2, 0], 1: [2, 2]}  # by the version of the file
BUFFERS = (np.arange(7, dtype=np.uint8), np.empty(0, np.uint8), np.arange(40, dtype=np.uint8))
CHECKPOINT = Checkpoint("job_1", 3, "print", "digest", Packed({"kind": "dict", "names": ["x"], "n": [1.5]}, BUFFERS))

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
unhurried = settings(deadline=None)  # a busy machine is no fault of the codec
versions = pytest.mark.parametrize("version", [0, VERSION])


def rows_of(version: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ROWS / f"requests_v{version}.json").read_text())
    return rows


def file_of(version: int) -> bytes:
    return (ROWS / f"checkpoint_v{version}.bin").read_bytes()


def is_whole(checkpoint: Checkpoint | None) -> bool:
    """Checkpoints hold arrays, which have no simple equality."""
    return (
        checkpoint is not None
        and (checkpoint.request_id, checkpoint.step, checkpoint.fingerprint) == ("job_1", 3, "print")
        and (checkpoint.digest, checkpoint.content.tree) == ("digest", CHECKPOINT.content.tree)
        and [buffer.tobytes() for buffer in checkpoint.content.buffers] == [buffer.tobytes() for buffer in BUFFERS]
    )


# --- requests ---


@versions
def test_a_row_that_a_version_wrote_is_read(version: int) -> None:
    rows = rows_of(version)
    background = "opaque" if version else ""
    assert requests_from_json(rows, PICTURES) == REQUESTS
    assert previews_from_json(rows) == PREVIEWS[version]
    assert asked_from_json(rows) == Asked("flux", 2**61, "webp", background)


def test_the_file_of_this_version_is_what_it_writes() -> None:
    rows, pictures = requests_to_json(REQUESTS, previews=2)
    assert (json.loads(json.dumps(rows)), pictures) == (rows_of(VERSION), PICTURES)


def test_a_request_that_a_caller_dressed_up_as_a_picture_stays_a_value() -> None:
    request = GenerationRequest("a", "flux", {"x": {"image": 0}}, 1, OutputFormat("image", "png"))
    rows, pictures = requests_to_json([request])
    assert requests_from_json(rows, pictures) == [request]


def test_a_row_keeps_what_is_told_in_the_answer_and_in_the_file() -> None:
    dropped, unchecked = RequestWarning("no_effect", "size", "x"), RequestWarning("not_checked", None, "y")
    output = OutputFormat("image", "png", bit_depth=16)
    request = GenerationRequest("a", "m", {}, 1, output, warnings=(dropped, unchecked), left_out=(dropped,))
    rows, pictures = requests_to_json([request])
    assert requests_from_json(json.loads(json.dumps(rows)), pictures) == [request]


def test_a_row_of_a_newer_version_is_read_as_far_as_its_fields_are_known(caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of(VERSION)
    rows[0]["version"] = VERSION + 1
    rows[0]["priority"] = 3
    rows[0]["work"]["upscale"] = {"factor": 2}
    rows[0]["work"]["output"]["depth"] = 16
    assert requests_from_json(rows, PICTURES) == REQUESTS
    for told in ("version 2", "priority", "upscale", "depth"):
        assert told in caplog.text


@pytest.mark.parametrize("name", ["deterministic", "deadline_s", "features"])
def test_a_missing_field_takes_its_default(name: str) -> None:
    rows = rows_of(VERSION)
    del rows[0]["work"][name]
    default = getattr(GenerationRequest("", "", {}, 0, OutputFormat("image", "png")), name)
    assert requests_from_json(rows, PICTURES)[0] == GenerationRequest(**vars(REQUESTS[0]) | {name: default})


@pytest.mark.parametrize("name", ["request_id", "model", "arguments", "seed", "output"])
def test_a_row_without_what_no_default_can_stand_for_is_unreadable_and_says_why(name: str) -> None:
    rows = rows_of(VERSION)
    del rows[0]["work"][name]
    with pytest.raises(UnreadableRowError, match=f"lacks {name}"):
        requests_from_json(rows, PICTURES)
    if name in ("model", "seed", "output"):
        assert asked_from_json(rows) == Asked()


def test_a_row_whose_picture_is_gone_is_unreadable() -> None:
    with pytest.raises(UnreadableRowError, match="no file number 1"):
        requests_from_json(rows_of(VERSION), PICTURES[:1])


@pytest.mark.parametrize("rows", [None, [], {}, [None], [[]], ["row"], [{}]])
def test_what_is_no_row_is_unreadable(rows: Any) -> None:
    with pytest.raises(UnreadableRowError):
        requests_from_json(rows, PICTURES)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every field in it."""
    if isinstance(value, dict | list):
        for name in value if isinstance(value, dict) else range(len(value)):
            yield (*path, name)
            yield from places(value[name], (*path, name))


def owner_of(rows: Any, path: tuple[Any, ...]) -> Any:
    for name in path[:-1]:
        rows = rows[name]
    return rows


def read_or_unreadable(rows: Any) -> None:
    """Nothing else may come of reading."""
    assert isinstance(asked_from_json(rows), Asked)
    try:
        requests = requests_from_json(rows, PICTURES)
        assert all(isinstance(number, int) for number in previews_from_json(rows))
    except UnreadableRowError:
        return
    assert all(isinstance(request, GenerationRequest) for request in requests)


@versions
@unhurried
@given(data=st.data())
def test_a_row_with_any_field_added_is_read_the_same(version: int, data: st.DataObject) -> None:
    rows = rows_of(version)
    work = rows[0] if version == 0 else rows[0]["work"]
    known = {*work, *rows[0], "version", "work", "features"}
    where = data.draw(st.sampled_from([rows[0], work]))
    where[data.draw(st.text().filter(lambda name: name not in known))] = data.draw(JSON_VALUES)
    logging.disable()
    try:
        assert requests_from_json(rows, PICTURES) == REQUESTS
    finally:
        logging.disable(logging.NOTSET)


@versions
@unhurried
@given(data=st.data())
def test_a_row_with_any_field_removed_is_read_or_refused_by_name(version: int, data: st.DataObject) -> None:
    rows = rows_of(version)
    path = data.draw(st.sampled_from(list(places(rows))))
    del owner_of(rows, path)[path[-1]]
    read_or_unreadable(rows)


@versions
@unhurried
@given(data=st.data())
def test_a_row_with_any_field_changed_is_read_or_refused_by_name(version: int, data: st.DataObject) -> None:
    rows = rows_of(version)
    path = data.draw(st.sampled_from(list(places(rows))))
    owner_of(copy.copy(rows), path)[path[-1]] = data.draw(JSON_VALUES)
    read_or_unreadable(rows)


@versions
@unhurried
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_a_row_with_any_bit_flipped_is_read_or_refused_by_name(version: int, place: int, bit: int) -> None:
    text = bytearray(json.dumps(rows_of(version)).encode())
    text[place % len(text)] ^= 1 << bit
    try:
        rows = json.loads(text)
    except ValueError:
        return  # the database reads it as nothing: test_store
    read_or_unreadable(rows)


# --- checkpoints ---


def test_a_checkpoint_of_this_version_is_read() -> None:
    assert is_whole(checkpoint_from_bytes(file_of(VERSION)))


def test_a_checkpoint_of_the_unversioned_format_means_start_again(caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint_from_bytes(file_of(0)) is None
    assert "its request starts again: it is of version 0" in caplog.text


def test_the_checkpoint_file_of_this_version_is_what_it_writes() -> None:
    assert checkpoint_to_bytes(CHECKPOINT) == file_of(VERSION)


def test_a_checkpoint_of_a_newer_version_means_start_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("serve_app.jobs.codec.VERSION", VERSION + 1)
    newer = checkpoint_to_bytes(CHECKPOINT)
    monkeypatch.undo()
    assert checkpoint_from_bytes(newer) is None
    assert "its request starts again: it is of version 2" in caplog.text


def test_a_cut_checkpoint_means_start_again() -> None:
    data = file_of(VERSION)
    assert [length for length in range(len(data)) if checkpoint_from_bytes(data[:length]) is not None] == []
    assert checkpoint_from_bytes(data + b"\0") is None


@unhurried
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_a_checkpoint_with_any_bit_flipped_means_start_again(place: int, bit: int) -> None:
    data = bytearray(file_of(VERSION))
    data[place % len(data)] ^= 1 << bit
    assert checkpoint_from_bytes(bytes(data)) is None


@unhurried
@given(data=st.binary())
def test_bytes_that_are_no_checkpoint_mean_start_again(data: bytes) -> None:
    assert checkpoint_from_bytes(data) is None
