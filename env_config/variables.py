"""The 45 documented variables: one class per heading of the document, in its order."""

import logging
import os.path
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationError, ValidationInfo, field_validator

from env_config.closest import closest
from env_config.parsing import (
    absolute_path,
    flag,
    http_url,
    integer,
    lower_cased,
    number_above,
    one_of,
    path,
    patterns,
    positive_integers,
    stream_or_path,
)
from env_config.section import (
    STRICT,
    Declaration,
    EnvConfigError,
    EnvSection,
    Problem,
    read_environ,
    variable,
)

logger = logging.getLogger(__name__)

Device = Literal["cuda", "rocm", "xpu", "npu", "musa", "mps", "cpu"]
LoggingLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
StartMethod = Literal["fork", "spawn"]
FP4Backend = Literal["auto", "cudnn", "cutlass", "trtllm"]
SCMPreset = Literal["none", "slow", "medium", "fast", "ultra"]
SCMPolicy = Literal["dynamic", "static"]
StorageType = Literal["s3"]

Flag = Annotated[bool, flag()]
FirstBlocks = Annotated[int, integer(at_least=1)]
LastBlocks = Annotated[int, integer(at_least=0)]
WarmupSteps = Annotated[int, integer(at_least=0)]
DifferenceThreshold = Annotated[float, number_above(0)]
CachedSteps = Annotated[int, integer(at_least=-1)]  # -1: no limit
TaylorOrder = Annotated[int, integer(at_least=1, at_most=2)]
Bins = Annotated[tuple[int, ...], positive_integers()]
Patterns = Annotated[tuple[str, ...], patterns()]


class Runtime(EnvSection):
    heading: ClassVar[tuple[str, ...]] = ("Runtime",)

    target_device: Annotated[Device, one_of(Device)] = variable(
        "SGLANG_DIFFUSION_TARGET_DEVICE",
        "cuda",
        "Target device for inference (`cuda`, `rocm`, `xpu`, `npu`, `musa`, `mps`, `cpu`)",
        "Every component of the replica runs on this device; a replica that does not find it refuses to "
        "start and says what it found.",
    )
    attention_backend: Annotated[str | None, lower_cased()] = variable(
        "SGLANG_DIFFUSION_ATTENTION_BACKEND",
        None,
        "Override attention backend via env var (e.g. `fa`, `torch_sdpa`, `sage_attn`)",
        "Every attention of the stage's modules that this backend of diffusers' dispatcher can compute goes to it, "
        "the others stay torch's own; an unknown "
        "name is refused with the list, a missing package with its install line.",
    )
    attention_config: Annotated[Path | None, path()] = variable(
        "SGLANG_DIFFUSION_ATTENTION_CONFIG",
        None,
        "Path to attention backend configuration file (JSON/YAML)",
        "Sets the attention backend and its options per component and block range; a relative path is "
        "looked up under `SGLANG_DIFFUSION_CONFIG_ROOT`.",
    )
    stage_logging: Flag = variable(
        "SGLANG_DIFFUSION_STAGE_LOGGING",
        False,
        "Enable per-stage timing logs",
        "Logs one line per stage and request (queue, transfer, compute synchronised with the device, steps, "
        "bytes); below the cache root, `logs/performance.jsonl` gets it as JSON, and `logs/requests.jsonl` one "
        "JSON line per request with all its stages.",
    )
    server_dev_mode: Flag = variable(
        "SGLANG_DIFFUSION_SERVER_DEV_MODE",
        False,
        "Enable dev-only HTTP endpoints for debugging",
        "Adds the `/dev/...` routes: masked configuration, replicas and queues, thread stacks, profiler "
        "windows, Cache-DiT summary, caches; otherwise they answer 404.",
    )
    torch_profiler_dir: Annotated[Path | None, absolute_path()] = variable(
        "SGLANG_DIFFUSION_TORCH_PROFILER_DIR",
        None,
        "Directory for torch profiler traces (absolute path). Enables profiling when set",
        "Writes one torch profiler trace per stage and request there; a relative path is refused.",
    )
    cache_root: Annotated[Path, path()] = variable(
        "SGLANG_DIFFUSION_CACHE_ROOT",
        "~/.cache/sgl_diffusion",
        "Root directory for cache files",
        "Holds the torch.compile, Triton and MIOpen caches, weights pulled from S3, outputs and their spool, jobs, "
        "logs; the default follows `XDG_CACHE_HOME`.",
    )
    config_root: Annotated[Path, path()] = variable(
        "SGLANG_DIFFUSION_CONFIG_ROOT",
        "~/.config/sgl_diffusion",
        "Root directory for configuration files",
        "Where attention files with a relative path are looked up; the default follows `XDG_CONFIG_HOME`.",
    )
    logging_level: Annotated[LoggingLevel, one_of(LoggingLevel, fold=str.upper)] = variable(
        "SGLANG_DIFFUSION_LOGGING_LEVEL",
        "INFO",
        "Default logging level",
        "The level of every logger of every replica, Ray Serve's and the libraries' included.",
    )
    worker_multiproc_method: Annotated[StartMethod, one_of(StartMethod)] = variable(
        "SGLANG_DIFFUSION_WORKER_MULTIPROC_METHOD",
        "fork",
        "Multiprocess context for workers (`fork` or `spawn`)",
        "How a replica with the VAE stage starts its media pool, the processes that write pictures and videos.",
    )
    use_runai_model_streamer: Flag = variable(
        "SGLANG_USE_RUNAI_MODEL_STREAMER",
        True,
        "Use Run:AI model streamer for model loading",
        "Streams every component's weights with Run:ai's streamer, from local disk or `s3://`; false reads "
        "local safetensors by mmap.",
    )


