"""`python -m env_config` as a user runs it: a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from env_config.told.reference import reference
from tests.support.documented import DOCUMENTED

ROOT = Path(__file__).parents[3]


def env_config(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG_", "XDG_"))}
    return subprocess.run(
        [sys.executable, "-m", "env_config", *arguments],
        cwd=ROOT,
        env={**inherited, **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_effective_values_are_printed_with_their_source_and_secrets_masked() -> None:
    done = env_config(
        SGLANG_DIFFUSION_TARGET_DEVICE="CPU",
        SGLANG_S3_ACCESS_KEY_ID="AKIAsesame",
        SGLANG_S3_SECRET_ACCESS_KEY="opensesame",
        SGLANG_S3_SECRET_KEY="sesame",
    )
    assert done.returncode == 0
    header, *lines = (line.split() for line in done.stdout.splitlines())
    assert header == ["variable", "value", "source"]
    assert [line[0] for line in lines] == [row.name for row in DOCUMENTED]
    assert ["SGLANG_DIFFUSION_TARGET_DEVICE", "cpu", "environment"] in lines
    assert ["SGLANG_CACHE_DIT_FN", "1", "default"] in lines
    assert ["SGLANG_CACHE_DIT_SECONDARY_FN", "1", "from", "primary"] in lines
    assert ["SGLANG_S3_SECRET_ACCESS_KEY", "**********", "environment"] in lines
    assert "SGLANG_S3_SECRET_KEY is not a known variable" in done.stderr
    assert "sesame" not in done.stdout + done.stderr


def test_all_bad_values_are_printed_and_the_exit_code_is_1() -> None:
    done = env_config(SGLANG_CACHE_DIT_FN="0", SGLANG_USE_MLX="maybe", SGLANG_S3_ACCESS_KEY_ID="opensesame")
    assert done.returncode == 1
    assert done.stdout == ""
    for name in (
        "SGLANG_CACHE_DIT_FN = '0'",
        "SGLANG_USE_MLX = 'maybe'",
        "SGLANG_S3_SECRET_ACCESS_KEY is not",
    ):
        assert name in done.stderr
    assert "sesame" not in done.stderr
    assert "Traceback" not in done.stderr


def test_reference_prints_the_table_whatever_the_environment_says() -> None:
    done = env_config("--reference", SGLANG_CACHE_DIT_FN="nonsense")
    assert (done.returncode, done.stdout) == (0, reference())


def test_check_exits_with_1_and_prints_each_file_with_its_errors(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("applications: [{name: a, runtime_env: {env_vars: {SGLANG_USE_MLX: '1'}}}]")
    bad.write_text("applications: [{name: a, runtime_env: {env_vars: {SGLANG_USE_MXL: '1'}}}]")
    done = env_config("--check", str(good), str(bad), SGLANG_CACHE_DIT_FN="nonsense")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        f"{good}: ok",
        f"{bad}: application 'a': SGLANG_USE_MXL is not a known variable; the closest name is SGLANG_USE_MLX",
    ]
    assert env_config("--check", str(good)).returncode == 0


def test_the_package_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys, env_config.variables, env_config.told.effective, env_config.__main__; "
        "print([name for name in ('torch', 'ray', 'diffusers', 'boto3') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
