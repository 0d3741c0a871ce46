"""Applies SGLANG_DIFFUSION_LOGGING_LEVEL to our loggers, Ray Serve's and the libraries'."""

from __future__ import annotations

import importlib
import logging
import sys

OURS = ("deployments", "serve_app", "env_config")
SERVE = "ray.serve"
LIBRARIES = (
    "accelerate",
    "cache_dit",
    "CACHE_DIT",
    "diffusers",
    "huggingface_hub",
    "ray",  # and ray.serve
    "runai_model_streamer",
    "torch",
    "transformers",
    "uvicorn",
)
# Below INFO these write headers of requests, which hold access keys.
NEVER_BELOW_INFO = ("boto3", "botocore", "s3transfer", "urllib3", "httpx", "httpcore", "asyncio", "PIL")
# These set the level of their own root logger when they are first used, so their function has to be called.
VERBOSITY = ("diffusers.utils.logging", "transformers.utils.logging", "huggingface_hub.utils.logging")

FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def apply_logging_level(level: str) -> None:
    """`level` is one of DEBUG, INFO, WARNING, ERROR, CRITICAL.

    Call it in the constructor of each replica, where Serve has set up its own logger: our lines then go where
    Serve's go. A library that is imported later keeps the level of its root logger only.
    """
    number = logging.getLevelNamesMapping()[level]
    for name in (*OURS, *LIBRARIES):
        set_level(name, number)
    for name in NEVER_BELOW_INFO:
        set_level(name, max(number, logging.INFO))
    for module in VERBOSITY:
        if module.partition(".")[0] in sys.modules:
            importlib.import_module(module).set_verbosity(number)
    for name in OURS:
        give_handlers(logging.getLogger(name))


def set_level(root: str, level: int) -> None:
    """Of the logger, of those below it with a level of their own, and of handlers that hold lines back."""
    logging.getLogger(root).setLevel(level)
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and logger.level and f"{name}.".startswith(f"{root}."):
            if logger.level != level:  # each setting clears what all loggers keep, of which there are a thousand
                logger.setLevel(level)
            for handler in logger.handlers:
                handler.setLevel(level)


def give_handlers(logger: logging.Logger) -> None:
    """Serve's handlers; outside a replica, stderr, unless somebody listens already."""
    serve = logging.getLogger(SERVE)
    if serve.handlers:
        logger.handlers = list(serve.handlers)
        logger.propagate = False
    elif not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(FORMAT))
        logger.addHandler(handler)
