"""The command that checks a checkpoint: what it asks for, what it prints, and its status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.messages import STAGES
from deployments.verify.process import CheckOrder
from deployments.verify.verdict import Report, Verdict
from serve_app.tools import verify

PASSED = Report("m", "ToyPipeline", verdicts=(Verdict("encoder", "same bits", "2 calls"),))
FAILED = Report("m", "ToyPipeline", verdicts=(Verdict("vae", "differs", "here"),))


class Check:
    """In place of the process: what was ordered, and the report to come."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.report, self.order, self.environment = PASSED, CheckOrder, {}  # type: ignore[var-annotated]
        monkeypatch.setattr(verify, "run_check", self)

    def __call__(self, order: CheckOrder, environment: dict[str, str]) -> Report:
        self.order, self.environment = order, environment  # type: ignore[assignment]
        return self.report


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Check:
    return Check(monkeypatch)


def config_file(folder: Path, *names: str) -> Path:
    """A Serve config with an application of each name."""
    applications = [
        {
            "name": name,
            "route_prefix": f"/{name}",
            "import_path": "serve_app.app:build_app",
            "args": {"model": f"org/{name}", "placement": "two_stage", "dtype": "bfloat16"},
            "runtime_env": {
                "env_vars": {"SGLANG_DIFFUSION_ATTENTION_BACKEND": "native", "SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"}
            },
            "deployments": [
                {"name": "EncoderVAE", "ray_actor_options": {"runtime_env": {"env_vars": {}}}},
                {
                    "name": "Denoiser",
                    "ray_actor_options": {
                        "runtime_env": {"env_vars": {"SGLANG_DIFFUSION_CACHE_ROOT": "${A_FOLDER}/cache"}}
                    },
                },
            ],
        }
        for name in names
    ]
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1"}, "applications": applications}))
    return file


@pytest.mark.parametrize(("report", "status"), [(PASSED, 0), (FAILED, 1), (Report("m", problem="no"), 1)])
def test_the_status_is_0_only_where_the_split_makes_the_same(
    report: Report, status: int, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    check.report = report
    assert verify.main(["org/m"]) == status
    assert capsys.readouterr().out.splitlines() == report.lines()


def test_json_holds_the_verdicts_and_what_follows_from_them(check: Check, capsys: pytest.CaptureFixture[str]) -> None:
    check.report = FAILED
    assert verify.main(["org/m", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["passed"], told["conclusion"]) == (False, FAILED.conclusion)
    assert told["verdicts"] == [{"part": "vae", "outcome": "differs", "told": "here", "differences": []}]


def test_options_say_what_is_loaded_and_asked(check: Check) -> None:
    options = "--dtype float16 --variant fp16 --placement one_stage --prompt tree --size 64x32 --steps 2"
    arguments = ["--argument", "guidance_scale=3.5", "--argument", "image=@a.png"]
    assert verify.main(["org/m", *options.split(), *arguments]) == 0
    order: Any = check.order
    assert (order.model.path, order.model.dtype, order.model.variant) == ("org/m", "float16", "fp16")
    assert order.model.name == "m"
    assert order.processes == (STAGES,)
    assert (order.asked.prompt, order.asked.width, order.asked.height, order.asked.steps) == ("tree", 64, 32, 2)
    assert order.asked.arguments == {"guidance_scale": 3.5, "image": "@a.png"}


def test_a_serve_config_is_checked_as_it_is_served(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_FOLDER", "/f")
    assert verify.main(["--config", str(config_file(tmp_path, "a")), "--dtype", "float32"]) == 0
    order: Any = check.order
    assert (order.model.path, order.model.dtype) == ("org/a", "float32")
    assert order.processes == (("encoder", "vae"), ("denoiser",))
    assert check.environment["SGLANG_DIFFUSION_ATTENTION_BACKEND"] == "native"
    assert check.environment["SGLANG_DIFFUSION_CACHE_ROOT"] == "/f/cache"


def test_one_of_several_applications_is_chosen_by_its_name(
    check: Check, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(config_file(tmp_path, "a", "b"))
    assert verify.main(["--config", file, "--application", "b"]) == 0
    assert check.order.model.path == "org/b"
    for more in ([], ["--application", "c"]):
        assert verify.main(["--config", file, *more]) == 2
        assert "has the applications a, b: choose with --application NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "name a MODEL"),
        (["m", "--application", "a"], "--application chooses one of a file"),
        (["m", "--steps", "0"], "steps: Input should be greater than or equal to 1"),
        (["m", "--variant", "a/b"], "variant: String should match pattern"),
        (["--config", "missing.yaml"], "cannot be read"),
    ],
)
def test_a_wrong_command_is_named_with_status_2(
    arguments: list[str], told: str, check: Check, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(arguments) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["m", "--size", "64"], ["m", "--argument", "steps"], ["m", "--dtype", "int8"]])
def test_an_option_that_cannot_be_read_ends_with_status_2(arguments: list[str], check: Check) -> None:
    with pytest.raises(SystemExit) as ended:
        verify.main(arguments)
    assert ended.value.code == 2
