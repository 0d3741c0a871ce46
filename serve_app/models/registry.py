"""Which of the served models a request means: the one that it names, or the one for what it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray.serve.handle import DeploymentHandle

from deployments.errors import ModelNotFoundError, NotSupportedError, StageUnavailableError
from serve_app.adapters.names import adapter_in, model_called
from serve_app.errors import OverloadedError
from serve_app.making.stages import Stages
from serve_app.models.args import Purpose
from serve_app.models.service import ModelService
from serve_app.models.suitable import is_suitable, kind_asked_for
from serve_app.requests.bodies import MediaBody
from serve_app.requests.edit_bodies import ImageEditBody
from serve_app.requests.outputs import MEDIA

MOST_NAMES = 20  # in an error


class ServedModels:
    """Those of the application, in the order of the configuration."""

    def __init__(self, models: Sequence[ModelService], defaults: Mapping[Purpose, str] | None = None) -> None:
        """`defaults`: the names of those that make what no request names a model for."""
        self._models = tuple(models)
        self._by_name = {name: model for model in models for name in model.served.names}
        self._defaults = {purpose: self._by_name[name] for purpose, name in (defaults or {}).items()}

    def all(self) -> tuple[ModelService, ...]:
        return self._models

    def of_caller(self, caller: str) -> list[ModelService]:
        """Those that the key with this label may use."""
        return [model for model in self._models if model.is_for(caller)]

    async def meant_by(self, body: MediaBody, caller: str) -> ModelService:
        """The model that a body of `caller` names, or the one for what it asks for.

        Raises ModelNotFoundError, NotSupportedError where none makes such a thing, StageUnavailableError where it is
        not known yet which does, ModelLoadingError where it sleeps and nothing is known of it.
        """
        model = await self._meant_by(body, caller)
        await model.served.wake_if_unknown()
        return model

    async def _meant_by(self, body: MediaBody, caller: str) -> ModelService:
        if body.model is not None:
            return self.named(body.model, caller)
        default = self._defaults.get(purpose_of(body))
        if default is not None and not default.is_for(caller):
            default = None
        models = [model for model in self.of_caller(caller) if model is not default]
        if default is None:
            self.first_for(caller)
        return await _first_suitable(body, [default, *models] if default else models, default)

    def named(self, name: str, caller: str) -> ModelService:
        """The model of MODEL or MODEL:LORA; whether it has such a LoRA, it says itself. Raises ModelNotFoundError."""
        known = {each: model for each, model in self._by_name.items() if model.is_for(caller)}
        if name in known:
            return known[name]
        if adapter_in(name, known) is not None:
            return known[name.rpartition(":")[0]]
        raise ModelNotFoundError(f"The model {name[:80]!r} is not served here; {self._told(caller)}")

    def one_for(self, name: str | None, caller: str, field: str = "model") -> ModelService:
        """The model of this name, which has no LoRA behind it, or the only one.

        Raises ModelNotFoundError, NotSupportedError.
        """
        if name is not None:
            model = self.named(name, caller)
            if name not in model.served.names:
                message = f"{field}: {name[:80]!r} is a LoRA of {model.name!r}: give the model alone"
                raise ModelNotFoundError(message, field)
            return model
        models = self.of_caller(caller)
        if len(models) != 1:
            raise NotSupportedError(f"{field} is required: {self._told(caller)}", field, "missing_required_parameter")
        return models[0]

    def first_for(self, caller: str) -> ModelService:
        """The first that the key with this label may use. Raises ModelNotFoundError."""
        models = self.of_caller(caller)
        if not models:
            raise ModelNotFoundError(f"No model is served here; {self._told(caller)}")
        return models[0]

    def own_name(self, name: str, caller: str) -> str:
        """That of the model that the caller means, with a LoRA or without, which jobs have; a name of nobody is one of
        before."""
        known = {each: model for each, model in self._by_name.items() if model.is_for(caller)}
        base = name if adapter_in(name, known) is None else name.rpartition(":")[0]
        return known[base].name if base in known else name

    def called_as(self, model: ModelService, adapter: str) -> str | None:
        """The name of a model that a LoRA of this name would have too."""
        return model_called(adapter, model.served.names, self._by_name)

    def of_earlier(self, name: str, caller: str) -> ModelService | None:
        """The model that made something before, if it is still served."""
        model = self._by_name.get(name)
        return model if model is not None and model.is_for(caller) else None

    def stages(self) -> dict[str, Stages]:
        """By the name of the model."""
        return {model.name: model.stages for model in self._models}

    def deployments(self) -> dict[str, DeploymentHandle]:
        """The handles of all stages by the name of their deployment, each once."""
        return {name: handle for model in self._models for name, handle in model.stages.deployments().items()}

    @property
    def max_body_bytes(self) -> int:
        """Of a body whose model is not known yet."""
        return max(model.limits.max_body_bytes for model in self._models)

    def overloaded(self, reason: str) -> OverloadedError:
        """The refusal that says when the first of the models should have room."""
        refusals = [model.admission.overloaded(reason) for model in self._models]
        return min(refusals, key=lambda refusal: refusal.retry_after_s)

    def _told(self, caller: str) -> str:
        names = [repr(model.name) for model in self.of_caller(caller)]
        if not names:
            return "this API key may use none"
        more = [f"{len(names) - MOST_NAMES} more"] if len(names) > MOST_NAMES else []
        *first, last = [*names[:MOST_NAMES], *more]
        return f"this server has {', '.join(first)} and {last}" if first else f"this server has {last}"


def purpose_of(body: MediaBody) -> Purpose:
    """By the route that a body belongs to, and whether it asks for moving pictures."""
    return "edit" if isinstance(body, ImageEditBody) else kind_asked_for(body)


async def _first_suitable(
    body: MediaBody, models: Sequence[ModelService], default: ModelService | None
) -> ModelService:
    """The first that can make it; where none can, the one whose own refusal says best why.

    A model that is still loading is not passed over: the same request would be made by another one a moment later.
    """
    if len(models) == 1:
        return models[0]
    of_this_kind = default
    for model in models:
        try:
            description = await model.describe()
        except StageUnavailableError as error:
            if model is default:
                return model
            await model.served.wake_if_unknown()
            reason = f"which model makes this is not known before {model.name!r} is ready: name one in `model`"
            raise StageUnavailableError(reason) from error
        if is_suitable(body, description):
            return model
        if of_this_kind is None and description.media_kind == kind_asked_for(body):
            of_this_kind = model
    if of_this_kind is None:
        kind = MEDIA[kind_asked_for(body)].name
        raise ModelNotFoundError(f"no model here makes {kind}, of {', '.join(repr(each.name) for each in models)}")
    return of_this_kind
