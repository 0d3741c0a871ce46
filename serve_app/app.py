"""Builds the application: the ingress bound to the stages, from the `args:` of a Serve config file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray.serve import Application

from deployments.model import ComponentDType, DenoisingArgs, DType, ModelArgs
from deployments.replicas.combined import EncoderVAE, Pipeline
from deployments.replicas.denoiser import Denoiser
from deployments.replicas.encoder import Encoder
from deployments.replicas.vae import VAE
from env_config.closest import did_you_mean
from serve_app.http.middleware.limits import RequestLimits
from serve_app.ingress import Ingress, IngressArgs
from serve_app.jobs.service import JobArgs
from serve_app.making.admission import AdmissionArgs
from serve_app.storage.base import URLStyle


class AppArgs(BaseModel):
    """What is served. How the processes run is told by environment variables (env_config)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="a checkpoint folder, s3://bucket/prefix, or a model id of the Hugging Face hub")
    model_name: str | None = Field(None, description="the name that callers use; default: the last part of `model`")
    dtype: DType = Field("auto", description="the dtype of the weights; auto: as stored in the checkpoint")
    component_dtypes: dict[str, ComponentDType] = Field(
        default_factory=dict, description="exceptions to `dtype` by component, such as `vae: float32`"
    )
    placement: Literal["three_stage", "two_stage", "one_stage"] = Field(
        "three_stage",
        description="three_stage: Encoder, Denoiser, VAE; two_stage: EncoderVAE, Denoiser; one_stage: Pipeline",
    )
    default_arguments: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the pipeline's call that a request may override"
    )
    denoising: DenoisingArgs = Field(
        default_factory=DenoisingArgs, description="how the denoiser's step engine shares the device"
    )
    limits: RequestLimits = Field(default_factory=RequestLimits, description="what a request may ask for at most")
    output_directory: Path | None = Field(
        None, description="where outputs are stored without S3; default: outputs/ below the cache root"
    )
    public_url: str | None = Field(None, description="the address callers reach, for the URLs of stored outputs")

    url_style: URLStyle = Field("presigned", description="URLs of outputs in S3: presigned, public, or path")
    admission: AdmissionArgs = Field(
        default_factory=AdmissionArgs, description="how much may wait in an ingress replica before it answers 429"
    )
    api_keys_file: Path | None = Field(
        None, description="lines of `python -m serve_app.tools.keys new LABEL`; without it none is asked for"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description="origins of web pages that may call this server, such as https://example.com; none by default"
    )
    remote_images: bool = Field(False, description="fetch pictures that callers give as http(s) URLs")
    c2pa_certificate: Path | None = Field(
        None, description="PEM: the signer's certificate and those between it and its root; outputs get a C2PA manifest"
    )
    c2pa_private_key: Path | None = Field(None, description="PEM: the key of c2pa_certificate, without a password")
    private_targets: bool = Field(
        False, description="callers' URLs (pictures, webhooks) may lead to this machine and private networks"
    )

    jobs: JobArgs = Field(default_factory=JobArgs, description="how jobs (videos, requests in the background) are kept")

    @model_validator(mode="before")
    @classmethod
    def name_the_closest_key(cls, values: Any) -> Any:
        """Raises ValueError for an unknown key, with the known key that is closest to it."""
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    hint = did_you_mean(key, cls.model_fields, f"known: {', '.join(cls.model_fields)}")
                    raise ValueError(f"unknown argument {key!r}: {hint}")
        return values

    @model_validator(mode="after")
    def check_that_a_certificate_has_its_key(self) -> Self:
        """Raises ValueError."""
        if (self.c2pa_certificate is None) != (self.c2pa_private_key is None):
            raise ValueError("c2pa_certificate and c2pa_private_key are needed both, or neither")
        return self


def build_app(args: AppArgs) -> Application:
    """The application that `import_path: serve_app.app:build_app` names."""
    name = args.model_name or Path(args.model.rstrip("/")).name
    model = ModelArgs(
        path=locate(args.model),
        name=name,
        dtype=args.dtype,
        component_dtypes=args.component_dtypes,
        default_arguments=args.default_arguments,
        denoising=args.denoising,
    )
    ingress = IngressArgs(
        model_name=name,
        default_arguments=args.default_arguments,
        limits=args.limits,
        output_directory=args.output_directory,
        public_url=args.public_url,
        url_style=args.url_style,
        admission=args.admission,
        api_keys_file=args.api_keys_file,
        cors_origins=args.cors_origins,
        jobs=args.jobs,
        remote_images=args.remote_images,
        private_targets=args.private_targets,
        c2pa_certificate=args.c2pa_certificate,
        c2pa_private_key=args.c2pa_private_key,
    )
    return Ingress.bind(ingress, *PLACEMENTS[args.placement](model))


def locate(model: str) -> str:
    """A relative folder is looked for where the command runs, then beside this package."""
    for base in (Path.cwd(), Path(__file__).parents[1]):
        if (base / model / "model_index.json").is_file():
            return str((base / model).resolve())
    return model


def three_stage(model: ModelArgs) -> tuple[Application, Application, Application]:
    encoder, vae = Encoder.bind(model), VAE.bind(model)
    return encoder, Denoiser.bind(model, encoder, vae), vae


def two_stage(model: ModelArgs) -> tuple[Application, Application, Application]:
    ends = EncoderVAE.bind(model)
    return ends, Denoiser.bind(model, ends, ends), ends


def one_stage(model: ModelArgs) -> tuple[Application, Application, Application]:
    whole = Pipeline.bind(model)
    return whole, whole, whole


PLACEMENTS: dict[str, Callable[[ModelArgs], tuple[Application, Application, Application]]] = {
    "three_stage": three_stage,
    "two_stage": two_stage,
    "one_stage": one_stage,
}
