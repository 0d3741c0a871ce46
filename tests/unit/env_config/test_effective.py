"""The effective values: what they are and where they come from."""

from env_config.told.effective import effective_values
from env_config.variables import EnvConfig
from tests.support.documented import DOCUMENTED


def rows_of(environ: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {row.variable: (row.value, row.source) for row in effective_values(EnvConfig.parse(environ))}


def test_every_variable_has_a_row_in_the_documents_order() -> None:
    assert list(rows_of({})) == [row.name for row in DOCUMENTED]


def test_an_unset_variable_comes_from_the_default() -> None:
    rows = rows_of({"XDG_CACHE_HOME": "/xdg"})
    assert rows["SGLANG_CACHE_DIT_RDT"] == ("0.24", "default")
    assert rows["SGLANG_USE_MLX"] == ("not set", "default")
    assert rows["SGLANG_DIFFUSION_CACHE_ROOT"] == ("/xdg/sgl_diffusion", "default")


def test_a_set_variable_comes_from_the_environment_even_where_it_repeats_the_default() -> None:
    rows = rows_of({"SGLANG_CACHE_DIT_RDT": "0.24", "SGLANG_KERNEL_API_DUMP_INCLUDE": "attn*, norm*"})
    assert rows["SGLANG_CACHE_DIT_RDT"] == ("0.24", "environment")
    assert rows["SGLANG_KERNEL_API_DUMP_INCLUDE"] == ("attn*,norm*", "environment")


def test_an_unset_secondary_variable_shows_the_primarys_value() -> None:
    rows = rows_of({"SGLANG_CACHE_DIT_FN": "8", "SGLANG_CACHE_DIT_SECONDARY_BN": "2"})
    assert rows["SGLANG_CACHE_DIT_SECONDARY_FN"] == ("8", "from primary")
    assert rows["SGLANG_CACHE_DIT_SECONDARY_BN"] == ("2", "environment")
    assert rows["SGLANG_CACHE_DIT_SECONDARY_RDT"] == ("0.24", "from primary")


def test_secrets_are_masked() -> None:
    rows = rows_of({"SGLANG_S3_ACCESS_KEY_ID": "AKIA", "SGLANG_S3_SECRET_ACCESS_KEY": "hush"})
    assert rows["SGLANG_S3_ACCESS_KEY_ID"] == ("**********", "environment")
    assert rows["SGLANG_S3_SECRET_ACCESS_KEY"] == ("**********", "environment")
