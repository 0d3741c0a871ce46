"""What the routes work with for one model: a body becomes requests by what this model says of itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

from deployments.adapters.use import FEATURE, use_of
from deployments.errors import ModelNotFoundError, NotSupportedError
from deployments.messages import GenerationRequest, StageDescription
from serve_app.adapters.adapters import Adapters
from serve_app.adapters.names import adapter_in
from serve_app.adapters.records import ServedAdapter
from serve_app.deadlines import NO_LIMITS, TimeLimits
from serve_app.errors import AdapterNotFoundError
from serve_app.making.admission import Admission
from serve_app.making.at_once import MakeAtOnce
from serve_app.making.served_model import ServedModel
from serve_app.making.stages import Stages
from serve_app.requests.bodies import MediaBody
from serve_app.requests.effects import KnownEffects
from serve_app.requests.given.configured import as_configured
from serve_app.requests.given.earlier_requests import check_taken, check_within, without_steps
from serve_app.requests.given.references import EarlierOutput
from serve_app.requests.given.sources import FileSource
from serve_app.requests.input_pictures import PictureRules
from serve_app.requests.limits import RequestLimits
from serve_app.requests.loras import AskedAdapter, asked_adapters, check_asked
from serve_app.requests.parse import parse

# The bytes of an earlier output of a caller, for the field of that name; raises InvalidRequestError.
ReadEarlier = Callable[[EarlierOutput, str, str], Awaitable[bytes]]


@dataclass(frozen=True)
class ModelService:
    """A served model with all that its requests need; an ingress replica has one of each model."""

    at_once: MakeAtOnce
    adapters: Adapters
    pictures: PictureRules
    effects: KnownEffects
    read_earlier: ReadEarlier
    keys: frozenset[str] = frozenset()  # labels whose keys may use it; empty: all

    @property
    def served(self) -> ServedModel:
        return self.at_once.model

    @property
    def name(self) -> str:
        return self.served.name

    @property
    def stages(self) -> Stages:
        return self.served.stages

    @property
    def admission(self) -> Admission:
        return self.at_once.admission

    @property
    def limits(self) -> RequestLimits:
        return self.pictures.limits

    def is_for(self, caller: str) -> bool:
        """Whether the key with this label may use it."""
        return not self.keys or caller in self.keys

    async def describe(self) -> StageDescription:
        """Raises StageUnavailableError while the encoder cannot answer."""
        return await self.served.describe()

    async def describe_as_configured(self) -> StageDescription:
        """As callers are told: with the configured defaults. Raises StageUnavailableError."""
        return as_configured(await self.describe(), self.served.usual_arguments)

    async def parse(
        self,
        body: MediaBody,
        caller: str,
        request_id: str | None = None,
        limits: TimeLimits = NO_LIMITS,
    ) -> list[GenerationRequest]:
        """The requests that a body of `caller` stands for. Raises InvalidRequestError that names the field at fault."""
        of_model = await self.adapter_in(body.model)
        description = await self.describe()
        loras = await self._loras(body, of_model, description)
        body = body.model_copy(update={"model": None})  # an alias is no other model
        return await parse(
            body,
            description,
            FileSource(self.pictures, lambda earlier, field: self.read_earlier(earlier, caller, field)),
            self.name,
            self.served.default_arguments,
            self.served.quality,
            self.effects,
            request_id,
            limits.shortest_s,
            loras,
        )

    async def adapter_in(self, model: str | None) -> ServedAdapter | None:
        """The LoRA of MODEL:LORA; None where the model alone is meant. Raises ModelNotFoundError."""
        name = adapter_in(model, self.served.names)
        if name is None:
            return None
        try:
            return await self.adapters.get(name, "model")
        except AdapterNotFoundError as error:
            raise ModelNotFoundError(error.message) from error

    async def _loras(
        self, body: MediaBody, of_model: ServedAdapter | None, description: StageDescription
    ) -> list[dict[str, Any]]:
        """What the stages are told of the LoRAs that a body names. Raises InvalidRequestError, NotFoundError."""
        if body.loras and not description.takes_adapters:
            body.refuse(NotSupportedError(f"loras is not supported: {description.pipeline_class} takes none", "loras"))
        asked = asked_adapters(body, of_model.name if of_model else None, self.limits)
        return await self.adapters.uses(asked)

    async def renewed(self, request: GenerationRequest) -> GenerationRequest:
        """A request that was read before, maybe for another model, as one of this model today: its LoRAs are those
        that have their names now.

        Raises NotSupportedError or InvalidRequestError for what this model does not take or allow, and
        AdapterNotFoundError for a LoRA that is gone.
        """
        description, own = await self.describe(), self.served.configured_arguments
        request = without_steps(request, description)
        check_taken(request, description, own)
        check_within(request, description, self.limits, own)
        asked = [AskedAdapter(use.name, use.scale) for use in map(use_of, request.features.get(FEATURE, ()))]
        if not asked:
            return request
        check_asked(asked, self.limits)
        return replace(request, features=request.features | {FEATURE: await self.adapters.uses(asked)})
