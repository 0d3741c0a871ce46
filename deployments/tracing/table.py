"""SPANS: every span, a row each; docs/tracing.md shows this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PREFIX = "triptych."


@dataclass(frozen=True)
class SpanRow:
    """What a span times, and what may stand in it."""

    kind: Literal["SERVER", "CLIENT", "CONSUMER", "INTERNAL"]
    parent: str  # the name of that span, where it has one here
    what: str
    attributes: Mapping[str, str] = field(default_factory=dict)  # without the prefix -> what it is
    events: tuple[str, ...] = ()
    standard: tuple[str, ...] = ()  # attributes of the semantic conventions


# What any of them may have.
EVERYWHERE = {"cancelled": "nobody wanted it any more: a caller hung up, a replica was stopped"}
EVERYWHERE_STANDARD = {"error.type": "the class, the code or the status of what failed"}

CALL = {"attempt": "1, 2 ...: how often this request has come here"}
IN_A_STAGE = {
    "request_id": "of the request",
    "waiting_s": "from the arrival here to the begin of the work",
    "transfer_s": "from the sender to here",
    "bytes_in": "of what the stage before made",
    "bytes_out": "of what it made",
}

SPANS: dict[str, SpanRow] = {
    "request": SpanRow(
        "SERVER",
        "",
        "an HTTP request below /v1, named by its method and route",
        {
            "http_request_id": "`x-request-id` of the answer",
            "request_id": "of what is to be made; with `n` above 1 those of the pictures have -0, -1 ... after it",
            "model": "that was asked for",
            "tasks": "what the model can do",
            "n": "pictures, videos or sounds that were asked for",
            "job_id": "of the job that was made",
        },
        ("admitted",),
        (
            "http.request.method",
            "http.response.status_code",
            "http.route",
            "url.path",
            "url.scheme",
            "server.address",
            "server.port",
        ),
    ),
    "read": SpanRow("INTERNAL", "request", "the body becomes requests: files are fetched and checked", {}),
    "make": SpanRow(
        "INTERNAL",
        "request or job",
        "one picture, video or sound, from its turn to its bytes; linked to another where that makes it for both",
        {
            "request_id": "of this one",
            "model": "that makes it",
            "kind": "image, video, audio or tensors",
            "format": "of the file",
            "width": "pixels, where it was asked for",
            "height": "pixels, where it was asked for",
            "num_frames": "where it was asked for",
            "steps": "scheduler steps that it makes",
            "seed": "of its noise",
            "deterministic": "its forwards run alone",
            "deadline_s": "seconds by which it should be done",
            "adapters": "names of its LoRAs",
            "device_s": "seconds that a device worked for it",
        },
        ("shared", "replica lost", "begun again", "refused by a replica", "waits for the device"),
    ),
    "encode": SpanRow("CLIENT", "make", "the call of an encoder, as the ingress sees it", CALL),
    "denoise": SpanRow(
        "CLIENT",
        "make",
        "the call of a denoiser, as the ingress sees it; one more for each replica that died",
        CALL
        | {"first_step": "of the checkpoint that it goes on from; 0: from the start", "last_step": "that was seen"},
        ("begun", "checkpoint held", "preview"),
    ),
    "decode": SpanRow("CLIENT", "make", "the call of a VAE, as the ingress sees it", CALL),
    "encoder": SpanRow("SERVER", "encode", "a replica runs the encoders", IN_A_STAGE),
    "denoiser": SpanRow(
        "SERVER",
        "denoise",
        "a replica denoises",
        IN_A_STAGE
        | {
            "steps": "scheduler steps that were made here",
            "first_step": "after which it began; above 0 after a resume",
            "forwards": "of the denoising models",
            "merged_forwards": "of them, those that shared a batch",
            "passes_together": "of those, the guidance passes that shared one with another pass of this request",
            "mean_batch": "forwards in a batch, over its own forwards",
            "max_batch": "forwards in the largest of its batches",
            "batch_mates": "other requests that it shared a batch with",
            "device_s": "its share of the device's seconds",
            "cached_steps": "steps that its cache skipped, of all models",
            "adapters": "names of its LoRAs",
            "deadline_s": "seconds by which it should be done",
        },
        ("resumed", "checkpoint", "preview", "deadline passed"),
    ),
    "vae": SpanRow("SERVER", "decode", "a replica decodes; also for a preview", IN_A_STAGE),
    "write": SpanRow(
        "INTERNAL",
        "decode",
        "a replica writes the files",
        {"files": "how many", "bytes_out": "of all of them"},
    ),
    "store": SpanRow(
        "INTERNAL",
        "request, make or job",
        "one file is stored, or spooled where the storage is on another machine",
        {
            "request_id": "of the request",
            "bytes_out": "of the file",
            "content_type": "of the file",
            "upload_pending": "it waits in the spool",
        },
        ("storing failed",),
    ),
    "queue": SpanRow(
        "INTERNAL", "request", "a job waits, from its begin until it was claimed first", {"job_id": "of it"}
    ),
    "job": SpanRow(
        "CONSUMER",
        "request",
        "a replica of the ingress works on a job; one more for each that took it over, in the same trace",
        {
            "job_id": "of it",
            "kind": "image, video, audio or tensors",
            "attempt": "1, 2 ...: how often it was claimed",
            "taken_over": "whether the replica before this one died with it",
            "n": "pictures, videos or sounds that it makes",
        },
    ),
    "webhook": SpanRow(
        "CLIENT",
        "request",
        "one delivery of a job's end, which carries `traceparent` to its target",
        {"job_id": "of the job", "attempt": "1, 2 ...", "outcome": "taken, refused or failed"},
    ),
}