class AppleMPS(EnvSection):
    heading: ClassVar[tuple[str, ...]] = ("Platform-Specific", "Apple MPS")

    use_mlx: Flag | None = variable(
        "SGLANG_USE_MLX",
        None,
        "Set to `1` to enable MLX fused Metal kernels for norm ops on MPS",
        "Replaces torch's RMS and layer norms by MLX's fused ones on `mps`; inert on other devices, with "
        "one line in the log.",
    )


class ROCm(EnvSection):
    heading: ClassVar[tuple[str, ...]] = ("Platform-Specific", "ROCm (AMD GPUs)")

    use_rocm_vae: Flag = variable(
        "SGLANG_USE_ROCM_VAE",
        False,
        "Use AITer GroupNorm in VAE for improved performance on ROCm",
        "Replaces every affine GroupNorm of the VAE by AITer's, sharing its parameters; inert off ROCm, "
        "with one line in the log.",
    )
    use_rocm_cudnn_benchmark: Flag = variable(
        "SGLANG_USE_ROCM_CUDNN_BENCHMARK",
        False,
        "Enable MIOpen auto-tuning for VAE conv layers on ROCm",
        "Turns MIOpen's search on inside the VAE's convolutions and restores the flag after; inert off "
        "ROCm, with one line in the log.",
    )


class Quantization(EnvSection):
    heading: ClassVar[tuple[str, ...]] = ("Platform-Specific", "Quantization")

    flashinfer_fp4_gemm_backend: Annotated[
        FP4Backend | None, one_of(FP4Backend, fold=lambda text: text.lower().removeprefix("flashinfer_"))
    ] = variable(
        "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND",
        None,
        "FlashInfer FP4 GEMM backend for generic NVFP4 fallback",
        "The backend (`auto`, `cudnn`, `cutlass`, `trtllm`) that linear layers of an NVFP4 checkpoint hand "
        "to `flashinfer.mm_fp4` on CUDA; elsewhere they dequantise in torch.",
    )


