"""The application that makes videos, beside the first."""

from tests.support.served_fixtures import metrics_port, wan
from tests.support.video_jobs import client, http

__all__ = ["client", "http", "metrics_port", "wan"]
