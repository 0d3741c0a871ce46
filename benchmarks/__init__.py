"""Measured against something else, in one run, as ratios."""

import os

from env_config.children import without_proxy

os.environ.update(without_proxy())  # what is measured is on this machine, wherever a proxy is
