"""The environment of all tests: reproducible arithmetic, no network. Libraries read it when they are imported."""

from collections.abc import Mapping

from env_config.children import without_proxy

ENVIRONMENT = {
    "MKL_CBWR": "AUTO,STRICT",  # without it equal weights at different addresses give different bits
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",  # the default writes a token into the home folder
}


def environment_of_tests(given: Mapping[str, str]) -> dict[str, str]:
    """What is given stays, but the servers of the tests are on this machine, wherever a proxy is."""
    return ENVIRONMENT | dict(given) | without_proxy()
