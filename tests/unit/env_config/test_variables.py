"""What each of the 45 variables accepts, refuses and becomes."""

import logging
import os
import pickle
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from env_config.section import EnvConfigError
from env_config.variables import (
    BY_VARIABLE,
    DECLARATIONS,
    SECTIONS,
    CacheDiT,
    CloudStorage,
    EnvConfig,
    unknown_variables,
)
from tests.support.documented import DOCUMENTED, DocumentedVariable

TRUE = ["1", "true", "yes", "y", "t", "on"]
FALSE = ["0", "false", "no", "n", "f", "off"]
FLAGS = [("1", True), (" Yes ", True), ("ON", True), ("0", False), ("f", False), ("Off", False)]
NOT_FLAGS = ["2", "maybe", "truee", "-1"]
NOT_INTEGERS = ["four", "4.0", "nan", "1 2"]
NOT_THRESHOLDS = ["0", "-0.1", "nan", "inf", "a bit", "1e-400"]
HOME = Path.home()

untimed = settings(deadline=None)

# What else must be set for the variable to stand.
COMPANIONS = {
    "SGLANG_CLOUD_STORAGE_TYPE": {"SGLANG_S3_BUCKET_NAME": "media"},
    "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": {"SGLANG_CACHE_DIT_SCM_CACHE_BINS": "1"},
    "SGLANG_CACHE_DIT_SCM_CACHE_BINS": {"SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": "1"},
    "SGLANG_S3_ACCESS_KEY_ID": {"SGLANG_S3_SECRET_ACCESS_KEY": "secret"},
    "SGLANG_S3_SECRET_ACCESS_KEY": {"SGLANG_S3_ACCESS_KEY_ID": "key"},
}

