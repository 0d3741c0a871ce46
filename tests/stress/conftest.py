"""One Ray with the applications that the long series of kills need."""

from tests.support.served_fixtures import flux_checkpoint, metrics_port, s3, served, wan
from tests.support.video_jobs import client, http

__all__ = ["client", "flux_checkpoint", "http", "metrics_port", "s3", "served", "wan"]
