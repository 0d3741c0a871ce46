"""install.py: uv installs from where pip would, and pip does where uv cannot."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import install

PIP = "pip install --disable-pip-version-check --no-compile --constraint constraints.txt"
# In place of Python: writes down how modules were called; pip says how it is configured, and uv what it was told.
STAND_IN = """#!/bin/sh
module=$2
shift 2
echo "$module $*" >> called
test "$module" != uv || env > told
test "$*" != "config list" || cat configuration
case "$module $*" in *"$FAILS") exit 1 ;; esac
"""
Called = Callable[[], list[str]]


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Called:
    """What install.py calls after it has asked how pip is configured, which is not at all."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "configuration").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("FAILS", "nothing")
    return lambda: (tmp_path / "called").read_text().splitlines()[1:]


def told(name: str) -> str | None:
    """The variable that uv had."""
    lines = Path("told").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line).get(name)


def test_pip_installs_uv_and_uv_the_project(called: Called) -> None:
    assert install.main(".[dev]") == 0
    options = f"--no-config --index-strategy unsafe-best-match --python {sys.executable}"
    assert called() == [f"{PIP} uv", f"uv pip install {options} --editable .[dev]"]
    assert told("UV_CONSTRAINT") == "constraints.txt"


def test_settings_of_uv_for_another_project_count_for_nothing(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("UV_INDEX", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_NEW", "UV_CACHE_DIR", "UV_LINK_MODE"):
        monkeypatch.setenv(name, "given")
    assert install.main(".") == 0
    had = {line.split("=", 1)[0] for line in Path("told").read_text().splitlines() if line.startswith("UV_")}
    assert had == {"UV_CONSTRAINT", "UV_CACHE_DIR", "UV_LINK_MODE"}


def test_uv_takes_packages_from_where_pip_is_configured_to(called: Called) -> None:
    Path("configuration").write_text(
        "global.index-url='https://me:word@mirror/simple'\n"
        "global.extra-index-url='https://a/simple\\nhttps://b/simple'\n"
        "global.find-links='/wheels /more'\n"
        "global.constraint='/etc/constraints.txt'\n"
        "global.timeout='15'\n"
        "install.timeout='60'\n"
        ":env:.find-links='/mine'\n"
        ":env:.cert='/certificates.pem'\n"
        ":env:.config-file='/etc/pip.conf'\n"
        ":env:.index-url=''\n"
        ":env:.progress-bar='off'\n"
        ":env:.no-index=''\n"
        ":env:.proxy='http://proxy:1'\n"
        "download.platform='any'\n"
    )
    assert install.main(".") == 0
    expected = {
        "UV_DEFAULT_INDEX": "https://me:word@mirror/simple",
        "UV_INDEX": "https://a/simple https://b/simple",
        "UV_FIND_LINKS": "/mine",
        "UV_CONSTRAINT": "/etc/constraints.txt constraints.txt",
        "UV_HTTP_TIMEOUT": "60",
        "SSL_CERT_FILE": "/certificates.pem",
        "HTTPS_PROXY": "http://proxy:1",
        "HTTP_PROXY": "http://proxy:1",
    }
    assert {name: told(name) for name in expected} == expected
    assert "word" not in str(called()), "others of this machine read arguments"


def test_several_folders_of_packages_are_each_told() -> None:
    assert install.variables_of({"find-links": "/wheels /more"})["UV_FIND_LINKS"] == "/wheels,/more"


def test_a_part_of_a_second_is_rounded_up() -> None:
    assert install.variables_of({"timeout": "15.5"})["UV_HTTP_TIMEOUT"] == "16"


def test_the_two_names_of_one_setting_are_one() -> None:
    listed = "global.default-timeout='1'\nglobal.timeout='1'\ninstall.default-timeout='2'\n"
    assert install.settings_of(listed) == {"timeout": "2"}


@pytest.mark.parametrize("name", ["index-url", "timeout"])
def test_pip_installs_where_its_files_differ_in_a_setting(
    name: str, called: Called, capfd: pytest.CaptureFixture[str]
) -> None:
    """Newer pips list the files by their paths, not by which of them counts."""
    Path("configuration").write_text(f"global.{name}='1'\nglobal.retries='3'\nglobal.{name}='2'\n")
    assert install.main(".") == 0
    assert called() == [f"{PIP} --editable ."]
    assert f"pip installs, as its global.{name} has several values" in capfd.readouterr().out


def test_uv_installs_where_the_files_say_the_same(called: Called) -> None:
    Path("configuration").write_text("global.retries='3'\nglobal.retries='3'\n")
    assert install.main(".") == 0
    assert told("UV_HTTP_RETRIES") == "3"


@pytest.mark.parametrize("name", ["no-index", "require-hashes", "no-binary", "keyring-provider", "new-setting"])
def test_pip_installs_where_a_setting_has_no_counterpart(
    name: str, called: Called, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("configuration").write_text(f"global.{name}='1'\n")
    assert install.main(".") == 0
    assert called() == [f"{PIP} --editable ."]
    assert f"pip installs, as uv has no counterpart of its {name}" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("fails", "calls", "said"),
    [
        ("constraints.txt uv", [f"{PIP} uv", f"{PIP} --editable ."], "pip installs, as uv cannot be had"),
        ("--editable .", None, "pip installs, as uv failed"),
    ],
)
def test_pip_installs_where_uv_cannot(
    fails: str,
    calls: list[str] | None,
    said: str,
    called: Called,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAILS", fails)
    install.main(".")
    assert said in capfd.readouterr().out
    assert called()[-1] == f"{PIP} --editable ."
    assert calls is None or called() == calls


def test_the_exit_code_is_that_of_the_last_pip(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "--editable .")  # of both
    assert install.main(".") == 1
