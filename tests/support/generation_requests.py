"""A request that a storage may get files of."""

from deployments.messages import GenerationRequest, MediaKind, OutputFormat


def generation(request_id: str, kind: MediaKind = "image") -> GenerationRequest:
    return GenerationRequest(request_id, "m", {}, 0, OutputFormat(kind, "png" if kind == "image" else "mp4"))