GOOD: dict[str, list[tuple[str, Any]]] = {
    "SGLANG_DIFFUSION_TARGET_DEVICE": [
        *((name, name) for name in ("cuda", "rocm", "xpu", "npu", "musa", "mps", "cpu")),
        (" CPU ", "cpu"),
    ],
    "SGLANG_DIFFUSION_ATTENTION_BACKEND": [("torch_sdpa", "torch_sdpa"), (" TORCH_SDPA ", "torch_sdpa")],
    "SGLANG_DIFFUSION_ATTENTION_CONFIG": [
        ("attention.yaml", Path("attention.yaml")),
        ("~/attention.json", HOME / "attention.json"),
    ],
    "SGLANG_DIFFUSION_STAGE_LOGGING": FLAGS,
    "SGLANG_DIFFUSION_SERVER_DEV_MODE": FLAGS,
    "SGLANG_DIFFUSION_TORCH_PROFILER_DIR": [
        ("/var/traces", Path("/var/traces")),
        ("~/traces", HOME / "traces"),
    ],
    "SGLANG_DIFFUSION_CACHE_ROOT": [("/fast/cache", Path("/fast/cache")), ("~/c", HOME / "c")],
    "SGLANG_DIFFUSION_CONFIG_ROOT": [("/etc/triptych", Path("/etc/triptych")), ("~/c", HOME / "c")],
    "SGLANG_DIFFUSION_LOGGING_LEVEL": [
        *((name, name) for name in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")),
        ("debug", "DEBUG"),
    ],
    "SGLANG_DIFFUSION_WORKER_MULTIPROC_METHOD": [("fork", "fork"), ("SPAWN", "spawn")],
    "SGLANG_USE_RUNAI_MODEL_STREAMER": FLAGS,
    "SGLANG_USE_MLX": FLAGS,
    "SGLANG_USE_ROCM_VAE": FLAGS,
    "SGLANG_USE_ROCM_CUDNN_BENCHMARK": FLAGS,
    "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND": [
        *((name, name) for name in ("auto", "cudnn", "cutlass", "trtllm")),
        ("flashinfer_cutlass", "cutlass"),
        ("FlashInfer_TRTLLM", "trtllm"),
    ],
    "SGLANG_CACHE_DIT_ENABLED": FLAGS,
    "SGLANG_CACHE_DIT_FN": [("1", 1), (" 8 ", 8)],
    "SGLANG_CACHE_DIT_BN": [("0", 0), ("8", 8)],
    "SGLANG_CACHE_DIT_WARMUP": [("0", 0), ("+2", 2)],
    "SGLANG_CACHE_DIT_RDT": [("0.08", 0.08), ("1e-3", 0.001), ("1", 1.0)],
    "SGLANG_CACHE_DIT_MC": [("-1", -1), ("0", 0), ("5", 5)],
    "SGLANG_CACHE_DIT_TAYLORSEER": FLAGS,
    "SGLANG_CACHE_DIT_TS_ORDER": [("1", 1), ("2", 2)],
    "SGLANG_CACHE_DIT_SCM_PRESET": [
        *((name, name) for name in ("none", "slow", "medium", "fast", "ultra")),
        ("Fast", "fast"),
    ],
    "SGLANG_CACHE_DIT_SCM_POLICY": [("dynamic", "dynamic"), ("STATIC", "static")],
    "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": [("8,3,3,2,2", (8, 3, 3, 2, 2)), (" 8 , 3 ", (8, 3)), ("4", (4,))],
    "SGLANG_CACHE_DIT_SCM_CACHE_BINS": [("1,2,2,2,3", (1, 2, 2, 2, 3))],
    "SGLANG_CACHE_DIT_SECONDARY_FN": [("2", 2)],
    "SGLANG_CACHE_DIT_SECONDARY_BN": [("0", 0), ("3", 3)],
    "SGLANG_CACHE_DIT_SECONDARY_WARMUP": [("0", 0), ("2", 2)],
    "SGLANG_CACHE_DIT_SECONDARY_RDT": [("0.5", 0.5)],
    "SGLANG_CACHE_DIT_SECONDARY_MC": [("-1", -1), ("2", 2)],
    "SGLANG_CACHE_DIT_SECONDARY_TAYLORSEER": FLAGS,
    "SGLANG_CACHE_DIT_SECONDARY_TS_ORDER": [("1", 1), ("2", 2)],
    "SGLANG_CLOUD_STORAGE_TYPE": [("s3", "s3"), ("S3", "s3")],
    "SGLANG_S3_BUCKET_NAME": [("media", "media")],
    "SGLANG_S3_ENDPOINT_URL": [
        ("http://127.0.0.1:8333", "http://127.0.0.1:8333"),
        ("https://minio.example.org/s3/", "https://minio.example.org/s3/"),
    ],
    "SGLANG_S3_REGION_NAME": [("eu-central-1", "eu-central-1")],
    "SGLANG_S3_ACCESS_KEY_ID": [("AKIA123", SecretStr("AKIA123"))],
    "SGLANG_S3_SECRET_ACCESS_KEY": [("hush hush", SecretStr("hush hush"))],
    "SGLANG_KERNEL_API_LOGLEVEL": [("0", 0), ("3", 3), ("10", 10)],
    "SGLANG_KERNEL_API_LOGDEST": [
        ("STDERR", "stderr"),
        ("/var/log/Kernels-%i.log", "/var/log/Kernels-%i.log"),
        ("~/kernels.log", f"{HOME}/kernels.log"),
    ],
    "SGLANG_KERNEL_API_DUMP_DIR": [("dumps-%i", Path("dumps-%i")), ("~/dumps", HOME / "dumps")],
    "SGLANG_KERNEL_API_DUMP_INCLUDE": [("attn*, *.norm,", ("attn*", "*.norm"))],
    "SGLANG_KERNEL_API_DUMP_EXCLUDE": [("*vae*", ("*vae*",))],
}

BAD: dict[str, list[str]] = {
    "SGLANG_DIFFUSION_TARGET_DEVICE": ["tpu", "cuda:0", "gpu"],
    "SGLANG_DIFFUSION_ATTENTION_CONFIG": ["~no-such-user-here/a.yaml"],
    "SGLANG_DIFFUSION_STAGE_LOGGING": NOT_FLAGS,
    "SGLANG_DIFFUSION_SERVER_DEV_MODE": NOT_FLAGS,
    "SGLANG_DIFFUSION_TORCH_PROFILER_DIR": ["traces", "./traces", "~no-such-user-here/traces"],
    "SGLANG_DIFFUSION_CACHE_ROOT": ["~no-such-user-here"],
    "SGLANG_DIFFUSION_CONFIG_ROOT": ["~no-such-user-here"],
    "SGLANG_DIFFUSION_LOGGING_LEVEL": ["verbose", "WARN", "10"],
    "SGLANG_DIFFUSION_WORKER_MULTIPROC_METHOD": ["forkserver", "thread"],
    "SGLANG_USE_RUNAI_MODEL_STREAMER": NOT_FLAGS,
    "SGLANG_USE_MLX": NOT_FLAGS,
    "SGLANG_USE_ROCM_VAE": NOT_FLAGS,
    "SGLANG_USE_ROCM_CUDNN_BENCHMARK": NOT_FLAGS,
    "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND": ["cublas", "flashinfer", "flashinfer_"],
    "SGLANG_CACHE_DIT_ENABLED": NOT_FLAGS,
    "SGLANG_CACHE_DIT_FN": ["0", "-1", *NOT_INTEGERS],
    "SGLANG_CACHE_DIT_BN": ["-1", *NOT_INTEGERS],
    "SGLANG_CACHE_DIT_WARMUP": ["-1", *NOT_INTEGERS],
    "SGLANG_CACHE_DIT_RDT": NOT_THRESHOLDS,
    "SGLANG_CACHE_DIT_MC": ["-2", *NOT_INTEGERS],
    "SGLANG_CACHE_DIT_TAYLORSEER": NOT_FLAGS,
    "SGLANG_CACHE_DIT_TS_ORDER": ["0", "3", *NOT_INTEGERS],
    "SGLANG_CACHE_DIT_SCM_PRESET": ["faster", "f"],
    "SGLANG_CACHE_DIT_SCM_POLICY": ["auto"],
    "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": ["8,0", "8,,3", "8,", "8;3", "a"],
    "SGLANG_CACHE_DIT_SCM_CACHE_BINS": ["1,-2", ",", "1.5"],
    "SGLANG_CACHE_DIT_SECONDARY_FN": ["0", *NOT_INTEGERS],
    "SGLANG_CACHE_DIT_SECONDARY_BN": ["-1", *NOT_INTEGERS],
    "SGLANG_CACHE_DIT_SECONDARY_WARMUP": ["-1", *NOT_INTEGERS],
    "SGLANG_CACHE_DIT_SECONDARY_RDT": NOT_THRESHOLDS,
    "SGLANG_CACHE_DIT_SECONDARY_MC": ["-2", *NOT_INTEGERS],
    "SGLANG_CACHE_DIT_SECONDARY_TAYLORSEER": NOT_FLAGS,
    "SGLANG_CACHE_DIT_SECONDARY_TS_ORDER": ["0", "3", *NOT_INTEGERS],
    "SGLANG_CLOUD_STORAGE_TYPE": ["gcs", "s3 bucket", "local"],
    "SGLANG_S3_ENDPOINT_URL": ["127.0.0.1:8333", "s3://media", "http://", "http://host:port"],
    "SGLANG_KERNEL_API_LOGLEVEL": ["-1", *NOT_INTEGERS],
    "SGLANG_KERNEL_API_DUMP_DIR": ["~no-such-user-here/dumps"],
}


def value_of(env: EnvConfig, variable: str) -> Any:
    declaration = BY_VARIABLE[variable]
    (section,) = (section for _, section in env if type(section) is declaration.section)
    return getattr(section, declaration.field)


def parse_one(variable: str, text: str) -> Any:
    return value_of(EnvConfig.parse({**COMPANIONS.get(variable, {}), variable: text}), variable)


def refusal_of(environ: dict[str, str]) -> EnvConfigError:
    with pytest.raises(EnvConfigError) as refused:
        EnvConfig.parse(environ)
    return refused.value


def names_refused(environ: dict[str, str]) -> set[str]:
    try:
        EnvConfig.parse(environ)
    except EnvConfigError as error:
        return {problem.variable for problem in error.problems}
    return set()


def each(table: dict[str, list[Any]]) -> list[Any]:
    """One case per value; its id begins with the variable's name, so that `pytest -k` finds it."""
    return [
        pytest.param(variable, case, id=f"{variable.lower()}-{case[0] if isinstance(case, tuple) else case}")
        for variable, cases in table.items()
        for case in cases
    ]


each_documented = pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda row: row.name.lower())


