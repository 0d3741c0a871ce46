"""`vae` and `offload` are read strictly: a wrong setting is refused by its name."""

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from deployments.memory.args import OffloadArgs, TileRanksArgs
from serve_app.app import AppArgs, model_args


def app_args(text: str) -> AppArgs:
    return AppArgs.model_validate({"model": "m", **yaml.safe_load(text)})


def test_on_and_off_are_what_yaml_reads_as_true_and_false() -> None:
    args = model_args(app_args("vae: {tiling: on, slicing: off}")).vae
    assert (args.tiling, args.slicing) == ("on", "off")


def test_a_number_of_ranks_alone_has_the_defaults() -> None:
    ranks = model_args(app_args("vae: {tiling: on, parallel: 3}")).vae.parallel
    assert ranks == TileRanksArgs(ranks=3)


def test_a_kind_alone_has_the_defaults() -> None:
    args = model_args(app_args("offload: {text_encoder: model, transformer: {kind: group, level: leaf}}")).offload
    assert args == {
        "text_encoder": OffloadArgs(kind="model"),
        "transformer": OffloadArgs(kind="group", level="leaf"),
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("vae: {tiling: always}", "vae.tiling"),
        ("vae: {tilling: on}", "vae.tilling"),
        ("vae: {memory_format: last}", "vae.memory_format"),
        ("vae: {dtype: int8}", "vae.dtype"),
        ("vae: {tile: {tile_sample_min_height: 0}}", "tile_sample_min_height must be a number above 0, got 0"),
        ("vae: {tile: {tile_sample_min_height: true}}", "vae.tile.tile_sample_min_height"),
        ("vae: {tiling: off, tile: {tile_sample_min_height: 8}}", "sizes of tiles were given, and tiling is off"),
        ("vae: {parallel: 2}", "parallel: 2 shares out tiles, and tiling is auto: set `tiling: on`"),
        ("vae: {tiling: off, parallel: 2}", "shares out tiles, and tiling is off"),
        ("vae: {tiling: on, parallel: 1}", "greater than or equal to 2"),
        ("vae: {tiling: on, parallel: true}", "vae.parallel"),
        ("vae: {tiling: on, parallel: {ranks: 2, silence_timeout_s: 1}}", "silence_timeout_s"),
        (
            "{placement: one_stage, parallel: {batch: 2}, vae: {tiling: on, parallel: 2}}",
            "parallel and vae.parallel are two groups of ranks",
        ),
        ("offload: {transformer: disk}", "'group' or 'model'"),
        ("offload: {transformer: {kind: model, stream: on}}", "stream: only for kind: group"),
        ("offload: {transformer: {kind: group, level: leaf, blocks_per_group: 2}}", "only for level: block"),
        ("offload: {transformer: {kind: group, stream: on, blocks_per_group: 2}}", "blocks_per_group must be 1"),
        ("offload: {transformer: {kind: group, blocks_per_group: 0}}", "blocks_per_group"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(text: str, sentence: str) -> None:
    with pytest.raises(ValidationError) as refused:
        app_args(text)
    assert sentence in str(refused.value)


def test_sizes_of_tiles_may_be_fractions() -> None:
    args: Any = app_args("vae: {tile: {tile_overlap_factor: 0, tile_sample_min_size: 256}}").vae
    assert args.tile == {"tile_overlap_factor": 0, "tile_sample_min_size": 256}
