"""What Serve imports in a replica: its class, without a collection of garbage among all that the import brings."""

import gc

# It would go through millions of objects again and again that stay: an eighth of a replica's start.
gc.disable()

from deployments.replicas.replica import StageReplica  # noqa: E402

gc.freeze()
gc.enable()

__all__ = ["StageReplica"]
