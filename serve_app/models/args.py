"""What the ingress is told of each model, and how callers name them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from deployments.adapters.args import Adapter
from env_config.closest import did_you_mean
from serve_app.adapters.configured import check_arguments, check_configured
from serve_app.adapters.names import AdapterName, adapter_in
from serve_app.making.admission import AdmissionArgs
from serve_app.requests.limits import RequestLimits

# What is asked for, by the route and the body: each may have a model of its own where the body names none.
Purpose = Literal["image", "edit", "video", "audio", "tensors"]

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
MAX_ALIAS_CHARS = 128


class SleepArgs(BaseModel):
    """What requests do that come to a model while it is asleep: `min_replicas: 0` of its deployments lets it sleep."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_wait_s: float = Field(
        60,
        ge=0,
        description="seconds that a request waits which is answered at once; for longer loads it gets 503 with "
        "Retry-After. Streams and jobs wait as long as it takes",
    )


class ServedModelArgs(BaseModel):
    """The arguments of one model that the ingress works by."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    default_arguments: dict[str, JsonValue] = Field(
        default_factory=dict, description="arguments of the pipeline's call that a request may override"
    )
    quality: dict[str, dict[str, JsonValue]] = Field(
        default_factory=dict,
        description="levels of OpenAI's `quality` and the arguments of each, such as `low: {num_inference_steps: 4}`",
    )
    adapters: dict[AdapterName, Adapter] = Field(
        default_factory=dict,
        description="LoRAs that requests may name: a path, or `{path, weight_name, scale, preload}`, by name",
    )
    model_keys: tuple[str, ...] = Field(
        (), description="labels of api_keys_file whose keys may use the model; for others it is not there; empty: all"
    )
    limits: RequestLimits = Field(default_factory=RequestLimits, description="what a request may ask for at most")
    admission: AdmissionArgs = Field(
        default_factory=AdmissionArgs, description="how much may wait in an ingress replica before it answers 429"
    )

    sleep: SleepArgs = Field(default_factory=SleepArgs, description="how requests wait for a model that is asleep")

    @model_validator(mode="after")
    def check_its_arguments(self) -> Self:
        """Raises ValueError."""
        levels = [(f"quality.{level}", arguments) for level, arguments in self.quality.items()]
        check_arguments([("default_arguments", self.default_arguments), *levels])
        return self


def check_model_name(name: str) -> str:
    """Raises ValueError. The name of one of several models is a part of deployments' names and logs' paths."""
    if not re.fullmatch(NAME_PATTERN, name, re.ASCII):
        raise ValueError(
            f"{name[:80]!r} must be 1 to 64 of the letters A to Z, digits, '.', '_' and '-', and begin with a letter "
            "or a digit; `aliases` may be other names"
        )
    return name


def check_alias(name: str) -> str:
    """Raises ValueError. Names stand in bodies and in addresses, where such characters are refused or lost."""
    if name != name.strip() or any(unicodedata.category(each) in ("Cc", "Cs") for each in name):
        raise ValueError(f"{name[:80]!r} must not begin or end with a space, and have no control characters")
    return name


ModelName = Annotated[str, AfterValidator(check_model_name)]
Alias = Annotated[str, Field(min_length=1, max_length=MAX_ALIAS_CHARS), AfterValidator(check_alias)]


def check_names(
    models: Mapping[str, ServedModelArgs], aliases: Mapping[str, str], defaults: Mapping[Purpose, str]
) -> None:
    """Raises ValueError for a name that stands for nothing, or for two things."""
    for place, names in (("aliases", aliases), ("defaults", defaults)):
        for name, target in names.items():
            if target not in models:
                raise ValueError(f"{place}.{name}: {target!r} is no model here; {closest(target, models)}")
    for alias in aliases:
        if alias in models:
            raise ValueError(f"aliases: {alias!r} is taken: a model is called so")
    for name, model in models.items():
        own = [name, *(alias for alias, target in aliases.items() if target == name)]
        like_its_adapters = [alias for alias in aliases if alias not in own and adapter_in(alias, own)]
        check_configured(model.adapters, [each for each in (*own, *like_its_adapters) if each], model.limits)


def closest(name: str, models: Collection[str]) -> str:
    return did_you_mean(name, models, f"there are {', '.join(models)}")
