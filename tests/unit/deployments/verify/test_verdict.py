"""A report says what was asked, what each part did, and what follows, in words and as JSON."""

from __future__ import annotations

from deployments.verify.process import REPORT
from deployments.verify.verdict import Difference, Report, Verdict

SAME = Verdict("encoder", "same bits", "2 calls")
WRONG = Verdict(
    "vae", "differs", "", tuple(Difference(f"images[{i}]", "3 of 4 elements differ", 0.1) for i in range(5))
)


def report(*verdicts: Verdict, problem: str = "") -> Report:
    return Report("m", "ToyPipeline", "cpu", "bfloat16", {"prompt": "'a'", "width": "64"}, verdicts, problem)


def test_a_report_passes_where_no_part_differs_or_fails() -> None:
    bounded = Verdict("merged", "within bounds", "")
    assert report(SAME, bounded, Verdict("resumed", "does not apply", "")).passed
    assert not report(SAME, WRONG).passed
    assert not report(SAME, Verdict("encoder", "fails", "TypeError: no")).passed


def test_a_report_without_verdicts_or_with_a_problem_does_not_pass() -> None:
    assert not report().passed
    assert not report(SAME, problem="no memory").passed
    assert report(problem="no memory").conclusion == "m could not be checked: no memory"


def test_the_conclusion_names_the_first_part_that_differs_and_where() -> None:
    also = Verdict("resumed", "fails", "TypeError: no")
    assert report(SAME, WRONG, also).conclusion == (
        "m: the split does not make what the unsplit ToyPipeline makes. vae differs: images[0]: 3 of 4 elements "
        "differ; images[1]: 3 of 4 elements differ; images[2]: 3 of 4 elements differ; and 2 more "
        "(and the verdicts on resumed)"
    )
    assert report(SAME).conclusion == "m: the split makes what the unsplit ToyPipeline makes"


def test_the_lines_are_the_request_the_verdicts_in_columns_and_the_conclusion() -> None:
    head, first, second, last = report(SAME, Verdict("denoiser", "within bounds", "by hand-off")).lines()
    assert head == "ToyPipeline on cpu, bfloat16: prompt 'a', width 64"
    assert first == "  encoder   same bits      2 calls"
    assert second == "  denoiser  within bounds  by hand-off"
    assert last.startswith("m: the split makes")
    assert report(problem="no").lines()[-1] == "m could not be checked: no"


def test_a_report_crosses_a_process_as_json() -> None:
    for each in (report(SAME, WRONG), report(problem="no")):
        assert REPORT.validate_json(REPORT.dump_json(each)) == each
