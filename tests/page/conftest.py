"""A real browser before the page of a played cluster: one tab of Chromium for all tests."""

import pytest

from tests.support.browser import CHROMIUM, open_page, pictures_server, shots, tab, videos_server

__all__ = ["open_page", "pictures_server", "shots", "tab", "videos_server"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a browser nothing of the page is tested, and the report says so."""
    if CHROMIUM is None:
        reason = "NO BROWSER: install Debian's package chromium, the page is not tested without it"
        for item in items:
            if "tests/page/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