def test_the_document_has_45_variables() -> None:
    assert len({row.name for row in DOCUMENTED}) == 45


def test_exactly_the_documented_variables_are_declared_in_their_order() -> None:
    assert [d.variable for d in DECLARATIONS] == [row.name for row in DOCUMENTED]


def test_every_variable_has_good_values_here() -> None:
    assert set(GOOD) == {row.name for row in DOCUMENTED}


@each_documented
def test_a_declaration_says_what_the_document_says(documented: DocumentedVariable) -> None:
    declaration = BY_VARIABLE[documented.name]
    assert declaration.default == documented.default
    assert declaration.description == documented.description
    assert declaration.section.heading[-1] == documented.heading
    assert documented.name.lower().endswith(declaration.field)


@each_documented
def test_an_unset_variable_has_the_documented_default(documented: DocumentedVariable) -> None:
    default = value_of(EnvConfig.parse({}), documented.name)
    if documented.default in ("not set", "(from primary)"):
        assert default is None
    elif documented.default in ("true", "false"):
        assert default is (documented.default == "true")
    elif documented.default.startswith("~"):
        assert default == Path(documented.default).expanduser()
    else:
        assert str(default) == documented.default


@each_documented
@pytest.mark.parametrize("blank", ["", "  ", "\n"], ids=["empty", "spaces", "newline"])
def test_a_blank_variable_counts_as_unset(documented: DocumentedVariable, blank: str) -> None:
    env = EnvConfig.parse({documented.name: blank})
    assert env == EnvConfig.parse({})
    assert all(not section.model_fields_set for _, section in env)


