"""Pipelines of a few lines, each of which uses its components in a way of its own, split as every pipeline is.

Three stages are loaded in this process, each with skeletons for what the others hold; between them go messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput

from deployments.errors import HandOffError, HandOffIncompleteError
from deployments.messages import (
    Checkpoint,
    ComponentAnswer,
    ComponentCall,
    Envelope,
    GenerationRequest,
    OutputFormat,
    StageName,
)
from deployments.model import DenoisingArgs
from deployments.stage_pipeline.loading import StagePipeline, drop_unused_halves
from deployments.stage_pipeline.remote_calls import answer_call
from deployments.stage_pipeline.roles import PipelineLayout, assign_stages
from deployments.stage_pipeline.skeleton import skeleton
from deployments.stages.decode import decode_output
from deployments.stages.denoise import DenoiserStage
from deployments.stages.denoise_run import DenoisingFollower
from deployments.stages.encode import encode
from deployments.tensors.values import tensors
from deployments.weights.load import load_component

CPU = torch.device("cpu")
WIDTH = 4
SEED = 3


class Layer(torch.nn.Module):
    """A part with a state: the same class wherever one is needed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class ToyEncoder(ModelMixin, ConfigMixin):
    """Returns a list of embeddings; `absent` stands for no words, `tower` sees pictures."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])
        self.tower = Layer()
        self.absent = torch.nn.Parameter(torch.randn(1, WIDTH))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        embeddings = []
        for layer in self.layers:
            x = layer(x)
            embeddings.append(x)
        return embeddings


class ToyDenoiser(ModelMixin, ConfigMixin):
    """`cache`: of earlier forwards, to which it looks back, and which it writes where `writes` says."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.first = Layer()
        self.last = Layer()

    def forward(
        self, latents: torch.Tensor, timestep: Any, words: torch.Tensor, cache: Any = None, writes: bool = False
    ) -> torch.Tensor:
        x = self.first(latents) + words
        if cache is not None:
            x = x + cache["seen"]
            if writes:
                cache["seen"].add_(x)
        return self.last(x)


class ToyVae(ModelMixin, ConfigMixin):
    """Both halves, and what stands between them."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Layer()
        self.quantize = Layer()
        self.decoder = Layer()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        encoded: torch.Tensor = self.encoder(x)
        return encoded

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.decoder(latents)
        return decoded


class Toy(DiffusionPipeline):
    """The usual way; each of the others below changes one part of it."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, transformer=transformer, vae=vae, scheduler=scheduler)

    def words(self) -> torch.Tensor:
        words: torch.Tensor = self.text_encoder(torch.ones(1, WIDTH))[-1]
        return words

    def denoised(self, latents: torch.Tensor, words: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        for timestep in self.scheduler.timesteps:
            latents = self.scheduler.step(
                self.transformer(latents, timestep, words, **kwargs), timestep, latents, return_dict=False
            )[0]
        return latents

    def decoded(self, latents: torch.Tensor) -> Any:
        return StableDiffusionPipelineOutput(self.vae.decode(latents), nsfw_content_detected=None)

    def __call__(self, num_inference_steps: int = 4, generator: Any = None, output_type: str = "pt") -> Any:
        words = self.words()
        self.scheduler.set_timesteps(num_inference_steps)
        latents = torch.randn(1, WIDTH, generator=generator)
        return self.decoded(self.denoised(latents, words))


@dataclass(frozen=True)
class Made:
    """What the stages made of a request, and on which way."""

    output: list[torch.Tensor]
    envelope: Envelope
    is_remote: bool
    checkpoints: list[Checkpoint]
    steps: int


SPLIT: tuple[tuple[StageName, ...], ...] = (("encoder",), ("denoiser",), ("vae",))


class ToyStages:
    """The three stages of one toy; `processes` are the stages of each process."""

    def __init__(
        self,
        pipeline_class: type[Toy],
        folder: Path,
        scheduler: Any = None,
        dtype: torch.dtype = torch.float32,
        processes: tuple[tuple[StageName, ...], ...] = SPLIT,
        args: DenoisingArgs = DenoisingArgs(checkpoint_every=1),  # noqa: B008
        deterministic: bool = True,
        denoiser: type[ToyDenoiser] = ToyDenoiser,
    ) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.args = args
        self.deterministic = deterministic
        models = {"text_encoder": ToyEncoder(), "transformer": denoiser(), "vae": ToyVae()}
        for name, model in models.items():
            model.save_pretrained(folder / name)
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.pipeline_class = pipeline_class
        self.unsplit = pipeline_class(**models, scheduler=self.scheduler)
        for model in models.values():
            model.eval().to(dtype)
        classes: dict[str, Any] = {name: type(model) for name, model in models.items()}
        stages_of = assign_stages(pipeline_class.model_cpu_offload_seq, classes)
        self.layout = PipelineLayout(folder, pipeline_class, classes, classes, stages_of)
        self.stages = {stage: loaded for stages in processes for loaded in [self._load(stages)] for stage in stages}
        self.denoiser = self.new_denoiser()

    def _load(self, stages: tuple[StageName, ...]) -> StagePipeline:
        components = {
            name: load_component(cls, self.layout.folder / name, self.dtype, CPU, use_streamer=False)
            if self.layout.stages_of[name] & set(stages)
            else skeleton(cls, self.layout.folder / name, CPU, self.dtype)
            for name, cls in self.layout.models.items()
        }
        pipeline = self.pipeline_class(**components, scheduler=self.scheduler)
        loaded = StagePipeline(pipeline, self.layout, stages, CPU, self.dtype)
        drop_unused_halves(loaded)
        return loaded

    def new_denoiser(self) -> DenoiserStage:
        return DenoiserStage(
            self.stages["denoiser"],
            self.args,
            ask_stage=self._ask if len(set(map(id, self.stages.values()))) > 1 else None,
        )

    def _ask(self, stage: StageName, call: ComponentCall) -> ComponentAnswer:
        return answer_call(self.stages[stage], call)

    @torch.no_grad()
    def truth(self) -> list[torch.Tensor]:
        torch.manual_seed(SEED)
        output = self.unsplit(generator=torch.Generator().manual_seed(SEED))
        return [tensor.clone() for tensor in tensors(output)]

    def make(self, checkpoint: Checkpoint | None = None, envelope: Envelope = Envelope()) -> Made:  # noqa: B008
        """As the application: on a longer way where the shortest does not serve."""
        request = GenerationRequest(
            "toy", "toy", {}, SEED, OutputFormat("image", "png"), deterministic=self.deterministic
        )
        checkpoints: list[Checkpoint] = []
        follower = DenoisingFollower(checkpoint=checkpoints.append)
        conditioning = encode(self.stages["encoder"], request)
        inputs, run = self.denoiser.denoise(request, conditioning, checkpoint, envelope, follower)
        try:
            output = decode_output(self.stages["vae"], request, inputs)
        except HandOffError as error:
            if envelope.remote_calls:
                raise
            complete = isinstance(error, HandOffIncompleteError) and not envelope.complete_hand_off
            return self.make(checkpoint, Envelope(complete_hand_off=complete, remote_calls=not complete))
        is_remote = envelope.remote_calls or self.denoiser.needs_remote_calls(request)
        return Made(tensors(output), envelope, is_remote, checkpoints, run.session.steps_done)

    def close(self) -> None:
        self.denoiser.engine.close()


def same(made: list[torch.Tensor], truth: list[torch.Tensor]) -> bool:
    return len(made) == len(truth) > 0 and all(map(torch.equal, made, truth))
