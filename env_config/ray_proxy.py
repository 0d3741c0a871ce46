"""Tells a Ray that is started from here what to put around Serve's proxies: `serve_app.proxy`."""

import os

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # Ray's own
AROUND_PROXY = "serve_app.proxy:around_proxy"  # named, not imported: the proxies load it


def wrap_serve_proxies() -> str:
    """What the proxies will call; one that the user has set stays as it is."""
    return os.environ.setdefault(VARIABLE, AROUND_PROXY)
