"""What a body asks of LoRAs: `loras`, and the one that `model` names behind a colon."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.functional_validators import BeforeValidator, PlainValidator
from pydantic.json_schema import WithJsonSchema
from pydantic_core import PydanticCustomError

from deployments.errors import InvalidRequestError, NotSupportedError
from serve_app.requests.limits import RequestLimits
from serve_app.requests.plain_values import MAX_NUMBER, read_json

if TYPE_CHECKING:
    from serve_app.requests.bodies import GenerationBody

FIELD = "loras"
MAX_NAME_CHARS = 128
MAX_COMPONENTS = 16
LoRAScale = float | dict[str, float]
SCALE_SCHEMA = {"anyOf": [{"type": "number"}, {"type": "object", "additionalProperties": {"type": "number"}}]}

# Names that people and other servers give to the field.
OTHER_NAMES = (
    "lora", "lora_name", "lora_names", "lora_nickname", "lora_path", "lora_paths", "lora_url", "lora_urls",
    "lora_scale", "lora_scales", "lora_weight", "lora_weights", "lora_request", "adapter", "adapters", "adapter_name",
    "adapter_names", "adapter_weights",
)  # fmt: skip
# In pipelines of diffusers: `attention_kwargs: {scale}` and its relatives are the scale of all LoRAs at once.
OF_ALL = "attention_kwargs"


def _scale(value: Any) -> LoRAScale:
    """A number, or one for each component. Raises PydanticCustomError."""
    if not isinstance(value, dict):
        return _number(value)
    if not 1 <= len(value) <= MAX_COMPONENTS:
        raise PydanticCustomError("lora_scale", f"scale must have 1 to {MAX_COMPONENTS} components, or be a number")
    return {str(name): _number(each) for name, each in value.items()}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_NUMBER:  # NaN neither
        raise PydanticCustomError(
            "lora_scale", "scale must be a number, or a number for each component, such as {{transformer: 0.8}}"
        )
    return float(value)


Scale = Annotated[LoRAScale, PlainValidator(_scale), WithJsonSchema(SCALE_SCHEMA)]


class LoRABody(BaseModel):
    """A LoRA of a request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str = Field(min_length=1, max_length=MAX_NAME_CHARS, description="one of GET /v1/loras")
    scale: Scale | None = Field(
        None, description="a number, or one for each component (others have 1); null: the LoRA's own"
    )


def _items(value: Any) -> Any:
    """A list, from what forms and hurried callers send: JSON as text, one alone, names without a scale."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = read_json(value)
        except (ValueError, RecursionError) as error:
            raise PydanticCustomError("loras", "must be a list of LoRAs, such as [{{name: sketch}}]") from error
    items = value if isinstance(value, list) else [value]
    return [{"name": each} if isinstance(each, str) else each for each in items]


LoRAs = Annotated[list[LoRABody], BeforeValidator(_items)]


@dataclass(frozen=True)
class AskedAdapter:
    """A LoRA as a request names it."""

    name: str
    scale: LoRAScale | None = None  # None: the LoRA's own
    field: str = FIELD  # of the body, that names it


def asked_adapters(body: GenerationBody, of_model: str | None, limits: RequestLimits) -> list[AskedAdapter]:
    """Those of `loras`, and the one that `model` names: they add up. Raises InvalidRequestError."""
    asked = [AskedAdapter(of_model, field="model")] if of_model is not None else []
    asked += [AskedAdapter(each.name, each.scale) for each in body.loras or ()]
    check_asked(asked, limits)
    names = [each.name for each in asked]
    if twice := next((name for name in names if names.count(name) > 1), None):
        where = f"{FIELD} and model" if twice == of_model else FIELD
        raise InvalidRequestError(f"{where}: {twice[:80]!r} is named twice: give it once, with one scale", FIELD)
    return asked


def check_asked(asked: Sequence[AskedAdapter], limits: RequestLimits) -> None:
    """How many, and their scales. Raises InvalidRequestError."""
    check_scales(asked, limits)
    if len(asked) > limits.max_loras:
        raise InvalidRequestError(f"{FIELD}: at most {limits.max_loras}, got {len(asked)}", FIELD, "limit_exceeded")


def check_scales(asked: Sequence[AskedAdapter], limits: RequestLimits) -> None:
    """Raises InvalidRequestError for a scale beyond the limit."""
    for each in asked:
        values: Iterable[float] = ()
        if isinstance(each.scale, dict):
            values = each.scale.values()
        elif each.scale is not None:
            values = (each.scale,)
        beyond = next((value for value in values if not abs(value) <= limits.max_lora_scale), None)  # NaN too
        if beyond is not None:
            allowed = f"between {-limits.max_lora_scale:g} and {limits.max_lora_scale:g}"
            reason = f"{each.field}: the scale of {each.name[:80]!r} must be {allowed}, got {beyond:g}"
            raise InvalidRequestError(reason, each.field, "limit_exceeded")


def refuse_scale_of_all(arguments: Mapping[str, Any]) -> None:
    """Of arguments of the pipeline by their names. Raises NotSupportedError for a scale of all LoRAs."""
    for name, value in arguments.items():
        if is_scale_of_all(name, value):
            raise NotSupportedError(
                f"{name[:80]}: scale is not supported: give each LoRA its own, as in "
                'loras: [{"name": "sketch", "scale": 0.8}]',
                name,
            )


def is_scale_of_all(name: str, value: Any) -> bool:
    """A file is none: its refusal says so."""
    is_given = isinstance(value, Mapping) and isinstance(value.get("scale"), int | float | str | list | dict)
    return name.endswith(OF_ALL) and is_given
