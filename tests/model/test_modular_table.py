"""The page of modular pipelines has a row for each that diffusers exports, and names each tiny model."""

import re

import diffusers

from tests.support.modular_table import DOCS, class_of
from tests.support.support_table import table_in
from tests.support.tiny_models import MODULAR_MODELS


def test_the_page_has_a_row_for_every_modular_pipeline_and_names_what_was_tried() -> None:
    rows = {row.split("`")[1]: row for row in table_in(DOCS.read_text(encoding="utf-8"), "modular")[2:]}
    names = {name for name in dir(diffusers) if name.endswith("ModularPipeline")}
    assert set(rows) == names - {"ModularPipeline"}
    tried = {name: set(re.findall(r"`(modular_\w+)`", row)) for name, row in rows.items()}
    assert {model: name for name, models in tried.items() for model in models} == {
        model: class_of(of) for model, of in MODULAR_MODELS.items()
    }
