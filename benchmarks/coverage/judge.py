"""The verdict on one configuration of a pipeline: the stages against the unsplit pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.coverage.cases import Case
from benchmarks.coverage.checkpoint import TestCall
from benchmarks.coverage.engine import EngineProcesses
from benchmarks.coverage.processes import Failure, RemoteError, failure_of, in_own_process
from benchmarks.coverage.rows import MAX_REASON, PASSED, EngineFound, Found, Verdict
from benchmarks.coverage.stages import StageProcesses, http_fields
from benchmarks.coverage.unsplit import Leaves, all_finite, call_unsplit, compare, load_unsplit

BROKE = "GenerationFailedError"  # ours by name, but nobody refused anything


@dataclass(frozen=True)
class Truth:
    """What the unsplit pipeline makes of the arguments."""

    arguments: dict[str, Any]
    leaves: Leaves
    output_type: str


def judge_in_own_process(case: Case, placement: str, with_engine: bool, timeout_s: float) -> Found:
    """Nothing that a pipeline does can harm the next."""
    try:
        found: Found = in_own_process(lambda: judge(case, placement, with_engine), timeout_s)
    except TimeoutError as error:
        return Found("not_judged", str(error))
    except ChildProcessError as error:
        return Found("failed", str(error))
    return found


def judge(case: Case, placement: str, with_engine: bool) -> Found:
    with TemporaryDirectory() as place:
        folder = Path(place) / case.folder
        stages = StageProcesses(folder, placement)  # all are forked before torch has worked in this process
        engines = EngineProcesses(folder) if with_engine else None
        try:
            return _judge_case(case, folder, stages, engines)
        finally:
            stages.stop()
            if engines:
                engines.stop()


def _judge_case(case: Case, folder: Path, stages: StageProcesses, engines: EngineProcesses | None) -> Found:
    try:
        call = case.save(folder)
    except BaseException as error:  # noqa: BLE001  (a test may also skip itself)
        return _not_judged("its tiny components cannot be built here", error)
    truth = _truth(folder, call)
    if isinstance(truth, Found):
        return truth
    found = _judge_split(folder, truth, stages)
    if engines and found.verdict in PASSED:
        return _with_engine(found, engines.judge(truth.arguments))
    return found


def _truth(folder: Path, call: TestCall) -> Truth | Found:
    """Called as Triptych calls it, for tensors; as its test does, where it cannot make them."""
    try:
        pipeline = load_unsplit(folder)
    except Exception as error:  # noqa: BLE001
        return _not_judged("the unsplit pipeline cannot be loaded here", error)
    try:
        return Truth(call.arguments, call_unsplit(pipeline, call.arguments), "pt")
    except Exception as error:  # noqa: BLE001
        if call.output_type in (None, "pt"):
            return _not_judged("the unsplit pipeline fails here", error)
    assert call.output_type is not None
    try:
        leaves = call_unsplit(pipeline, call.arguments, call.output_type)
    except Exception as error:  # noqa: BLE001
        return _not_judged("the unsplit pipeline fails here", error)
    return Truth(call.arguments | {"output_type": call.output_type}, leaves, call.output_type)


def _judge_split(folder: Path, truth: Truth, stages: StageProcesses) -> Found:
    try:
        stages.load()
        made = stages.generate(truth.arguments)
    except RemoteError as error:
        if not all_finite(truth.leaves):
            return Found("not_judged", "with its tiny components the unsplit pipeline makes values that are no numbers")
        return _of_failure(error.failure)
    outcome, difference = compare(made.leaves, truth.leaves)
    if outcome == "nothing":
        return Found("not_judged", "its output has nothing to compare")
    if outcome == "differs":
        again = call_unsplit(load_unsplit(folder), _without_output_type(truth), truth.output_type)
        if compare(again, truth.leaves)[0] != "same":
            return Found("not_judged", "called twice, the unsplit pipeline makes different bytes")
        return Found("wrong", difference)
    found = Found("remote_calls" if made.by_remote_calls else "hand_off")
    try:  # the answer, besides the numbers
        description = stages.describe()
        found = replace(
            found,
            makes=description.media_kind,
            tasks=tuple(description.tasks),
            fields=http_fields(description),
        )
        if not stages.count_files(made, description.media_kind):
            return replace(found, verdict="failed", reason="no file is made of its output")
    except RemoteError as error:
        failed = _of_failure(error.failure)
        return replace(found, verdict=failed.verdict, reason=failed.reason, trace=failed.trace)
    return found


def _with_engine(found: Found, engine: EngineFound) -> Found:
    if not engine.problems:
        return replace(found, engine=engine)
    verdict: Verdict = "wrong" if any("differ" in problem for problem in engine.problems) else "failed"
    return replace(found, verdict=verdict, reason="; ".join(engine.problems), engine=engine, trace=engine.trace)


def _of_failure(failure: Failure) -> Found:
    is_refused = failure.is_ours and BROKE not in failure.kinds
    return Found("refused" if is_refused else "failed", failure.sentence(), failure.trace)


def _without_output_type(truth: Truth) -> dict[str, Any]:
    return {name: value for name, value in truth.arguments.items() if name != "output_type"}


def _not_judged(what: str, error: BaseException) -> Found:
    failure = failure_of(error)
    return Found("not_judged", f"{what}: {failure.sentence()}"[:MAX_REASON], failure.trace)