@pytest.mark.parametrize(("variable", "case"), each(GOOD))
def test_a_good_value_is_parsed(variable: str, case: tuple[str, Any]) -> None:
    text, expected = case
    parsed = parse_one(variable, text)
    assert parsed == expected
    assert type(parsed) is type(expected) or isinstance(parsed, type(expected))


@pytest.mark.parametrize(("variable", "case"), each(BAD))
def test_a_bad_value_is_refused_with_name_value_and_what_is_allowed(variable: str, case: str) -> None:
    error = refusal_of({**COMPANIONS.get(variable, {}), variable: case})
    (problem,) = error.problems
    assert (problem.variable, problem.value) == (variable, case)
    assert problem.allowed.startswith("must be ")
    assert f"{variable} = {case!r}: {problem.allowed}" in str(error)


def test_the_refusal_of_a_choice_lists_the_choices() -> None:
    assert "must be one of cuda, rocm, xpu, npu, musa, mps, cpu" in str(
        refusal_of({"SGLANG_DIFFUSION_TARGET_DEVICE": "tpu"})
    )


def test_the_refusal_of_a_number_gives_its_bounds() -> None:
    assert "must be an integer from 1 to 2" in str(refusal_of({"SGLANG_CACHE_DIT_TS_ORDER": "3"}))
    assert "must be an integer of at least -1" in str(refusal_of({"SGLANG_CACHE_DIT_MC": "-2"}))


@untimed
@given(st.sampled_from(TRUE + FALSE), st.data())
def test_a_boolean_is_read_in_any_case_with_any_blanks(word: str, data: st.DataObject) -> None:
    cased = "".join(data.draw(st.sampled_from([letter, letter.upper()])) for letter in word)
    blanks = st.text(" \t\r\n", max_size=3)
    text = data.draw(blanks) + cased + data.draw(blanks)
    assert parse_one("SGLANG_USE_MLX", text) is (word in TRUE)


