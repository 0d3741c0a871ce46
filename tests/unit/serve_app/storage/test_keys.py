"""Keys of stored files: what they say, and that no other name leads anywhere."""

from __future__ import annotations

import pytest

from serve_app.errors import ObjectNotFoundError
from serve_app.storage.keys import object_key
from serve_app.storage.local import LocalStorage
from tests.support.stored_files import KEY, NOW, generation


def test_a_key_says_the_kind_the_day_and_the_request():
    assert KEY == "images/2026/11/21/req_1-x-0.png"
    assert object_key(generation("abc", "video"), 3, "video/mp4", NOW) == "videos/2026/11/21/abc-3.mp4"


@pytest.mark.parametrize("request_id", ["../../etc", "a/b", "a b", "", "ä", "x" * 129, "a\n"])
def test_a_request_id_that_could_lead_elsewhere_makes_no_key(request_id):
    with pytest.raises(ValueError, match="is no key"):
        object_key(generation(request_id), 0, "image/png", NOW)


@pytest.mark.parametrize(
    "key",
    [
        "../secret.png",
        "images/../../secret-0.png",
        "images/2026/11/21/../../../../secret-0.png",
        "/etc/passwd",
        "images/2026/11/21/a-0.txt",
        "images/2026/11/21/a-0.png\n",
        "images/2026/11/21/.a-0.png.part",
        "images/2026/11/２１/a-0.png",
        "triptych-startup-check",
        "",
    ],
)
async def test_nothing_but_our_own_keys_can_be_loaded_or_deleted(tmp_path, key):
    (tmp_path / "secret-0.png").write_bytes(b"secret")
    storage = LocalStorage(tmp_path / "outputs")
    with pytest.raises(ObjectNotFoundError):
        await storage.load(key)
    with pytest.raises(ObjectNotFoundError):
        await storage.delete(key)
