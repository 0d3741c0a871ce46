"""Where the time of one served request went, by three clocks: the client's, the ingress' and the stages' own."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from benchmarks.report import table

# part -> (its kind, what it is), in the order of a request's way
PARTS = {
    "http": ("HTTP", "the client, Serve's proxy, to the ingress and back"),
    "ingress": ("ingress", "the ingress until it asks the encoder: parsing, validation, admission"),
    "to_encoder": ("hop", "to the encoder"),
    "encoder_queue": ("queue", "waiting for the encoder"),
    "encoder": ("compute", "encoding the text"),
    "to_denoiser": ("transfer", "to the denoiser, with what was encoded"),
    "denoiser_queue": ("queue", "waiting for the denoiser"),
    "forwards": ("compute", "forwards of the denoiser"),
    "loop": ("loop", "the denoiser's loop besides its forwards"),
    "to_vae": ("transfer", "to the VAE, with the latents"),
    "vae_queue": ("queue", "waiting for the VAE"),
    "vae": ("compute", "decoding"),
    "media": ("media", "writing the file"),
    "back": ("hop", "back to the ingress, with the file"),
    "asked": ("records", "asking the stages for these figures (only with stage logging)"),
    "store": ("upload", "upload to S3, its URL, and the answer"),
    "not_attributed": ("not attributed", "not attributed"),
}
COMPUTE = ("encoder", "forwards", "vae", "media")  # of the pipeline in process: what nobody can do without


def attribute(client_s: float, server_timing: str, line: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each of PARTS, which sum to `client_s`; `line` is the request's in requests.jsonl.

    Each part is measured by itself, so a gap or an overlap shows as `not_attributed`. The two hops from and to the
    ingress are differences of times with milliseconds, so right to one, and in the mean of many.
    Raises ValueError for a line of a request that did not go once through each stage.
    """
    if line["outcome"] != "ok" or [stage["stage"] for stage in line["stages"]] != ["encoder", "denoiser", "vae"]:
        raise ValueError(f"not once through each stage: {line}")
    make_s, answer_s = server_seconds(server_timing)
    encoder, denoiser, vae = line["stages"]
    began_s = at(line["started_at"])
    seconds = {
        "http": client_s - make_s - answer_s,
        "ingress": make_s - line["total_s"] - line["asked_s"],
        "to_encoder": at(encoder["started_at"]) - encoder["queue_s"] - began_s,
        "encoder_queue": encoder["queue_s"],
        "encoder": encoder["compute_s"],
        "to_denoiser": denoiser["transfer_s"],
        "denoiser_queue": denoiser["queue_s"],
        "forwards": line["seconds"]["denoiser_forwards"],
        "loop": denoiser["compute_s"] - line["seconds"]["denoiser_forwards"],
        "to_vae": vae["transfer_s"],
        "vae_queue": vae["queue_s"],
        "vae": vae["compute_s"],
        "media": line["seconds"]["encode_media"],
        "back": began_s + line["total_s"] - at(vae["started_at"]) - vae["compute_s"] - line["seconds"]["encode_media"],
        "asked": line["asked_s"],
        "store": answer_s,
    }
    return seconds | {"not_attributed": client_s - sum(seconds.values())}


def server_seconds(server_timing: str) -> tuple[float, float]:
    """The `make` and `answer` of an answer's `server-timing`."""
    found = {name: float(ms) / 1e3 for name, ms in re.findall(r"(\w+);dur=([\d.]+)", server_timing)}
    return found["make"], found["answer"]


def at(started_at: str) -> float:
    return datetime.fromisoformat(started_at).timestamp()


def typical(requests: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each part over the middle half of the requests by their whole time: an interquartile mean.

    As sturdy as medians, which do not add up (that of a sum is not the sum of those of its terms); these do.
    """
    ranked = sorted(requests, key=lambda request: sum(request.values()))
    cut = len(ranked) // 4
    middle = ranked[cut : len(ranked) - cut]
    return {name: statistics.fmean(request[name] for request in middle) for name in requests[0]}


def by_kind(seconds: Mapping[str, float]) -> dict[str, float]:
    """The same seconds summed by their kind."""
    sums: dict[str, float] = {}
    for name, value in seconds.items():
        sums[PARTS[name][0]] = sums.get(PARTS[name][0], 0.0) + value
    return sums


def describe(served: Sequence[Mapping[str, float]], alone: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Requests by their parts beside as many calls in process, made by turns; those have the parts of compute and
    `loop`, all else that the pipeline does.

    The ratios are medians of those of neighbours, so that a noisy minute hits both.
    """
    parts, parts_alone = typical(served), typical(alone)
    ratios = [sum(a.values()) / compute_of(b) for a, b in zip(served, alone, strict=True)]
    return {
        "requests": len(served),
        "served_s": sum(parts.values()),
        "in_process_s": sum(parts_alone.values()),
        "compute_alone_s": compute_of(parts_alone),
        "ratio_to_compute_alone": statistics.median(ratios),
        "quartiles_of_ratio": statistics.quantiles(ratios, n=4),
        "ratio_to_in_process": statistics.median(
            sum(a.values()) / sum(b.values()) for a, b in zip(served, alone, strict=True)
        ),
        "parts_s": parts,
        "kinds_s": by_kind(parts),
        "in_process_parts_s": parts_alone,
        "largest_not_attributed_s": max(abs(request["not_attributed"]) for request in served),
    }


def compute_of(seconds: Mapping[str, float]) -> float:
    return sum(seconds[name] for name in COMPUTE)


def as_table(row: Mapping[str, Any]) -> list[str]:
    """The lines of a Markdown table of what `describe` found, in milliseconds."""
    served, alone = row["parts_s"], row["in_process_parts_s"]
    rows = [(kind, what, ms(served[name]), ms(alone.get(name))) for name, (kind, what) in PARTS.items()]
    rows.append(("", "**sum**", f"**{ms(row['served_s'])}**", f"**{ms(row['in_process_s'])}**"))
    return table(("kind", "part", "served (ms)", "in process (ms)"), rows)


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"