@untimed
@given(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1).filter(str.strip))
def test_any_other_text_is_not_a_boolean(text: str) -> None:
    if text.strip().lower() not in TRUE + FALSE:
        refusal_of({"SGLANG_CACHE_DIT_ENABLED": text})


@untimed
@given(st.integers())
def test_an_integer_is_accepted_exactly_within_its_bounds(value: int) -> None:
    for variable, lowest in {"FN": 1, "BN": 0, "WARMUP": 0, "MC": -1}.items():
        if value >= lowest:
            assert parse_one(f"SGLANG_CACHE_DIT_{variable}", str(value)) == value
        else:
            refusal_of({f"SGLANG_CACHE_DIT_{variable}": str(value)})


@untimed
@given(st.floats())
def test_a_threshold_is_accepted_exactly_when_finite_and_above_zero(value: float) -> None:
    if 0 < value < float("inf"):
        assert parse_one("SGLANG_CACHE_DIT_RDT", repr(value)) == value
    else:
        refusal_of({"SGLANG_CACHE_DIT_RDT": repr(value)})


@untimed
@given(st.lists(st.integers(min_value=1), min_size=1))
def test_bins_are_read_back_as_they_were_written(bins: list[int]) -> None:
    text = " , ".join(map(str, bins))
    env = EnvConfig.parse({"SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": text, "SGLANG_CACHE_DIT_SCM_CACHE_BINS": "1"})
    assert env.cache_dit.scm_compute_bins == tuple(bins)


@untimed
@given(st.dictionaries(st.sampled_from(sorted(BY_VARIABLE)), st.text(max_size=12), max_size=6))
def test_any_texts_are_either_understood_or_refused_by_their_names(environ: dict[str, str]) -> None:
    companions = {name for variable in environ for name in COMPANIONS.get(variable, ())}
    assert names_refused(environ) <= set(environ) | companions


def test_all_bad_values_of_a_process_are_reported_together() -> None:
    first_bad_value_of_each = {variable: texts[0] for variable, texts in BAD.items()}
    error = refusal_of({**first_bad_value_of_each, "SGLANG_S3_SECRET_ACCESS_KEY": "hush"})
    assert {problem.variable for problem in error.problems} == {*BAD, "SGLANG_S3_SECRET_ACCESS_KEY"}


def test_a_bad_value_does_not_hide_what_is_missing_in_its_section() -> None:
    error = refusal_of({"SGLANG_CLOUD_STORAGE_TYPE": "s3", "SGLANG_S3_ENDPOINT_URL": "ftp://host"})
    assert {problem.variable for problem in error.problems} == {
        "SGLANG_S3_BUCKET_NAME",
        "SGLANG_S3_ENDPOINT_URL",
    }


def test_s3_without_a_bucket_is_refused() -> None:
    assert "SGLANG_S3_BUCKET_NAME is not set: must be set when SGLANG_CLOUD_STORAGE_TYPE is s3" in str(
        refusal_of({"SGLANG_CLOUD_STORAGE_TYPE": "s3", "SGLANG_S3_BUCKET_NAME": " "})
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SGLANG_S3_ACCESS_KEY_ID", "SGLANG_S3_SECRET_ACCESS_KEY"),
        ("SGLANG_CACHE_DIT_SCM_COMPUTE_BINS", "SGLANG_CACHE_DIT_SCM_CACHE_BINS"),
    ],
)
def test_a_pair_is_refused_when_half_of_it_is_missing(one: str, other: str) -> None:
    for present in (one, other):
        error = refusal_of({present: "4"})
        assert len(error.problems) == 1
        assert one in str(error)
        assert other in str(error)
    EnvConfig.parse({one: "4", other: "4"})


def test_a_process_reads_its_own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_TARGET_DEVICE", "cpu")
    assert EnvConfig.from_environ().runtime.target_device == "cpu"


def test_the_given_environment_is_read_instead_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_TARGET_DEVICE", "cpu")
    assert EnvConfig.from_environ({}).runtime.target_device == "cuda"


