"""`precision` in the arguments is checked before anything is loaded, and files that are here get their whole paths."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.app import AppArgs, model_args


def args(precision: object) -> AppArgs:
    return AppArgs.model_validate({"model": "nowhere/flux", "precision": precision})


@pytest.mark.parametrize(
    "precision",
    [None, "fp8", {"transformer": "int8", "text_encoder_2": "nf4"}, "owner/repository/file.gguf", {"vae": "fp32"}],
)
def test_what_is_asked_for_reaches_every_stage(precision: object) -> None:
    assert model_args(args(precision)).precision == precision


@pytest.mark.parametrize("precision", ["int7", {"transformer": "float8"}])
def test_an_unknown_word_is_refused_with_the_words_that_there_are(precision: object) -> None:
    with pytest.raises(ValidationError, match=r"must be one of bf16, fp16, .*layerwise, or the address of a \.gguf"):
        args(precision)


def test_a_file_that_is_here_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flux.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    assert model_args(args("flux.gguf")).precision == str(tmp_path / "flux.gguf")
    found = model_args(args({"transformer": "flux.gguf", "vae": "fp32"})).precision
    assert found == {"transformer": str(tmp_path / "flux.gguf"), "vae": "fp32"}
