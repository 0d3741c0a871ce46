"""What a request says of its adapters, as it comes to the denoiser: read, or refused by the name of the field."""

from types import SimpleNamespace
from typing import Any

import pytest

from deployments.adapters.use import AdapterUse
from deployments.errors import InvalidRequestError
from deployments.features import fields_of_features
from deployments.features.lora.request import LORA, fetch, value_in, wanted
from env_config.variables import EnvConfig

ENV = EnvConfig.from_environ({})
SKETCH = AdapterUse("sketch", "/loras/sketch", scale={"transformer": 0.5, "text_encoder": 0.0})
NEON = AdapterUse("neon", "s3://loras/neon", "neon.safetensors", -1, "ab")


def test_what_the_ingress_writes_is_read() -> None:
    assert wanted(ENV, [SKETCH.plain(), NEON.plain()]) == (SKETCH, NEON)
    assert wanted(ENV, None) is None
    assert wanted(ENV, []) is None


def test_no_caller_writes_it_as_a_field_for_it_holds_places() -> None:
    assert LORA.name not in fields_of_features()


@pytest.mark.parametrize(
    "asked",
    [
        "sketch",
        {"name": "sketch"},
        ["sketch"],
        [{"name": "sketch"}],
        [{**SKETCH.plain(), "more": 1}],
        [{**SKETCH.plain(), "name": ""}],
        [{**SKETCH.plain(), "path": 3}],
        [{**SKETCH.plain(), "digest": None}],
        [{**SKETCH.plain(), "scale": "1"}],
        [{**SKETCH.plain(), "scale": True}],
        [{**SKETCH.plain(), "scale": float("nan")}],
        [{**SKETCH.plain(), "scale": {"transformer": float("inf")}}],
        [{**SKETCH.plain(), "scale": {1: 1.0}}],
        [SKETCH.plain(), SKETCH.plain()],
    ],
    ids=repr,
)
def test_what_is_no_list_of_adapters_is_refused(asked: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        wanted(ENV, asked)
    assert refused.value.param == "loras"


def test_the_digests_of_what_was_fetched_are_in_the_fingerprint_in_the_order_of_the_request() -> None:
    adapters: Any = SimpleNamespace(fetched=lambda use: SimpleNamespace(digest=f"sha of {use.name}"))
    fetched = fetch(adapters, (SKETCH, NEON))
    assert fetched.fingerprint == "sha of sketch,sha of neon"
    assert [use.digest for use in fetched.options.uses] == ["sha of sketch", "sha of neon"]
    with pytest.raises(InvalidRequestError, match="this process holds no adapters"):
        fetch(None, (SKETCH,))


def held(name: str, use: AdapterUse, *components: str) -> Any:
    return SimpleNamespace(peft_name=name, use=use, components=frozenset(components))


def test_the_scale_in_a_component_is_that_of_the_adapters_that_change_it() -> None:
    both = [held("n", NEON, "transformer"), held("s", SKETCH, "transformer", "text_encoder")]
    assert value_in("transformer", both) == (("n", -1.0), ("s", 0.5))
    assert value_in("text_encoder", both) == ()
    assert value_in("transformer_2", both) == ()
    assert value_in("transformer", [held("n", NEON, "transformer"), held("n", SKETCH, "transformer")]) == (("n", -0.5),)
