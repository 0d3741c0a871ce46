"""One Ray with the applications that the long series of kills need."""

import json
import os

from tests.support.served_fixtures import flux_checkpoint, metrics_port, s3, served, wan
from tests.support.video_jobs import client, http

# One simulated device, which Ray cannot find by itself: tests/support/dying_device.py.
os.environ["RAY_OVERRIDE_RESOURCES"] = json.dumps({"NPU": 1})

__all__ = ["client", "flux_checkpoint", "http", "metrics_port", "s3", "served", "wan"]