def test_the_default_roots_follow_the_xdg_variables() -> None:
    runtime = EnvConfig.parse({"XDG_CACHE_HOME": "/xdg/cache", "XDG_CONFIG_HOME": "/xdg/config"}).runtime
    assert runtime.cache_root == Path("/xdg/cache/sgl_diffusion")
    assert runtime.config_root == Path("/xdg/config/sgl_diffusion")
    assert runtime.model_fields_set == set()


def test_a_root_that_is_set_wins_over_xdg() -> None:
    environ = {"XDG_CACHE_HOME": "/xdg", "SGLANG_DIFFUSION_CACHE_ROOT": "/mine"}
    assert EnvConfig.parse(environ).runtime.cache_root == Path("/mine")


@pytest.mark.parametrize("ignored", ["", "relative/dir"])
def test_an_empty_or_relative_xdg_home_is_ignored_as_its_specification_says(ignored: str) -> None:
    environ = {"XDG_CACHE_HOME": ignored, "XDG_CONFIG_HOME": ignored}
    assert EnvConfig.parse(environ) == EnvConfig.parse({})


def test_the_secondary_transformer_falls_back_to_primary_then_default() -> None:
    env = EnvConfig.parse(
        {
            "SGLANG_CACHE_DIT_FN": "8",
            "SGLANG_CACHE_DIT_TAYLORSEER": "on",
            "SGLANG_CACHE_DIT_SCM_PRESET": "fast",
            "SGLANG_CACHE_DIT_SECONDARY_FN": "2",
            "SGLANG_CACHE_DIT_SECONDARY_TAYLORSEER": "off",
            "SGLANG_CACHE_DIT_SECONDARY_BN": "0",
        }
    )
    resolved = env.cache_dit_secondary.resolve(env.cache_dit)
    assert resolved == CacheDiT(fn=2, bn=0, taylorseer=False, scm_preset="fast")
    assert (env.cache_dit.fn, env.cache_dit.taylorseer) == (8, True)


def test_each_secondary_variable_overrides_its_primary() -> None:
    texts = {"FN": "7", "BN": "6", "WARMUP": "5", "RDT": "0.4", "MC": "2", "TAYLORSEER": "1", "TS_ORDER": "2"}
    secondary = EnvConfig.parse({f"SGLANG_CACHE_DIT_SECONDARY_{name}": text for name, text in texts.items()})
    primary = EnvConfig.parse({f"SGLANG_CACHE_DIT_{name}": text for name, text in texts.items()})
    assert secondary.cache_dit_secondary.resolve(secondary.cache_dit) == primary.cache_dit
    assert primary.cache_dit_secondary.resolve(primary.cache_dit) == primary.cache_dit


def test_code_may_build_a_section_by_field_names_within_the_same_bounds() -> None:
    assert CacheDiT(enabled=True, scm_compute_bins=(8, 3), scm_cache_bins=(1, 2)).scm_cache_bins == (1, 2)
    with pytest.raises(ValidationError, match="must be an integer of at least 1"):
        CacheDiT(fn=0)
    with pytest.raises(ValidationError, match="Extra inputs"):
        CacheDiT(first_blocks=1)  # type: ignore[call-arg]


def test_the_configuration_cannot_be_changed() -> None:
    env = EnvConfig.parse({})
    with pytest.raises(ValidationError, match="frozen"):
        env.cache_dit.fn = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        env.cache_dit = CacheDiT()  # type: ignore[misc]


def test_the_configuration_survives_pickling_with_what_was_set() -> None:
    env = EnvConfig.parse({variable: cases[0][0] for variable, cases in GOOD.items()})
    copy = pickle.loads(pickle.dumps(env))
    assert copy == env
    assert copy.cloud_storage.secret_access_key.get_secret_value() == "hush hush"
    assert all(getattr(copy, name).model_fields_set == getattr(env, name).model_fields_set for name in SECTIONS)


def test_the_error_survives_pickling() -> None:
    error = refusal_of({"SGLANG_CACHE_DIT_FN": "0", "SGLANG_USE_MLX": "maybe"})
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.problems, str(copy)) == (error.problems, str(error))


