"""The error sentences of the source, for docs/error_sentences.md: `python -m tests.support.error_sentences`."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import filled, table
from tests.support.source import nodes_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/error_sentences.md"
PACKAGES = ("serve_app", "deployments", "env_config")
GAP = "…"  # stands for a value, a name, or a sentence that comes from elsewhere

# Where a sentence of each class is read. A class that is in no row fails the test of the page.
PLACES: dict[str, list[str]] = {
    "refused": [
        "AdapterNotFoundError",
        "AdapterReplacedError",
        "ConflictError",
        "DeadlineExceededError",
        "ForbiddenTargetError",
        "InvalidHostError",
        "InvalidRequestError",
        "JobNotFoundError",
        "ModelNotFoundError",
        "NotAllowedError",
        "NotSatisfiableError",
        "NotSupportedError",
        "ObjectNotFoundError",
        "PydanticCustomError",
        "RequestValidationError",
        "TooLargeForDeviceError",
    ],
    "failed": [
        "CancelAfterError",
        "DeviceFullError",
        "ErrorReport",
        "GenerationFailedError",
        "JobError",
        "JobStoreAwayError",
        "ModelLoadingError",
        "NotNumbersError",
        "OverloadedError",
        "PipelineFailedError",
        "ProfilerBusyError",
        "StageUnavailableError",
        "StartTimeoutError",
        "StorageAwayError",
        "StorageError",
    ],
    "start": [
        "AccelerationError",
        "CheckpointError",
        "ConfigShapeError",
        "ConstructorError",
        "DeviceError",
        "EnvConfigError",
        "JobStoreError",
        "Problem",
        "ProvenanceError",
        "SecretError",
        "TypeError",
        "ValueError",
    ],
    "command": [
        "ArgumentTypeError",
        "BuilderError",
        "CommandError",
        "LaunchError",
        "MisuseError",
        "NoRequestError",
        "NotPlannedError",
        "RemoteProtocolError",
        "UnknownCardError",
        "UsageError",
    ],
    "inside": [
        "ArithmeticError",
        "AssertionError",
        "AttributeError",
        "CannotMergeError",
        "CannotResumeError",
        "DamagedEntryError",
        "DisconnectionError",
        "FeedsBackError",
        "FileNotFoundError",
        "HandOffError",
        "HandOffIncompleteError",
        "JobStoreLostError",
        "KeyError",
        "LeaseLostError",
        "LookupError",
        "MediaWorkerError",
        "NoPortionsError",
        "NotSpreadError",
        "OSError",
        "OnRanksError",
        "OtherVersionError",
        "PassesApartError",
        "ReadError",
        "ReplicaRefusedError",
        "ReplicaUnfitError",
        "RowsUnknownError",
        "RuntimeError",
        "ThreadsClosedError",
        "ThreadsExhaustedError",
        "TimeoutError",
        "UnkeptError",
        "UnreadableRowError",
    ],
}


@dataclass(frozen=True, order=True)
class Sentence:
    """`text` has GAP where the source puts a value in."""

    text: str
    error: str
    file: str


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for place, lines in tables().items():
        page = filled(page, place, lines)
    PAGE.write_text(page, encoding="utf-8")


def tables() -> dict[str, list[str]]:
    """The lines of each table of the page. Raises ValueError for a class of errors that PLACES does not have."""
    place_of = {error: place for place, errors in PLACES.items() for error in errors}
    rows: dict[str, list[list[str]]] = {place: [] for place in PLACES}
    for sentence in sorted(set(sentences())):
        if sentence.error not in place_of:
            raise ValueError(f"{sentence.error} ({sentence.file}): write it into PLACES of {__name__}")
        rows[place_of[sentence.error]].append([escaped(sentence.text), f"`{sentence.error}`", f"`{sentence.file}`"])
    return {place: table(["sentence", "error", "where"], each) for place, each in rows.items()}


def sentences() -> Iterator[Sentence]:
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            nodes = nodes_of(file)
            constants = dict(constants_of(nodes))
            for node in nodes:
                if isinstance(node, ast.Call) and is_error(name_of(node.func)):
                    given = [*node.args, *(each.value for each in node.keywords if each.arg == "message")]
                    text = next(filter(None, (sentence_of(each, constants) for each in given)), None)
                    if text is not None:
                        yield Sentence(text, name_of(node.func), str(file.relative_to(ROOT)))


def is_error(name: str) -> bool:
    return name.endswith("Error") or name in ("ErrorReport", "Problem")


def name_of(function: ast.expr) -> str:
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def constants_of(nodes: tuple[ast.AST, ...]) -> Iterator[tuple[str, str]]:
    """The texts that a file gives a name in capitals, by it."""
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
            text = text_of(node.value, {})
            if text is not None:
                yield node.targets[0].id, text


def sentence_of(node: ast.expr, constants: dict[str, str]) -> str | None:
    """More than one word; None for what is a name, a code or a type."""
    text = text_of(node, constants)
    return text if text is not None and re.search(r"[A-Za-z]\S* \S", text) else None


def text_of(node: ast.expr, constants: dict[str, str]) -> str | None:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name) if name in constants:
            return constants[name]
        case ast.JoinedStr(values=values):
            return "".join(str(each.value) if isinstance(each, ast.Constant) else GAP for each in values)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            texts = [text_of(each, constants) for each in (left, right)]
            return None if texts == [None, None] else "".join(text or GAP for text in texts)
        case ast.IfExp(body=body):
            return text_of(body, constants)
    return None


def escaped(text: str) -> str:
    one_line = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"([|<*\[\]`])", r"\\\1", one_line)


if __name__ == "__main__":
    main()
