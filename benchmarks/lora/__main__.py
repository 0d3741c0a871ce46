"""What LoRAs cost: `python -m benchmarks.lora [--rounds N]`; the tables go to docs/benchmarks/lora.md.

Eight requests at a time with eight LoRAs, with one, with none, and one after another with the LoRA set for each; then
500 requests over 40 LoRAs where 8 fit into memory. With `--kills N` the same again through replicas on a Ray of their
own, whose denoisers are killed N times meanwhile: each request must end with the bytes of an undisturbed one.

Ratios are medians over rounds in which the ways take turns, because the machine may have other work. One thread of
arithmetic.
"""

from __future__ import annotations

import os

from benchmarks.served import ONE_THREAD

os.environ.update(ONE_THREAD)  # before torch is imported, and Ray starts workers
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from benchmarks import report
from benchmarks.engine import Row
from benchmarks.lora import churn, throughput

TITLES = {
    "throughput": "Eight requests of 20 steps at a time: pictures a second, "
    + "; ".join(f"`{name}`: {what}" for name, what in throughput.WAYS.items())
    + ". `lone_beside_to_lone`: one request without LoRAs, in the process that holds eight to that of none.",
    "churn": "Requests over more LoRAs than fit, eight at a time, by Zipf's law; each is compared with the same "
    "request alone. A tenth has no LoRA, 15 % have two. An error would end the run.",
    "kills": "The same load through an encoder, two denoisers and a VAE on Ray. Each kill ends a denoiser at work by "
    "SIGKILL; every request is compared with the same one undisturbed, byte for byte. An error, or another byte, "
    "would end the run.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns that each median is taken over; 0: leave it out")
    parser.add_argument("--requests", type=int, default=500, help="of the load; 0: leave it out")
    parser.add_argument("--loras", type=int, default=40, help="that the load asks for")
    parser.add_argument("--budget", type=int, default=8, help="LoRAs that fit on the device; twice as many on the host")
    parser.add_argument("--kills", type=int, default=0, help="of denoisers during the load, on Ray")
    parser.add_argument("--output", type=Path, default=report.DOCS, help="folder for lora.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("serve_app").setLevel(logging.ERROR)
    results: dict[str, list[Row]] = {name: [] for name in TITLES}

    def note(section: str, row: Row) -> None:
        """Written at once: a run that is ended early leaves what it has measured."""
        results[section].append(row)
        content = {"machine": report.machine(), **vars(options), "output": str(options.output), **results}
        report.write("lora", content, as_markdown(results), options.output)

    if options.rounds:
        throughput.measure(options.rounds, lambda row: note("throughput", row))
    load = options.requests, options.loras, options.budget
    if options.requests:
        with tempfile.TemporaryDirectory() as folder:
            note("churn", churn.measure(Path(folder), *load))
    if options.requests and options.kills:
        from benchmarks.lora import kills  # it imports Ray

        with tempfile.TemporaryDirectory() as folder:
            note("kills", kills.measure(Path(folder), *load, options.kills))


def as_markdown(results: dict[str, list[Row]]) -> list[str]:
    how_measured = " ".join((__doc__ or "").strip().rsplit("\n\n", 1)[-1].split())
    lines = ["# LoRA", "", f"Made by `python -m benchmarks.lora`; {how_measured}"]
    for name, rows in results.items():
        if rows:
            lines += ["", f"## {name.capitalize()}", "", TITLES[name], ""]
            lines += upright(rows)
    return lines


def upright(rows: list[Row]) -> list[str]:
    """A figure in each line, a row of the results in each column."""
    heads = ["", *(str(row.get("model", "")) for row in rows)]
    figures = [name for name in rows[0] if name != "model"]
    return report.table(heads, [[name.replace("_", " "), *(shown(row[name]) for row in rows)] for name in figures])


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
