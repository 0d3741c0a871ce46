"""The features of one request taken together: who is wanted, what surrounds a forward, what is kept and said."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deployments.engine.forward import PerSample
from deployments.errors import InvalidRequestError
from deployments.features.feature import NOTHING, Feature, Fetched, Summary, Surrounding
from deployments.features.in_use import LEFT_OUT, FeaturesInUse, begin_features, fetch_features, wanted_features
from deployments.messages import GenerationRequest, OutputFormat
from env_config.variables import EnvConfig

ENV = EnvConfig.from_environ({})


class Played:
    """A feature in use that answers what it was told to."""

    def __init__(self, around: Surrounding = NOTHING, state: Any = None, summary: Summary | None = None) -> None:
        self.around = around
        self.state = state
        self.said = summary
        self.has_ended = False

    def surround(self, component: str, module: Any) -> Surrounding:
        return self.around

    def snapshot(self) -> Any:
        return self.state

    def end(self) -> None:
        self.has_ended = True

    def summary(self) -> Summary | None:
        return self.said


def row(name: str) -> Feature:
    return Feature(name, lambda env, asked: asked, lambda *_: Played())


def request(**features: Any) -> GenerationRequest:
    return GenerationRequest("r", "model", {}, 0, OutputFormat("image", "png"), features=features)


def noting(entered: list[str], name: str) -> Any:
    @contextmanager
    def enter() -> Iterator[None]:
        entered.append(name)
        yield
        entered.append(f"left {name}")

    return enter


def test_a_request_gets_the_features_that_it_asks_for_in_the_order_of_their_rows() -> None:
    rows = (row("a"), row("b"), row("c"))
    wanted = wanted_features(rows, ENV, request(c={"x": 1}, a=2))
    assert [(feature.name, options) for feature, options in wanted] == [("a", 2), ("c", {"x": 1})]


def test_an_unknown_feature_is_refused_by_name_with_what_there_is() -> None:
    with pytest.raises(InvalidRequestError, match="unknown feature 'd'; known are a, b"):
        wanted_features((row("a"), row("b")), ENV, request(d={}))
    with pytest.raises(InvalidRequestError, match="unknown feature 'd'; there are none here"):
        wanted_features((), ENV, request(d={}))


def test_features_that_leave_a_forward_as_it_is_leave_its_merge_key_too() -> None:
    assert FeaturesInUse({}).surround("transformer", None) == Surrounding(None, ())
    assert FeaturesInUse({"a": Played(), "b": Played()}).surround("transformer", None) == Surrounding(None, ())


def test_merge_keys_are_told_apart_by_feature_and_one_that_forbids_sharing_forbids_it_for_all() -> None:
    a, b = Played(Surrounding(None, "key")), Played(Surrounding(None, "other"))
    alone = Played(Surrounding(None, None))
    assert FeaturesInUse({"a": a, "b": b}).surround("t", None).merge_key == (("a", "key"), ("b", "other"))
    assert (
        FeaturesInUse({"b": a}).surround("t", None).merge_key != FeaturesInUse({"a": a}).surround("t", None).merge_key
    )
    assert FeaturesInUse({"a": a, "b": alone}).surround("t", None).merge_key is None


@pytest.mark.parametrize(
    ("names", "expected"), [("a", ["a", "left a"]), ("ab", ["a", "b", "left b", "left a"])], ids=["one", "two"]
)
def test_surroundings_are_entered_in_order_and_anew_each_time(names: str, expected: list[str]) -> None:
    entered: list[str] = []
    in_use = FeaturesInUse({name: Played(Surrounding(noting(entered, name), "key")) for name in names})
    around = in_use.surround("t", None)
    assert around.enter is not None
    for _ in range(2):
        entered.clear()
        with around.enter():
            pass
        assert entered == expected


def test_what_has_nothing_to_keep_or_to_say_is_left_out() -> None:
    said = Summary({"steps": 3})
    in_use = FeaturesInUse({"a": Played(state={"x": 1}), "b": Played(summary=said)})
    assert in_use.snapshot() == {"a": {"x": 1}}
    assert in_use.summaries() == {"b": said}


def test_a_summary_that_fails_takes_no_other_with_it() -> None:
    class Fails(Played):
        def summary(self) -> Summary | None:
            raise RuntimeError("no summary")

    said = Summary({"forwards": 3})
    assert FeaturesInUse({"bad": Fails(), "good": Played(summary=said)}).summaries() == {"good": said}


def test_what_surrounds_a_forward_without_a_key_keeps_it_alone() -> None:
    around = Surrounding(noting([], "a"))
    assert FeaturesInUse({"a": Played(around)}).surround("transformer", None).merge_key is None


KEPT = {"a cache": Played(state=torch.zeros(100)), "a state": Played(state=torch.zeros(1000)), "nothing": Played()}


def test_a_cache_that_is_too_large_is_left_out_of_a_checkpoint_and_a_state_never_is() -> None:
    in_use = FeaturesInUse(KEPT, caches={"a cache"})
    assert (
        in_use.snapshot(None, must_be_whole=False).keys()
        == in_use.snapshot(400, must_be_whole=True).keys()
        == {
            "a cache",
            "a state",
        }
    )
    left = in_use.snapshot(399, must_be_whole=False)
    assert left["a cache"] == LEFT_OUT
    assert left["a state"] is KEPT["a state"].state
    assert in_use.snapshot(399, must_be_whole=True) is None, "a resume without it would not make the same bytes"


def test_a_cache_that_was_left_out_begins_anew_and_the_caller_is_told() -> None:
    begun: list[Any] = []
    cache = Feature("cache", lambda *_: True, lambda *given: begun.append(given[2]) or Played(), is_a_cache=True)
    session: Any = SimpleNamespace(saved_features={"cache": LEFT_OUT}, resumed_at=7)
    in_use = begin_features([(cache, True)], session)
    assert begun == [None]
    [warning] = in_use.warnings
    assert (warning.code, warning.param) == ("cache_lost", "cache")
    assert "step 7" in warning.message
    session.saved_features = {"cache": 5}
    assert begin_features([(cache, True)], session).warnings == ()
    assert begun[1:] == [5]


def test_what_is_fetched_before_a_request_goes_to_its_begin_and_into_its_fingerprint() -> None:
    begun: list[Any] = []

    def begin(options: Any, *_: Any) -> Played:
        begun.append(options)
        return Played()

    def fetch(adapters: Any, options: Any) -> Fetched:
        return Fetched(f"{adapters} {options}", "x1", "as it is")

    fetching = Feature("a", lambda env, asked: asked, begin, fetch=fetch)
    asked = request(a="here", b=2)
    wanted = wanted_features((fetching, row("b")), ENV, asked)
    fetched, fingerprint, found = fetch_features(wanted, "what is held", asked)  # type: ignore[arg-type]
    assert fingerprint == "a:x1"
    assert found.features == {"a": "as it is", "b": 2}
    begin_features(fetched, SimpleNamespace(saved_features={}, resumed_at=0))  # type: ignore[arg-type]
    assert begun == ["what is held here"]


def test_all_features_end_where_one_cannot_begin_or_end() -> None:
    class Failing(Played):
        def end(self) -> None:
            raise RuntimeError("the first")

    begun: list[Played] = []

    def begin(options: Any, *_: Any) -> Played:
        if options == "fails":
            raise InvalidRequestError("it cannot begin", param="c")
        begun.append(Failing() if options == "fails at its end" else Played())
        return begun[-1]

    rows = tuple(Feature(name, lambda env, asked: asked, begin) for name in "abc")
    session: Any = SimpleNamespace(saved_features={}, resumed_at=0)
    with pytest.raises(InvalidRequestError):
        begin_features(wanted_features(rows, ENV, request(a=1, b=2, c="fails")), session)
    assert [feature.has_ended for feature in begun] == [True, True]
    begun.clear()
    in_use = begin_features(wanted_features(rows, ENV, request(a=1, b="fails at its end", c=3)), session)
    with pytest.raises(RuntimeError, match="the first"):
        in_use.end()
    assert [begun[0].has_ended, begun[2].has_ended] == [True, True]


def test_what_tells_samples_apart_changes_no_merge_key() -> None:
    per_sample = PerSample(lambda values, is_even: nullcontext(), "value", "kind")
    apart = Surrounding(None, (), per_sample=per_sample)
    assert FeaturesInUse({"a": Played(), "b": Played(apart)}).surround("t", None) == apart
    both = FeaturesInUse({"a": Played(Surrounding(None, "key")), "b": Played(apart)}).surround("t", None)
    assert (both.merge_key, both.per_sample) == ((("a", "key"),), per_sample)
    with pytest.raises(ValueError, match="only one feature may tell the samples of a batch apart, not a, b"):
        FeaturesInUse({"a": Played(apart), "b": Played(apart)}).surround("t", None)