class CacheDiT(EnvSection):
    heading: ClassVar[tuple[str, ...]] = ("Caching Acceleration", "Cache-DiT Configuration")

    enabled: Flag = variable(
        "SGLANG_CACHE_DIT_ENABLED",
        False,
        "Enable Cache-DiT acceleration",
        "Wraps the transformers of the denoiser with Cache-DiT; a request's `cache_dit` object may override it.",
    )
    fn: FirstBlocks = variable(
        "SGLANG_CACHE_DIT_FN",
        1,
        "First N blocks to always compute",
        "Cache-DiT's `Fn_compute_blocks`; at least 1.",
    )
    bn: LastBlocks = variable(
        "SGLANG_CACHE_DIT_BN",
        0,
        "Last N blocks to always compute",
        "Cache-DiT's `Bn_compute_blocks`; at least 0.",
    )
    warmup: WarmupSteps = variable(
        "SGLANG_CACHE_DIT_WARMUP",
        4,
        "Warmup steps before caching",
        "Cache-DiT's `max_warmup_steps`: the first steps of a request that are always computed.",
    )
    rdt: DifferenceThreshold = variable(
        "SGLANG_CACHE_DIT_RDT",
        0.24,
        "Residual difference threshold",
        "Cache-DiT's `residual_diff_threshold`: a step whose first blocks changed less than this reuses the "
        "rest; above 0.",
    )
    mc: CachedSteps = variable(
        "SGLANG_CACHE_DIT_MC",
        3,
        "Max continuous cached steps",
        "Cache-DiT's `max_continuous_cached_steps`; -1 = no limit, 0 = never reuse.",
    )
    taylorseer: Flag = variable(
        "SGLANG_CACHE_DIT_TAYLORSEER",
        False,
        "Enable TaylorSeer calibrator",
        "Reused steps are extrapolated by Cache-DiT's `TaylorSeerCalibratorConfig` instead of repeated.",
    )
    ts_order: TaylorOrder = variable(
        "SGLANG_CACHE_DIT_TS_ORDER",
        1,
        "TaylorSeer order (1 or 2)",
        "The calibrator's `taylorseer_order`; 1 or 2.",
    )
    scm_preset: Annotated[SCMPreset, one_of(SCMPreset)] = variable(
        "SGLANG_CACHE_DIT_SCM_PRESET",
        "none",
        "SCM preset (none/slow/medium/fast/ultra)",
        "Which steps of a request are computed, by Cache-DiT's `steps_mask`; a step count without a table "
        "gets no mask and a warning.",
    )
    scm_policy: Annotated[SCMPolicy, one_of(SCMPolicy)] = variable(
        "SGLANG_CACHE_DIT_SCM_POLICY",
        "dynamic",
        "SCM caching policy",
        "Steps that the mask leaves out: `static` always reuses them, `dynamic` still asks the threshold "
        "and the limit of continuous cached steps.",
    )
    scm_compute_bins: Bins | None = variable(
        "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS",
        None,
        "Custom SCM compute bins",
        "Lengths of the runs of computed steps, such as `8,3,3,2,2`; wins over the preset and needs the "
        "cache bins. A request with more steps than the bins cover is a 400.",
    )
    scm_cache_bins: Bins | None = variable(
        "SGLANG_CACHE_DIT_SCM_CACHE_BINS",
        None,
        "Custom SCM cache bins",
        "Lengths of the runs of cached steps between them, such as `1,2,2,2,3`; needs the compute bins.",
    )

    @field_validator("scm_cache_bins")
    @classmethod
    def bins_come_together(cls, cache_bins: Bins | None, info: ValidationInfo) -> Bins | None:
        compute_bins = info.data.get("scm_compute_bins", cache_bins)  # absent: refused already
        if (cache_bins is None) != (compute_bins is None):
            raise ValueError("must be set together with SGLANG_CACHE_DIT_SCM_COMPUTE_BINS, or neither")
        return cache_bins


class CacheDiTSecondary(EnvSection):
    heading: ClassVar[tuple[str, ...]] = ("Caching Acceleration", "Cache-DiT Secondary Transformer")
    when_unset: ClassVar[str] = "(from primary)"

    fn: FirstBlocks | None = variable(
        "SGLANG_CACHE_DIT_SECONDARY_FN",
        None,
        "First N blocks to always compute",
        "`Fn_compute_blocks` of the second transformer (Wan2.2's low-noise expert).",
    )
    bn: LastBlocks | None = variable(
        "SGLANG_CACHE_DIT_SECONDARY_BN",
        None,
        "Last N blocks to always compute",
        "`Bn_compute_blocks` of the second transformer.",
    )
    warmup: WarmupSteps | None = variable(
        "SGLANG_CACHE_DIT_SECONDARY_WARMUP",
        None,
        "Warmup steps before caching",
        "`max_warmup_steps` of the second transformer, counted in its own steps.",
    )
    rdt: DifferenceThreshold | None = variable(
        "SGLANG_CACHE_DIT_SECONDARY_RDT",
        None,
        "Residual difference threshold",
        "`residual_diff_threshold` of the second transformer.",
    )
    mc: CachedSteps | None = variable(
        "SGLANG_CACHE_DIT_SECONDARY_MC",
        None,
        "Max continuous cached steps",
        "`max_continuous_cached_steps` of the second transformer.",
    )
    taylorseer: Flag | None = variable(
        "SGLANG_CACHE_DIT_SECONDARY_TAYLORSEER",
        None,
        "Enable TaylorSeer calibrator",
        "Whether the second transformer gets the TaylorSeer calibrator.",
    )
    ts_order: TaylorOrder | None = variable(
        "SGLANG_CACHE_DIT_SECONDARY_TS_ORDER",
        None,
        "TaylorSeer order (1 or 2)",
        "`taylorseer_order` of the second transformer.",
    )

    def resolve(self, primary: CacheDiT) -> CacheDiT:
        """What the second transformer gets: its own values, else the primary's, which hold the defaults."""
        return primary.model_copy(update=self.model_dump(exclude_none=True))


