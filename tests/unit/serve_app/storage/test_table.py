"""The choice of a storage by its variable, and what else is said of a bucket."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from env_config.variables import CloudStorage, EnvConfig
from serve_app.service import ServiceArgs, open_storage
from serve_app.storage.local import LocalStorage
from serve_app.storage.s3 import S3Storage
from serve_app.storage.table import STORAGE_BACKENDS, make_storage


def test_the_variable_chooses_the_storage(tmp_path):
    local = make_storage(CloudStorage(), tmp_path)
    assert isinstance(local, LocalStorage)
    assert not local.is_shared
    s3 = make_storage(CloudStorage(type="s3", bucket_name="b"), tmp_path)
    assert isinstance(s3, S3Storage)
    assert s3.is_shared
    assert set(STORAGE_BACKENDS) == {"local", "s3"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"s3": {"addressing": "host"}}, "s3.addressing"),
        ({"s3": {"public_endpoint": "s3.example.com"}}, "s3.public_endpoint"),
        ({"s3": {"public_endpoint": "https://user:hunter2@s3.example.com"}}, "s3.public_endpoint"),
        ({"s3": {"url_lifetime_s": 604_801}}, "s3.url_lifetime_s"),
        ({"s3": {"region": "eu-west-1"}}, "s3.region"),
        ({"s3": {"public_endpoint": "https://s3.example.com"}, "url_style": "path"}, "of no effect with url_style"),
    ],
)
def test_a_setting_of_the_bucket_that_cannot_be_is_refused_by_name(args: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ServiceArgs(**args)


async def test_a_setting_of_the_bucket_is_refused_where_there_is_none(tmp_path):
    env = EnvConfig.model_validate({"runtime": {"cache_root": tmp_path}})
    with pytest.raises(ValueError, match="of no effect unless SGLANG_CLOUD_STORAGE_TYPE is s3"):
        await open_storage(ServiceArgs(s3={"addressing": "path"}), env, "app")