SECRETS = {"SGLANG_S3_ACCESS_KEY_ID": "AKIAsesame", "SGLANG_S3_SECRET_ACCESS_KEY": "opensesame"}


def test_no_way_of_printing_the_configuration_shows_a_secret() -> None:
    env = EnvConfig.parse(SECRETS)
    printed = [repr(env), str(env), f"{env}", str(env.model_dump()), env.model_dump_json(), str(vars(env))]
    printed += [repr(env.cloud_storage), str(env.model_dump(by_alias=True)), str(list(env.cloud_storage))]
    assert not [text for text in printed if "sesame" in text]
    assert "**********" in repr(env)


@pytest.mark.parametrize("missing", [None, *SECRETS])
def test_an_error_with_its_traceback_shows_no_secret(missing: str | None) -> None:
    environ = {name: text for name, text in SECRETS.items() if name != missing} | {"SGLANG_CACHE_DIT_FN": "0"}
    error = refusal_of(environ)
    assert "sesame" not in "".join(traceback.format_exception(error)) + repr(error) + str(error.problems)
    assert error.__context__ is None


def test_a_section_built_wrongly_by_code_shows_no_secret() -> None:
    with pytest.raises(ValidationError) as refused:
        CloudStorage(access_key_id=SecretStr("opensesame"), typo="opensesame")  # type: ignore[call-arg]
    assert "sesame" not in str(refused.value)


@pytest.mark.parametrize("url", ["https://me:opensesame@host", "https://me:open/sesame@host/x"])
def test_a_password_in_the_endpoint_is_refused_and_not_shown(url: str) -> None:
    error = refusal_of({"SGLANG_S3_ENDPOINT_URL": url})
    assert "without user name and password" in str(error)
    assert "sesame" not in str(error)


@pytest.mark.parametrize(
    ("typo", "closest"),
    [
        ("SGLANG_CACHE_DIT_WARMPU", "SGLANG_CACHE_DIT_WARMUP"),
        ("SGLANG_DIFFUSION_TARGET_DEVISE", "SGLANG_DIFFUSION_TARGET_DEVICE"),
        ("SGLANG_S3_BUCKET", "SGLANG_S3_BUCKET_NAME"),
        ("sglang_use_mlx", "SGLANG_USE_MLX"),
    ],
)
def test_an_unknown_name_gives_the_closest_known_one(typo: str, closest: str) -> None:
    (warning,) = unknown_variables([typo, "PATH", closest])
    assert warning == f"{typo} is not a known variable; the closest name is {closest}"


def test_a_name_that_resembles_none_is_still_reported() -> None:
    assert unknown_variables(["SGLANG_QQQQQQQQQQQQQQQQQQQQ"]) == ["SGLANG_QQQQQQQQQQQQQQQQQQQQ is not a known variable"]


@pytest.mark.parametrize(
    "name",
    ["SGLANG_DIFFUSION_PLATFORM_OVERRIDE", "SGLANG_CACHE_DIT_DMD_ORDER", "SGLANG_USE_ROCM_VAE_CONV2D_BF16"],
)
def test_an_undocumented_name_of_sglang_is_said_not_to_be_supported(name: str) -> None:
    (warning,) = unknown_variables([name])
    assert warning == f"{name} is an undocumented variable of SGLang and is not supported here"


def test_an_unknown_name_is_logged_as_a_warning_without_its_value(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="env_config"):
        EnvConfig.from_environ({"SGLANG_S3_SECRET_KEY": "opensesame", "SGLANG_USE_MLX": "1"})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "SGLANG_S3_SECRET_KEY" in record.getMessage()
    assert "sesame" not in caplog.text


def test_no_documented_name_is_unknown() -> None:
    assert unknown_variables(row.name for row in DOCUMENTED) == []


def test_reading_changes_nothing_in_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_CACHE_DIT_FN", " 2 ")
    before = dict(os.environ)
    EnvConfig.from_environ()
    assert dict(os.environ) == before