class CloudStorage(EnvSection):
    heading: ClassVar[tuple[str, ...]] = ("Cloud Storage",)

    type: Annotated[StorageType | None, one_of(StorageType)] = variable(
        "SGLANG_CLOUD_STORAGE_TYPE",
        None,
        "Set to `s3` to enable cloud storage",
        "`s3` uploads every generated image and video; without a bucket the replica refuses to start.",
    )
    bucket_name: str | None = variable(
        "SGLANG_S3_BUCKET_NAME",
        None,
        "The name of the S3 bucket",
        "The bucket that media are uploaded to.",
    )
    endpoint_url: Annotated[str | None, http_url()] = variable(
        "SGLANG_S3_ENDPOINT_URL",
        None,
        "Custom endpoint URL (for MinIO, OSS, etc.)",
        "The S3 server that every call and every returned URL goes to, instead of AWS.",
    )
    region_name: str = variable(
        "SGLANG_S3_REGION_NAME",
        "us-east-1",
        "AWS region name",
        "The region of the S3 client, of its signatures and of the returned URLs.",
    )
    access_key_id: SecretStr | None = variable(
        "SGLANG_S3_ACCESS_KEY_ID",
        None,
        "AWS Access Key ID",
        "The key of the S3 client; unset leaves it to boto3's own credential chain. Never shown.",
    )
    secret_access_key: SecretStr | None = variable(
        "SGLANG_S3_SECRET_ACCESS_KEY",
        None,
        "AWS Secret Access Key",
        "The secret of that key; both are set or neither. Never shown.",
    )

    @field_validator("bucket_name")
    @classmethod
    def s3_needs_a_bucket(cls, bucket_name: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("type") == "s3" and not bucket_name:
            raise ValueError("must be set when SGLANG_CLOUD_STORAGE_TYPE is s3")
        return bucket_name

    @field_validator("secret_access_key")
    @classmethod
    def keys_come_together(cls, secret: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if (secret is None) != (info.data.get("access_key_id", secret) is None):
            raise ValueError("must be set together with SGLANG_S3_ACCESS_KEY_ID, or neither")
        return secret


class KernelAPI(EnvSection):
    heading: ClassVar[tuple[str, ...]] = ("CUDA Crash Debugging",)

    loglevel: Annotated[int, integer(at_least=0)] = variable(
        "SGLANG_KERNEL_API_LOGLEVEL",
        0,
        "Controls crash-debug kernel API logging. `1` logs API names, `3` logs tensor metadata, `5` adds "
        "tensor statistics, and `10` also writes dump snapshots.",
        "Logs each call at the kernel boundaries (attention, norms, FP4 linears, transformer forward, VAE "
        "decode) before it runs, so the last line names the kernel that crashed; 0 leaves the calls "
        "untouched.",
    )
    logdest: Annotated[str, stream_or_path()] = variable(
        "SGLANG_KERNEL_API_LOGDEST",
        "stdout",
        "Destination for crash-debug kernel API logs. Use `stdout`, `stderr`, or a file path. `%i` is "
        "replaced with the process PID.",
        "Where those lines go; a file is appended to.",
    )
    dump_dir: Annotated[Path, path()] = variable(
        "SGLANG_KERNEL_API_DUMP_DIR",
        "sglang_kernel_api_dumps",
        "Output directory for level-10 kernel API dumps. `%i` is replaced with the process PID.",
        "One directory per dumped call: inputs (written before the call), outputs, metadata.",
    )
    dump_include: Patterns | None = variable(
        "SGLANG_KERNEL_API_DUMP_INCLUDE",
        None,
        "Comma-separated wildcard patterns for kernel API names to include in level-10 dumps.",
        "Only calls whose name matches one of these are dumped; log lines are not filtered.",
    )
    dump_exclude: Patterns | None = variable(
        "SGLANG_KERNEL_API_DUMP_EXCLUDE",
        None,
        "Comma-separated wildcard patterns for kernel API names to exclude from level-10 dumps.",
        "Calls whose name matches one of these are not dumped, even if included.",
    )


class EnvConfig(BaseModel):
    """What this process was told: read once, in the replica's constructor, then passed as an argument."""

    model_config = STRICT

    runtime: Runtime = Field(default_factory=Runtime)
    apple_mps: AppleMPS = Field(default_factory=AppleMPS)
    rocm: ROCm = Field(default_factory=ROCm)
    quantization: Quantization = Field(default_factory=Quantization)
    cache_dit: CacheDiT = Field(default_factory=CacheDiT)
    cache_dit_secondary: CacheDiTSecondary = Field(default_factory=CacheDiTSecondary)
    cloud_storage: CloudStorage = Field(default_factory=CloudStorage)
    kernel_api: KernelAPI = Field(default_factory=KernelAPI)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> "EnvConfig":
        """Read `environ` (None: this process), and log a warning for each unknown SGLANG_ name.

        Raises EnvConfigError, which lists every bad value.
        """
        for warning in unknown_variables(read_environ(environ)):
            logger.warning(warning)
        return cls.parse(environ)

    @classmethod
    def parse(cls, environ: Mapping[str, str] | None = None) -> "EnvConfig":
        """`from_environ` without the warnings."""
        texts = read_environ(environ)
        roots = xdg_roots(texts)
        try:
            config = cls.model_validate(texts_by_section(roots | texts))
        except ValidationError as error:
            problems = find_problems(error, texts)
        else:
            for name in roots.keys() - texts.keys():  # defaults that moved: nobody set these variables
                config.runtime.model_fields_set.discard(BY_VARIABLE[name].field)
            return config
        raise EnvConfigError(*problems)  # not within `except`: pydantic's error refers to the secrets


SECTIONS: dict[str, type[EnvSection]] = {name: type(section) for name, section in EnvConfig()}
DECLARATIONS: tuple[Declaration, ...] = tuple(
    declaration for section in SECTIONS.values() for declaration in section.declarations()
)
BY_VARIABLE: dict[str, Declaration] = {declaration.variable: declaration for declaration in DECLARATIONS}

# Names that SGLang Diffusion reads without documenting them: reference of version 0.5.23.
UNDOCUMENTED_UPSTREAM = (
    "SGLANG_CACHE_DIT_DMD*",
    "SGLANG_DIFFUSION_CFG_GATE_STEP",
    "SGLANG_DIFFUSION_HOST_SPILL_DIR",
    "SGLANG_DIFFUSION_IPC_A2A*",
    "SGLANG_DIFFUSION_PLATFORM_OVERRIDE",
    "SGLANG_DIFFUSION_SYNC_STAGE_PROFILING",
    "SGLANG_DIFFUSION_VAE_CHANNELS_LAST_3D",
    "SGLANG_EXTERNAL_MODEL_PACKAGE",
    "SGLANG_LOG_REQUEST_EXCEEDED_MS",
    "SGLANG_PERF_LOG_DIR",
    "SGLANG_PLUGINS",
    "SGLANG_TORCH_COMPILE_MODE",
    "SGLANG_TORCH_PROFILER_DIR",
    "SGLANG_USE_MODELSCOPE",
    "SGLANG_USE_ROCM_VAE_CONV2D*",
)


def unknown_variables(names: Iterable[str]) -> list[str]:
    """A sentence for each SGLANG_ name, in any case, that is not one of the 45; it shows no value."""
    return [
        describe_unknown(name)
        for name in sorted(names)
        if name.upper().startswith("SGLANG_") and name not in BY_VARIABLE
    ]


def describe_unknown(name: str) -> str:
    if any(fnmatchcase(name, pattern) for pattern in UNDOCUMENTED_UPSTREAM):
        return f"{name} is an undocumented variable of SGLang and is not supported here"
    meant = closest(name.upper(), BY_VARIABLE)
    return f"{name} is not a known variable" + (f"; the closest name is {meant}" if meant else "")


def xdg_roots(texts: Mapping[str, str]) -> dict[str, str]:
    """The default roots as the XDG base directory specification moves them: it ignores a relative path."""
    homes = {
        "SGLANG_DIFFUSION_CACHE_ROOT": texts.get("XDG_CACHE_HOME", ""),
        "SGLANG_DIFFUSION_CONFIG_ROOT": texts.get("XDG_CONFIG_HOME", ""),
    }
    return {name: os.path.join(home, "sgl_diffusion") for name, home in homes.items() if os.path.isabs(home)}


def texts_by_section(texts: Mapping[str, str]) -> dict[str, dict[str, str]]:
    return {
        name: {d.variable: texts[d.variable] for d in section.declarations() if d.variable in texts}
        for name, section in SECTIONS.items()
    }


def find_problems(error: ValidationError, texts: Mapping[str, str]) -> list[Problem]:
    problems = []
    for item in error.errors(include_input=False, include_context=False, include_url=False):
        section, name = item["loc"][:2]  # the name is the field's where the default was refused
        (declaration,) = (d for d in SECTIONS[str(section)].declarations() if name in (d.field, d.variable))
        allowed = item["msg"].removeprefix("Value error, ")
        problems.append(Problem.of(declaration, texts.get(declaration.variable), allowed))
    return problems
