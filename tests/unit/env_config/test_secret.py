"""A secret among the arguments is named by where it stands; its value is nowhere but where it is used."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import sqlalchemy as sa
import yaml
from pydantic import BaseModel, SecretStr, ValidationError

from env_config.secret import SecretError, SecretPath, SecretReference
from serve_app.app import AppArgs
from serve_app.jobs.database import JobStoreError, open_database
from serve_app.jobs.service import JobArgs
from serve_app.jobs.webhooks.delivery import read_secret
from serve_app.tools.check_config import check_config

SECRET = "hunter2-opensesame"
PEM = f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n"
DSN = f"postgresql://jobs:{SECRET}@127.0.0.1:1/jobs"

# By argument: values in which somebody has written a secret.
WRITTEN_OUT: list[tuple[str, Any]] = [
    ("jobs.webhook_secret", SECRET),
    ("jobs.webhook_secret", f"whsec_{SECRET}"),
    ("jobs.webhook_secret", [SECRET]),
    ("jobs.webhook_secret", {"value": SECRET}),
    ("jobs.webhook_secret", {"file": "/run/secrets/x", "value": SECRET}),
    ("jobs.webhook_secret", {"file": SECRET}),  # no absolute path
    ("jobs.webhook_secret", {"env": f"{SECRET}!"}),
    ("jobs.store_url", DSN),
    ("jobs.store_url", f"postgresql://db/jobs?user=jobs&password={SECRET}"),
    ("jobs.store_url", f"postgresql://db/jobs?sslpassword={SECRET}"),
    ("jobs.store_url", f"host=db password={SECRET}"),
    ("jobs.store_url", {"url": DSN}),
    ("c2pa_private_key", PEM),
    ("api_keys_file", f"sk-{SECRET}"),
    ("public_url", f"https://user:{SECRET}@example.com"),
    ("model", f"s3://key:{SECRET}@bucket/prefix"),
    ("cors_origins", [f"https://user:{SECRET}@example.com"]),
    ("allowed_hosts", [f"user:{SECRET}@example.com"]),
]


def with_argument(place: str, value: Any) -> dict[str, Any]:
    *parents, name = place.split(".")
    values: dict[str, Any] = {name: value}
    for parent in reversed(parents):
        values = {parent: values}
    return {"model": "checkpoints/emoji-flux"} | values


@pytest.mark.parametrize(("place", "value"), WRITTEN_OUT)
def test_a_secret_that_is_written_out_is_refused_and_not_repeated(
    place: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValidationError) as error:
        AppArgs.model_validate(with_argument(place, value))
    application = {"name": "a", "import_path": "serve_app.app:build_app", "args": with_argument(place, value)}
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1"}, "applications": [application]}))
    [problem] = check_config(file)
    assert f"applications[a].args.{place}" in problem
    assert SECRET not in problem + str(error.value) + repr(error.value) + caplog.text


def test_the_sentence_says_how_a_secret_is_given() -> None:
    with pytest.raises(ValidationError, match=r"\{file: /absolute/path\} or \{env: NAME\}"):
        JobArgs.model_validate({"webhook_secret": SECRET})


def test_every_argument_that_is_named_like_a_secret_is_given_by_its_place() -> None:
    """Also of arguments to come."""
    words = re.compile("secret|password|token$|credential|private_key|api_key")
    plain = [
        f"{model.__name__}.{name}"
        for model in models_of(AppArgs)
        for name, field in model.model_fields.items()
        if words.search(name) and not {SecretReference, SecretPath} & {field.annotation, *get_args(field.annotation)}
    ]
    assert plain == []


def models_of(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from models_of(kind)


@pytest.fixture(params=["file", "env"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Where a test puts its secret: `place["text"]` may be changed before it is read."""
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    monkeypatch.setenv("A_SECRET_OF_THE_TEST", SECRET)
    return {"file": str(tmp_path / "secret")} if request.param == "file" else {"env": "A_SECRET_OF_THE_TEST"}


def test_a_secret_is_read_where_it_stands_and_is_in_no_repr_and_no_pickle(place: dict[str, str]) -> None:
    args = AppArgs.model_validate({"model": "m", "jobs": {"webhook_secret": place}})
    assert args.jobs.webhook_secret is not None
    assert args.jobs.webhook_secret.read("jobs.webhook_secret") == SECRET
    assert read_secret(args.jobs.webhook_secret) == SecretStr(SECRET)
    assert SECRET not in repr(args) + str(args.model_dump()) + repr(read_secret(args.jobs.webhook_secret))
    assert SECRET.encode() not in pickle.dumps(args)
    assert pickle.loads(pickle.dumps(args)) == args


@pytest.mark.parametrize("url", [DSN, f"postgresql://jobs@127.0.0.1:1/jobs?password={SECRET}&sslpassword={SECRET}"])
def test_a_database_whose_url_is_a_secret_is_opened_and_its_password_shown_nowhere(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    (tmp_path / "url").write_text(url)
    args = JobArgs.model_validate({"store_url": {"file": str(tmp_path / "url")}})
    with pytest.raises(JobStoreError, match=r"127\.0\.0\.1:1") as error:
        open_database(args.store_url, tmp_path)
    shown = "".join(str(each) + repr(each) for each in (error.value, error.value.__cause__))
    assert SECRET not in shown + caplog.text


def test_the_password_of_a_database_reaches_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text(f"postgresql://jobs@db/jobs?sslpassword={SECRET}&sslmode=require")
    made = []
    monkeypatch.setattr(sa, "create_engine", lambda address, **options: made.append((address, options)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_database(SecretReference(file=tmp_path / "url"), tmp_path)
    [(address, options)] = made
    assert address.render_as_string() == "postgresql+psycopg://jobs@db/jobs?sslmode=require"
    assert options["connect_args"]["sslpassword"] == SECRET


def test_a_secret_that_cannot_be_read_is_named_by_its_argument_and_place(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for reference, sentence in (
        (SecretReference(file=tmp_path / "none"), "none' cannot be read (No such file or directory)"),
        (SecretReference(file=tmp_path / "empty"), "empty' is empty"),
        (SecretReference(file=tmp_path / "bytes"), "bytes' is not UTF-8"),
        (SecretReference(env="NOT_SET_IN_ANY_TEST"), "the variable NOT_SET_IN_ANY_TEST is not set"),
    ):
        with pytest.raises(SecretError) as error:
            reference.read("jobs.webhook_secret")
        assert re.fullmatch(rf"jobs\.webhook_secret: .*{re.escape(sentence)}", str(error.value))


def test_a_secret_that_cannot_sign_is_refused_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"whsec_{SECRET}")
    with pytest.raises(SecretError, match="base64") as error:
        read_secret(SecretReference(file=tmp_path / "secret"))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(("value", "is_refused"), [(SECRET, True), ("${A_SECRET}", False)])
def test_the_variable_of_a_secret_does_not_stand_in_the_config(value: str, is_refused: bool, tmp_path: Path) -> None:
    application = {
        "name": "a",
        "import_path": "serve_app.app:build_app",
        "args": with_argument("jobs.webhook_secret", {"env": "A_SECRET"}),
        "runtime_env": {"env_vars": {"A_SECRET": value, "SGLANG_DIFFUSION_TARGET_DEVICE": "cpu"}},
    }
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1"}, "applications": [application]}))
    problems = check_config(file)
    assert ["args.jobs.webhook_secret: the variable A_SECRET" in each for each in problems] == [True] * is_refused
    assert SECRET not in str(problems)
