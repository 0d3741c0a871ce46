"""One Ray for all, with the application that all tests of served behaviour share."""

from tests.support.served_fixtures import flux_checkpoint, metrics_port, s3, served

__all__ = ["flux_checkpoint", "metrics_port", "s3", "served"]
