"""The choice of a storage by its variable."""

from __future__ import annotations

from env_config.variables import CloudStorage
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
