"""Tells a Ray that is started from here to wrap Serve's proxies, so that their own errors come in OpenAI's shape."""

import os

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # Ray's own
AROUND_PROXY = "serve_app.http.middleware.serve_errors:around_proxy"  # named, not imported: the proxies load it


def wrap_serve_proxies() -> str:
    """What the proxies will call; one that the user has set stays as it is."""
    return os.environ.setdefault(VARIABLE, AROUND_PROXY)
