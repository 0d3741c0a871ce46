"""`python -m tests.support.tiny_models ROOT [NAME ...]` builds checkpoint folders and prints one line for each."""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import diffusers
import transformers

from tests.support.tiny_models import TINY_MODELS, checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.tiny_models", description=__doc__)
    parser.add_argument("root", type=Path, metavar="ROOT")
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(TINY_MODELS))
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.names) - set(TINY_MODELS))
    if unknown:
        parser.error(f"no tiny model is called {', '.join(unknown)}; there are {', '.join(TINY_MODELS)}")
    _silence()
    for name in arguments.names:
        start = time.perf_counter()
        folder = checkpoint(name, arguments.root)
        num_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name:22s} {num_bytes / 1e6:5.2f} MB {time.perf_counter() - start:5.2f} s", flush=True)


def _silence() -> None:
    warnings.filterwarnings("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
