"""The page of models says what was found of every class that diffusers exports."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.coverage.exported import exported_modular_pipelines, exported_pipelines, family_of
from benchmarks.coverage.page import PAGE, page_of
from benchmarks.coverage.processes import Failure, RemoteError, Worker, in_own_process
from benchmarks.coverage.rows import EngineFound, Found, Row, is_missing, newest, read_rows, row_of, write_rows
from benchmarks.report import table_in

PASSES = Found("hand_off", makes="image", tasks=("text_to_image",), fields=("size",))
REFUSED = Found("refused", "it makes coffee")
EMPTY_PAGE = "".join(
    f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("coverage", "families", "pipelines", "modular pipelines")
)


def test_the_page_is_made_of_the_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page_of(text, list(read_rows().values())) == text, "python -m benchmarks.coverage --page"


def test_every_exported_pipeline_has_a_row() -> None:
    exported = {*exported_pipelines(), *exported_modular_pipelines()}
    assert len(exported) > 300
    assert set(read_rows()) == exported, "python -m benchmarks.coverage --missing"


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    rows = [Row("B", "hand_off", fields=("size",), batched=False), Row("A", "refused", "it | cannot")]
    write_rows(rows, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == {"A": rows[1], "B": rows[0]}
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()[0]) < 80, "what is not known is left out"


def test_the_worst_configuration_decides_for_its_class() -> None:
    wrong, failed = Found("wrong", "they differ"), Found("failed", "KeyError: 'a'")
    row = row_of("A", [PASSES, failed, wrong, REFUSED])
    assert (row.verdict, row.reason) == ("wrong", "1 of 4 configurations, wrong: they differ")
    assert row_of("A", [failed]).reason == "KeyError: 'a'"


def test_a_class_passes_where_one_of_its_configurations_is_refused_and_says_it() -> None:
    row = row_of("A", [REFUSED, PASSES, Found("not_judged", "no network")])
    assert (row.verdict, row.reason) == ("hand_off", "1 of 2 configurations, refused: it makes coffee")
    assert (row.makes, row.fields, row.configurations) == ("image", ("size",), 2)


def test_a_class_is_not_judged_where_none_of_its_configurations_is() -> None:
    assert row_of("A", [Found("not_judged", "no network")]) == Row("A", "not_judged", "no network")


def test_a_class_is_resumable_where_all_that_was_tried_is() -> None:
    def found(resumable: bool | None) -> Found:
        return Found("hand_off", engine=EngineFound(batched=True, merged_deviation=1e-6, resumable=resumable))

    assert row_of("A", [found(True), found(None)]).resumable is True
    assert row_of("A", [found(True), found(False)]).resumable is False
    assert row_of("A", [found(None)]).resumable is None


def test_the_page_counts_the_verdicts_and_lists_each_family() -> None:
    rows = [
        Row(
            "FluxPipeline",
            "hand_off",
            makes="image",
            tasks=("text_to_image",),
            fields=("size",),
            batched=True,
            merged_deviation=1e-6,
        ),
        Row("FluxFillPipeline", "refused", "it | cannot", run="today"),
        Row("WanModularPipeline", "not_judged", "no network", run="today"),
    ]
    page = page_of(EMPTY_PAGE, rows)
    assert "| bit-identical by hand-off | 1 | 0 |" in table_in(page, "coverage")
    assert "* 2 rows: today." in table_in(page, "coverage")
    assert "| FLUX.1 | `FluxPipeline` | `FluxFillPipeline` |  |" in table_in(page, "families")
    assert table_in(page, "pipelines")[2:] == [
        r"| `FluxFillPipeline` | refused: it \| cannot |  |  |  |  |  |",
        "| `FluxPipeline` | bit-identical by hand-off | text to image | yes |  |  | `size` |",
    ]
    assert len(table_in(page, "modular pipelines")) == 3


def test_the_longest_beginning_names_the_family() -> None:
    assert [family_of(name) for name in ("Flux2KleinPipeline", "FluxPipeline", "DDPMPipeline")] == [
        "FLUX.2", "FLUX.1", None,
    ]  # fmt: skip


def test_nothing_that_a_case_does_harms_the_next() -> None:
    assert in_own_process(lambda: (1, "two"), timeout_s=60) == (1, "two")
    with pytest.raises(ChildProcessError):
        in_own_process(lambda: os._exit(3), timeout_s=60)
    with pytest.raises(TimeoutError):
        in_own_process(lambda: time.sleep(600), timeout_s=0.1)


class Echo:
    def __init__(self, prefix: str, ask_stage: object) -> None:
        self.prefix, self.ask_stage = prefix, ask_stage

    def say(self, word: str) -> str:
        return self.prefix + word

    def ask_other(self) -> str:
        return str(self.ask_stage("vae", "decode"))  # type: ignore[operator]

    def die(self) -> None:
        os._exit(1)


def test_a_worker_answers_and_its_errors_and_its_end_are_told() -> None:
    worker = Worker(Echo, ">")
    assert worker.ask("say", "a") == ">a"
    assert worker.ask("ask_other", answer=lambda stage, call: f"{stage} {call}") == "vae decode"
    with pytest.raises(RemoteError) as error:
        worker.ask("no_such_method")
    assert (error.value.failure.kind, error.value.failure.is_ours) == ("AttributeError", False)
    with pytest.raises(RemoteError, match="ended in die"):
        worker.ask("die")
    worker.stop()


def dies_with_two_workers() -> None:
    _workers = Worker(Echo, "a"), Worker(Echo, "b")
    os._exit(1)


def test_workers_end_with_the_process_that_started_them() -> None:
    with pytest.raises(ChildProcessError):
        in_own_process(dies_with_two_workers, timeout_s=200)


def test_a_sentence_has_no_path_of_this_machine() -> None:
    failure = Failure("OSError", "no file\n  in '/tmp/a b/c' or /var/x/y.json, or a/b", "", False)
    assert "/tmp" not in failure.sentence()
    assert "/var" not in failure.sentence()
    assert failure.sentence().startswith("OSError: no file in ")
    assert Failure("CheckpointError", "there is none", "", True).sentence() == "there is none"


def test_a_class_is_missing_until_it_is_judged_and_with_the_engine_until_that_was_tried() -> None:
    passed, tried = Row("A", "hand_off"), Row("A", "remote_calls", batched=False)
    refused, unjudged = Row("A", "refused"), Row("A", "not_judged")
    assert [is_missing(row, False) for row in (None, unjudged, passed, refused)] == [True, True, False, False]
    assert [is_missing(row, True) for row in (None, unjudged, passed, refused, tried)] == [True] * 3 + [False] * 2


def test_a_class_stays_judged_where_a_later_run_could_not_judge_it() -> None:
    passed, failed, unjudged = Row("A", "hand_off"), Row("A", "failed"), Row("A", "not_judged", "it took longer")
    assert newest(passed, unjudged) is passed
    assert newest(passed, failed) is failed
    assert newest(None, unjudged) is unjudged
