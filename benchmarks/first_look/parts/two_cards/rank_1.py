"""The other rank of a group of two, a process of its own: `python -m ...two_cards.rank_1 PLACE DEVICE small|full`."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.first_look.models import flux_transformer
from benchmarks.first_look.part import Setting
from deployments.ranks.args import ParallelArgs
from deployments.ranks.member import Built, serve_rank
from deployments.ranks.place import Place
from deployments.stage_pipeline.sessions.denoise import call_directly


def main() -> None:
    told, device, size = sys.argv[1:]
    fields = json.loads(told)
    place = Place(**fields | {"args": ParallelArgs(**fields["args"])})
    serve(place, Setting(torch.device(device), size == "small"))


def serve(place: Place, setting: Setting) -> None:
    """Until rank 0 is gone; the weights are those of rank 0, by the same seed."""
    torch.set_num_threads(1 if setting.is_small else torch.get_num_threads())
    serve_rank(place, lambda: Built({"flux": flux_transformer(setting)}, setting.device, call_directly, lambda: None))


if __name__ == "__main__":
    main()
