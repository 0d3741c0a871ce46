"""Errors of what the ranks say to each other, in whichever words: no forward is to blame, and none will do better."""

from __future__ import annotations

import re

# torch's classes (DistBackendError, DistNetworkError ...), NCCL, and gloo's sockets, which raise RuntimeErrors. gloo's
# other sentences, such as of sizes, are a forward's own.
_OF_THE_CONNECTION = re.compile(
    r"\bDist(?:Backend|Network|Store)?Error\b|gloo/transport|\bNCCL (?:error|communicator)|nccl\w*Error"
    r"|Connection (?:closed|reset|refused)|Broken pipe|Timed out waiting \d+ ?ms",
    re.IGNORECASE,
)


def is_of_connection(reason: str) -> bool:
    """`reason`: as `reason_of` tells an error."""
    return bool(_OF_THE_CONNECTION.search(reason))
