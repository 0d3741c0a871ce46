"""The command lines of check_config, plan and verify, as parsers that import nothing heavy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from deployments.plan.cards import Card, UnknownCardError, card_of
from deployments.plan.measured import Scheme

MOST_CARDS = 64
DTYPES = ("auto", "float32", "bfloat16", "float16")  # of deployments.model, whose library is slow to import
PLACEMENTS = ("three_stage", "two_stage", "one_stage")  # those of serve_app.app
CHECK = "Check a Serve config file strictly, before anything starts: Serve itself accepts misspelt keys."
PLAN = (
    "What a model needs on a GPU, told before any weight is loaded, and what would be chosen for given cards, with the "
    "reasons. 0: something fits; 1: nothing does, or the model could not be looked at; 2: the command is wrong."
)
VERIFY = (
    "Hold the split against the unsplit pipeline: one small request through both, on your checkpoint, with a verdict "
    "for each stage. 0: they make the same; 1: they do not, or it could not be checked; 2: the command is wrong."
)


def parser_of_check() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve_app.tools.check_config", description=CHECK)
    parser.add_argument("files", nargs="+", metavar="FILE", help="Serve configs, or KubeRay RayServices")
    parser.add_argument("--gpu", type=gpu, metavar="SIZE|NAME", help="warn of what does not fit on it: 24GB, H100 ...")
    parser.add_argument("--json", action="store_true", help="the problems and the warnings of each file, as JSON")
    return parser


def parser_of_plan() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve_app.tools.plan", description=PLAN)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as at `model:` in the args of a Serve config")
    parser.add_argument("--gpu", type=gpu, required=True, metavar="SIZE|NAME", help="24GB, H100, L40S, 4090 ...")
    add_wishes(parser)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a Serve config: its model, args and variables")
    parser.add_argument("--application", metavar="NAME", help="which of those in the file")
    parser.add_argument("--name", metavar="NAME", help="which of its `models`, where it has several")
    parser.add_argument("--json", action="store_true", help="what was measured, and the plan, as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Serve config of the plan")
    return parser


def add_wishes(parser: argparse.ArgumentParser, gpus: int | None = 1) -> None:
    """What a plan is for, beside the model and the card. `gpus`: how many by default; None: those of the machine."""
    number = "1" if gpus == 1 else "1 of a --gpu, else all that are here"
    parser.add_argument(
        "--gpus", type=number_of_cards, default=gpus, metavar="N", help=f"how many of them; default: {number}"
    )
    parser.add_argument("--size", type=size, metavar="WIDTHxHEIGHT", help="pixels; default: the model's own")
    parser.add_argument("--num-frames", type=positive, metavar="N", help="of a video; default: the model's own")
    parser.add_argument("--precision", choices=get_args(Scheme), help="of the denoisers; default: what fits best")
    parser.add_argument("--placement", choices=PLACEMENTS, help="default: what fits best")
    parser.add_argument("--max-batch-size", type=positive, metavar="N", help="default: 4 pictures, 1 video, or less")
    parser.add_argument(
        "--parallel", type=ways, metavar="WAY=N", help="ranks of a denoiser, as ulysses=2,batch=2; default: if needed"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    parser.add_argument("--variant", metavar="NAME", help="of the weight files, such as fp16")
    parser.add_argument("--config-folder", metavar="FOLDER", help="settings and tokenizers of a .safetensors file")


def parser_of_verify() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serve_app.tools.verify", description=VERIFY)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="as at `model:` in the args of a Serve config")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a Serve config: its model, args and variables")
    parser.add_argument("--application", metavar="NAME", help="which of those in the file")
    parser.add_argument("--name", metavar="NAME", help="which of its `models`, where it has several")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored")
    parser.add_argument(
        "--precision", metavar="NAME", help="of the denoisers' weights, such as int8; default: as the dtype says"
    )
    parser.add_argument("--variant", metavar="NAME", help="of the weight files, such as fp16")
    parser.add_argument("--config-folder", metavar="FOLDER", help="settings and tokenizers of a .safetensors file")
    parser.add_argument("--placement", choices=PLACEMENTS, help="which stages share a process")
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--size", type=size, metavar="WIDTHxHEIGHT", help="pixels; default: as small as it may be")
    parser.add_argument("--steps", type=int, metavar="N", help="default: 3, or as many as `strength` leaves 3 of")
    parser.add_argument(
        "--argument",
        action="append",
        type=named,
        default=[],
        metavar="NAME=VALUE",
        help="a further argument of the pipeline's call, as JSON or text; @FILE is a picture. May be given repeatedly",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    return parser


# --- values ----------------------------------------------------------------------------------------------------------


def gpu(text: str) -> Card:
    """A size or a name."""
    try:
        return card_of(text)
    except UnknownCardError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be like 512x512, got {text!r}")
    return int(width), int(height)


def positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def number_of_cards(text: str) -> int:
    if positive(text) > MOST_CARDS:
        raise argparse.ArgumentTypeError(f"must be from 1 to {MOST_CARDS}, got {text!r}")
    return int(text)


def ways(text: str) -> dict[str, int]:
    """As at `parallel` in the args: `ulysses=2,batch=2`."""
    from pydantic import ValidationError

    from deployments.ranks.args import WAYS, ParallelArgs

    found: dict[str, int] = {}
    for name, _, degree in (each.strip().partition("=") for each in text.split(",")):
        if name in found or name not in WAYS or not (degree.isdecimal() and 1 < int(degree) <= MOST_CARDS):
            raise argparse.ArgumentTypeError(
                f"must be like ulysses=2,batch=2: {', '.join(WAYS)}, numbers from 2 to {MOST_CARDS}; got {text!r}"
            )
        found[name] = int(degree)
    try:
        ParallelArgs(**found)
    except ValidationError as error:
        raise argparse.ArgumentTypeError(str(error.errors()[0]["ctx"]["error"])) from error
    return found


def named(text: str) -> tuple[str, Any]:
    """A name and a value of JSON; what is no JSON is text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be like guidance_scale=3.5, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
