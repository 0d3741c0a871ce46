"""What a model needs on a GPU, told before any weight is loaded, and what would be chosen for given cards."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import get_args

from pydantic import ValidationError

from deployments.plan.budget import usable
from deployments.plan.choose import Placements, Plan, Wishes, choose, gb
from deployments.plan.measured import PLAIN, Measured, Scheme
from deployments.plan.process import MeasureOrder, run_measure
from deployments.plan.ranks import parallel_problem
from deployments.replicas.table import REPLICAS
from env_config.children import environment_of_children
from serve_app.app import PLACEMENTS, AppArgs, model_args
from serve_app.tools.fits import needs
from serve_app.tools.options import parser_of_plan
from serve_app.tools.planned_config import serve_config
from serve_app.tools.verify import MisuseError, chosen, served, told


@dataclass(frozen=True)
class Planned:
    """What was measured, what was chosen, and both in lines for people."""

    args: AppArgs
    measured: Measured
    plan: Plan
    lines: list[str]

    def config(self, host: str = "127.0.0.1", port: int = 8000) -> str:
        """The Serve config; something fits."""
        return serve_config(self.args, self.measured, self.plan, self.lines, host, port)


class NotPlannedError(Exception):
    """The model could not be looked at."""


def main(arguments: list[str]) -> int:
    return run(parser_of_plan().parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """`options` are those of `parser_of_plan`."""
    try:
        check_that_it_can_be_written(options)
        made = planned(options)
    except (MisuseError, ValidationError) as error:
        print(told(error), file=sys.stderr)
        return 2
    except NotPlannedError as error:
        print(error, file=sys.stderr)
        return 1
    print(as_json(made.measured, made.plan) if options.json else "\n".join(made.lines))
    if made.plan.choice is not None and options.write is not None:
        try:
            options.write.write_text(made.config(), encoding="utf-8")
        except OSError as error:
            print(f"{options.write} cannot be written ({error.strerror}): name another with --write", file=sys.stderr)
            return 1
        print(f"written: {options.write}", file=sys.stderr)
    return 0 if made.plan.choice is not None else 1


def planned(options: argparse.Namespace) -> Planned:
    """Raises MisuseError, ValidationError, NotPlannedError."""
    args, variables = served(options)
    measured = run_measure(order_of(args, options.size, options.num_frames), environment_of_children() | variables)
    if measured.problem:
        raise NotPlannedError(f"{args.model} cannot be planned for: {measured.problem}")
    wishes = Wishes(options.precision, options.placement, options.max_batch_size, options.parallel)
    check_ranks(measured, wishes, options.gpus)
    plan = choose(measured, options.gpu, options.gpus, all_placements(), wishes)
    lines = list(told_plan(measured, plan))
    if options.config is not None:
        lines += [
            "",
            "the config as it is:",
            *needs(measured, args, chosen(options.config, options.application, options.name), plan.card),
        ]
    return Planned(args, measured, plan, lines)


def check_ranks(measured: Measured, wishes: Wishes, num_cards: int) -> None:
    """Raises MisuseError for a way that the model has not, and for more ranks than there are cards."""
    size = prod((wishes.parallel or {}).values())
    if wishes.parallel is not None and size > num_cards:
        raise MisuseError(f"--parallel asks for {size} ranks, a card for each: --gpus is {num_cards}")
    if wishes.parallel is not None and (problem := parallel_problem(measured, wishes.parallel)):
        raise MisuseError(f"--parallel: {problem}")
    if "tensor" in (wishes.parallel or {}) and wishes.precision not in (None, *PLAIN):
        raise MisuseError(
            f"--parallel tensor: packed weights cannot be split, leave out --precision {wishes.precision}"
        )


def check_that_it_can_be_written(options: argparse.Namespace) -> None:
    """Raises MisuseError."""
    if options.write is not None and str(options.precision).startswith("gguf"):
        raise MisuseError("--write: GGUF needs a file, which no plan knows: write its address at `precision:` yourself")


def order_of(args: AppArgs, pixels: tuple[int, int] | None, num_frames: int | None) -> MeasureOrder:
    width, height = pixels or (None, None)
    return MeasureOrder(model=model_args(args), width=width, height=height, num_frames=num_frames)


def all_placements() -> Placements:
    """The deployments of each placement and their stages; the order is that of preference."""
    return {
        placement: tuple((name, REPLICAS[name].stages) for name in dict.fromkeys(names))
        for placement, names in PLACEMENTS.items()
    }


# --- for people ------------------------------------------------------------------------------------------------------


def told_plan(measured: Measured, plan: Plan) -> Iterator[str]:
    """Lines of text."""
    frames = f", {measured.num_frames} frames" if measured.num_frames > 1 else ""
    yield f"{measured.pipeline_class} of {measured.model}, {measured.width}x{measured.height}{frames}"
    yield ""
    yield from table(["weights in GB", "dtype", "loaded", *get_args(Scheme)], weight_rows(measured))
    yield ""
    calls = [(f"{c.component}.{c.method}", c.stage, c.peak, c.tiled) for c in measured.calls]
    rows = [
        [name, stage, f"{peak / 1e9:.2f}", "" if tiled is None else f"{tiled / 1e9:.2f}"]
        for name, stage, peak, tiled in calls
    ]
    yield from table(["activations of one sample in GB", "stage", "peak", "in tiles"], rows)
    yield ""
    cards = f"{plan.num_cards} x {plan.card.name}" if plan.num_cards > 1 else plan.card.name
    room = f"{gb(plan.card.num_bytes)}, of which {gb(usable(plan.card.num_bytes))} are counted on"
    fitting = [[row.placement, row.levers, f"{row.needed / 1e9:.1f}", "fits" if row.fits else ""] for row in plan.rows]
    yield from table([f"on one card, {plan.card.name} ({room})", "weights", "GB", ""], fitting)
    yield ""
    if plan.rank_rows:
        yield from table(
            ["the denoiser over ranks, a card for each", "weights", "activations", "GB", ""], rank_cells(plan)
        )
        yield ""
    if plan.choice is None:
        yield f"for {cards}: nothing fits"
    else:
        shared = ", ".join(f"{name} {share:g}" for name, share in plan.num_gpus.items())
        yield f"for {cards}: {plan.choice.placement}, {plan.choice.levers}; num_gpus: {shared}"
    yield from (f"- {reason}" for reason in plan.reasons)
    yield from (f"- {note}" for note in measured.notes)


def rank_cells(plan: Plan) -> list[list[str]]:
    """Of one sample, with weights as they are loaded."""
    return [
        [
            f"{row.num_ranks} by {row.way}" if row.way else "one card",
            *(f"{each / 1e9:.1f}" for each in (row.weights, row.activations, row.needed)),
            "fits" if row.fits else "",
        ]
        for row in plan.rank_rows
    ]


def weight_rows(measured: Measured) -> Iterator[list[str]]:
    for each in measured.components:
        stages = f"{each.name} ({', '.join(each.stages)})"
        cells = [f"{each.weights[s] / 1e9:.2f}" if s in each.weights else "" for s in get_args(Scheme)]
        yield [stages, "quantised" if each.is_quantised else each.dtype, f"{each.loaded / 1e9:.2f}", *cells]


def table(heads: Sequence[str], rows: Iterator[list[str]] | list[list[str]]) -> Iterator[str]:
    cells = [list(heads), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def as_json(measured: Measured, plan: Plan) -> str:
    chosen = asdict(plan) | {"card": asdict(plan.card), "num_gpus": dict(plan.num_gpus)}
    return json.dumps({"measured": asdict(measured), "plan": chosen}, indent=2, default=sorted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
