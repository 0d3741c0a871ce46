"""The logging level reaches our loggers, Serve's and the libraries', and lets no access key into the log."""

import io
import logging
import subprocess
from pathlib import Path

import boto3
import cache_dit
import diffusers
import pytest
import transformers
from botocore.config import Config
from botocore.exceptions import BotoCoreError

from deployments.observability.logging_setup import (
    LIBRARIES,
    NEVER_BELOW_INFO,
    OURS,
    SERVE,
    apply_logging_level,
)
from tests.support.forking.command import python_with_libraries

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def restore_loggers():
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    loggers += [logging.getLogger(name) for name in (*OURS, SERVE, *LIBRARIES, *NEVER_BELOW_INFO)]
    before = [(logger, logger.level, list(logger.handlers), logger.propagate) for logger in loggers]
    handler_levels = {handler: handler.level for logger in loggers for handler in logger.handlers}
    yield
    for logger, level, handlers, propagate in before:
        logger.setLevel(level)
        logger.handlers, logger.propagate = handlers, propagate
    for handler, level in handler_levels.items():
        handler.setLevel(level)


@pytest.mark.parametrize("level", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
def test_the_level_reaches_every_logger(level):
    own_level = cache_dit.logger.init_logger("cache_dit.test")  # gives each of its loggers a level
    apply_logging_level(level)
    number = getattr(logging, level)
    for name in ("deployments.weights.load", "serve_app.ingress", "env_config", "ray.serve", "CACHE_DIT"):
        assert logging.getLogger(name).getEffectiveLevel() == number
    assert diffusers.utils.logging.get_verbosity() == number
    assert transformers.utils.logging.get_verbosity() == number
    assert own_level.level == number
    assert {handler.level for handler in own_level.handlers} == {number}


def test_lines_below_the_level_are_held_back_and_the_others_go_where_serves_go():
    stream, serve = io.StringIO(), logging.getLogger(SERVE)
    serve.handlers = [logging.StreamHandler(stream)]
    apply_logging_level("WARNING")
    logging.getLogger("deployments.weights.load").info("quiet")
    logging.getLogger("deployments.weights.load").warning("loud")
    logging.getLogger("ray.serve").info("quiet too")
    logging.getLogger("ray.serve").error("loud too")
    assert stream.getvalue().splitlines() == ["loud", "loud too"]
    apply_logging_level("DEBUG")
    apply_logging_level("DEBUG")
    logging.getLogger("deployments.weights.load").debug("once")
    assert stream.getvalue().splitlines() == ["loud", "loud too", "once"]


def test_outside_a_replica_our_lines_go_to_stderr():
    program = """if True:
        import logging
        from deployments.observability.logging_setup import apply_logging_level
        apply_logging_level("INFO")
        logging.getLogger("deployments.weights.load").info("a line")
        logging.getLogger("deployments.weights.load").debug("not this")
    """
    done = subprocess.run(
        [*python_with_libraries(), "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("a line") == 1
    assert "not this" not in done.stderr


def test_at_debug_no_access_key_is_logged_by_the_s3_client():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    root_level = logging.getLogger().level
    logging.getLogger().setLevel(logging.DEBUG)
    try:
        apply_logging_level("DEBUG")
        client = boto3.session.Session().client(
            "s3",
            endpoint_url="http://127.0.0.1:9",
            region_name="us-east-1",
            aws_access_key_id="AKIA-VISIBLE",
            aws_secret_access_key="SECRET-VISIBLE",
            config=Config(retries={"total_max_attempts": 1}),
        )
        with pytest.raises(BotoCoreError):
            client.list_buckets()
        client.close()
        logging.getLogger("test").debug("the handler works")
    finally:
        logging.getLogger().removeHandler(handler)
        logging.getLogger().setLevel(root_level)
    assert "the handler works" in stream.getvalue()
    assert "VISIBLE" not in stream.getvalue()
