"""Who may import whom: the rules of the design as data, held against the syntax tree of every file."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.support.source import nodes_of

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("serve_app", "deployments", "env_config")


@dataclass(frozen=True)
class Rule:
    """What the modules that match may import of our own packages, and which libraries they never import."""

    modules: tuple[str, ...]
    may_import: tuple[str, ...]
    never: tuple[str, ...] = ()


HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "cache_dit",
    "runai_model_streamer",
)
HTTP = ("fastapi", "starlette", "uvicorn")


def room(name: str) -> tuple[str, ...]:
    """A folder and all that is in it."""
    return name, f"{name}.*"


AUTOSCALING = room("serve_app.autoscaling")
ENV_CONFIG = room("env_config")
MESSAGES = ("deployments.messages", "deployments.errors", "deployments.needed_inputs")
# What a stage is built from, and what a request says of a LoRA; no library but pydantic.
ARGUMENTS = (
    "deployments.model",
    "deployments.memory.args",
    "deployments.ranks.args",
    "deployments.adapters.args",
    "deployments.adapters.use",
)
ADAPTERS = room("deployments.adapters")  # LoRAs: fetched, in memory, in a forward
TRACING = room("deployments.tracing")  # spans, which every room may make
METER = ("deployments.metrics.meter", "deployments.metrics.metric", "deployments.metrics.table")
SERVE_METER = ("deployments.metrics.serve_meter",)
STARTING = ("deployments.starting",)  # what a replica tells of its start
LACKS = ("deployments.lacks",)  # what a group of ranks leaves to the next one
DEVICES = ("deployments.devices", "deployments.device_memory")
ACCELERATORS = ("deployments.accelerators",)  # what a replica must be given by Ray
MEMORY = room("deployments.memory")  # how a process fits on its device
RANKS = room("deployments.ranks")  # a denoiser on several devices
SPLITS = (
    "deployments.ranks.splits",
    "deployments.ranks.weights",
    *room("deployments.ranks.by_cache_dit"),
)  # the ways that a model has
MODULES = ("deployments.modules",)  # the modules of a stage, which accelerations and features may change
OUT_OF_MEMORY = ("deployments.tensors.out_of_memory",)  # what devices and libraries say of it
TENSORS, WEIGHTS, MEDIA = room("deployments.tensors"), room("deployments.weights"), room("deployments.media")
# What tells equal components apart from others, by their files.
SAME_FILES = tuple(f"deployments.weights.{name}" for name in ("files", "shared.same_files"))
ENGINE, STAGE_PIPELINE = room("deployments.engine"), room("deployments.stage_pipeline")
DENOISING, FEATURES = room("deployments.denoising"), room("deployments.features")
ACCELERATIONS, OBSERVABILITY = room("deployments.accelerations"), room("deployments.observability")
STAGES, REPLICAS = room("deployments.stages"), room("deployments.replicas")
ONE_PROCESS = room("deployments.one_process")  # all stages here, behind handles like Ray's
VERIFY = room("deployments.verify")  # the check of a split; what asks for one and reads its report needs no torch
PLAN = room("deployments.plan")  # the memory plan; what asks for one and chooses by it needs no torch
PLANNED_WITH = ("process", "measured", "cards", "budget", "ranks", "choose")
ASK_FOR_A_PLAN = tuple(f"deployments.plan.{name}" for name in PLANNED_WITH)
ASK_FOR_A_CHECK = ("deployments.verify.asked", "deployments.verify.process", "deployments.verify.verdict")

HTTP_ROOM, MAKING, REQUESTS = room("serve_app.http"), room("serve_app.making"), room("serve_app.requests")
LORA_ROOM = room("serve_app.adapters")  # those of the configuration, and those that were added while running
MODELS = room("serve_app.models")  # each with all that its requests need, and which of them a request means
JOBS, STORAGE, TOOLS = room("serve_app.jobs"), room("serve_app.storage"), room("serve_app.tools")
# What every room of the application may ask.
LORAS = ("deployments.adapters.args", "deployments.adapters.use")
DOOR = (
    "serve_app.errors",
    "serve_app.deadlines",
    "serve_app.bounded_threads",
    *MESSAGES,
    *METER,
    *LORAS,
    *TRACING,
    *ENV_CONFIG,
)

# The first rule that a module matches is its rule; a module without one fails the test. From the top of the house down.
RULES = (
    Rule(
        ("serve_app.app",),
        (
            "serve_app.ingress",
            "serve_app.own_versions",
            "serve_app.service",
            "serve_app.models.args",
            "serve_app.models.shared",
            "serve_app.adapters.places",
            *DOOR,
            "deployments.replicas.table",
            *ARGUMENTS,
        ),
    ),
    Rule(
        ("serve_app.tools.verify",),
        ("serve_app.app", *TOOLS, *DOOR, *ASK_FOR_A_CHECK, "deployments.replicas.table", *ARGUMENTS),
    ),
    Rule(
        (
            "serve_app.tools.options",
            "serve_app.tools.plan",
            "serve_app.tools.planned_config",
            "serve_app.tools.fits",
        ),
        (
            "serve_app.app",
            "serve_app.models.shared",
            *TOOLS,
            *DOOR,
            *ASK_FOR_A_PLAN,
            "deployments.replicas.table",
            *ARGUMENTS,
        ),
    ),
    Rule(
        ("serve_app.tools.command.server.here_process",),  # an ingress and its stages in one process
        (
            "serve_app.app",
            "serve_app.service",
            "serve_app.http.app",
            "serve_app.jobs.service",
            "serve_app.making.stages",
            "serve_app.storage.s3",
            *TOOLS,
            *ONE_PROCESS,
            *DOOR,
        ),
    ),
    Rule(
        TOOLS,
        (
            "serve_app.app",
            "serve_app.models.shared",
            "deployments.plan.cards",
            "serve_app.api_keys",
            *AUTOSCALING,
            *TOOLS,
            *DOOR,
            *ACCELERATORS,
        ),
    ),
    Rule(
        ("serve_app.ingress",),
        (
            "serve_app.service",
            *HTTP_ROOM,
            *MAKING,
            *DOOR,
            *SERVE_METER,
            "deployments.observability.logging_setup",
        ),
    ),
    Rule(
        HTTP_ROOM,
        (
            *HTTP_ROOM,
            "serve_app.service",
            "serve_app.api_keys",
            "serve_app.public_address",
            *JOBS,
            *LORA_ROOM,
            *MODELS,
            *MAKING,
            *REQUESTS,
            *STORAGE,
            *DOOR,
        ),
    ),
    Rule(
        ("serve_app.service",),
        (
            "serve_app.api_keys",
            "serve_app.public_address",
            *JOBS,
            *LORA_ROOM,
            *MODELS,
            *MAKING,
            *REQUESTS,
            *STORAGE,
            *DOOR,
        ),
    ),
    Rule(
        ("serve_app.models.shared",),
        (*DOOR, *ARGUMENTS, "deployments.replicas.table", *SAME_FILES),
        never=(*HEAVY, *HTTP),
    ),
    Rule(MODELS, (*MODELS, *JOBS, *LORA_ROOM, *MAKING, *REQUESTS, *STORAGE, *DOOR), never=HTTP),
    Rule(
        LORA_ROOM,
        (
            *LORA_ROOM,
            "serve_app.jobs.database",
            "serve_app.jobs.tables",
            "serve_app.jobs.threads",
            "serve_app.making.stages",
            "serve_app.requests.limits",
            "serve_app.requests.loras",
            *DOOR,
        ),
        never=HTTP,
    ),
    Rule(JOBS, (*JOBS, *MAKING, *REQUESTS, *STORAGE, "serve_app.outbound", *DOOR), never=HTTP),
    Rule(MAKING, (*MAKING, *STARTING, *DOOR), never=HTTP),
    Rule(
        REQUESTS,
        (*REQUESTS, "serve_app.outbound", "deployments.media.opening", "deployments.media.input_sounds", *DOOR),
        never=HTTP,
    ),
    Rule(STORAGE, (*STORAGE, *DOOR), never=HTTP),
    Rule(
        (
            "serve_app",
            "serve_app.errors",
            "serve_app.addresses",
            "serve_app.bounded_threads",
            "serve_app.deadlines",
            "serve_app.outbound",
            "serve_app.api_keys",
            "serve_app.public_address",
        ),
        ("serve_app.addresses", *DOOR),
        never=HTTP,
    ),
    Rule(("serve_app.proxy",), ("serve_app.http.middleware.serve_errors",)),  # runs in Serve's proxy
    Rule(("serve_app.own_versions",), (), HEAVY),  # of deployments of any application
    Rule(AUTOSCALING, AUTOSCALING),  # Serve sends it by value into its controller
    Rule(("deployments",), (), never=(*HEAVY, *HTTP, "ray")),
    Rule(TRACING, (*TRACING, *ENV_CONFIG), never=(*HEAVY, *HTTP, "ray")),
    Rule(STARTING, (), never=(*HEAVY, *HTTP)),
    Rule(LACKS, (*RANKS,), never=HTTP),
    Rule(SERVE_METER, METER, never=(*HEAVY, *HTTP)),
    Rule(room("deployments.metrics"), room("deployments.metrics"), never=(*HEAVY, *HTTP, "ray")),
    Rule((*MESSAGES, *ARGUMENTS, *ACCELERATORS), (*MESSAGES, *ARGUMENTS), never=(*HEAVY, *HTTP, "ray")),
    Rule(
        ASK_FOR_A_CHECK,
        (*ASK_FOR_A_CHECK, *MESSAGES, *ARGUMENTS),
        never=(*HEAVY, *HTTP, "ray"),
    ),
    Rule(ASK_FOR_A_PLAN, (*ASK_FOR_A_PLAN, *MESSAGES, *ARGUMENTS, *ENV_CONFIG), never=(*HEAVY, *HTTP, "ray")),
    Rule(
        PLAN,
        (
            *PLAN,
            *VERIFY,
            *STAGES,
            *STAGE_PIPELINE,
            *WEIGHTS,
            "deployments.memory.activations",
            *TENSORS,
            *SPLITS,
            "deployments.observability.logging_setup",
            *ARGUMENTS,
            *MESSAGES,
            *ENV_CONFIG,
        ),
        never=("ray", *HTTP),
    ),
    Rule(
        VERIFY,
        (
            *VERIFY,
            *STAGES,
            "deployments.features",
            *STAGE_PIPELINE,
            *ENGINE,
            *TENSORS,
            "deployments.observability.logging_setup",
            *DEVICES,
            *MODULES,
            *ARGUMENTS,
            *MESSAGES,
            *ENV_CONFIG,
        ),
        never=("ray", *HTTP),
    ),
    Rule(("deployments.stage_replica",), ("deployments.replicas.replica",), never=HTTP),  # Serve imports it
    Rule(
        REPLICAS,
        (
            *REPLICAS,
            *METER,
            *SERVE_METER,
            *STARTING,
            *LACKS,
            *TRACING,
            *ASK_FOR_A_CHECK,
            *STAGES,
            *ADAPTERS,
            *STAGE_PIPELINE,
            *ENGINE,
            *DENOISING,
            *FEATURES,
            *ACCELERATIONS,
            *RANKS,
            *OBSERVABILITY,
            *WEIGHTS,
            *OUT_OF_MEMORY,
            *MEDIA,
            *DEVICES,
            *ACCELERATORS,
            *MODULES,
            *ARGUMENTS,
            *MESSAGES,
            *ENV_CONFIG,
        ),
        never=("diffusers", "transformers", *HTTP),
    ),
    Rule(
        ONE_PROCESS,
        (
            *ONE_PROCESS,
            "deployments.replicas.threads",
            *STAGES,
            *ADAPTERS,
            *STAGE_PIPELINE,
            *ENGINE,
            *FEATURES,
            *OBSERVABILITY,
            *MEDIA,
            *DEVICES,
            *MODULES,
            *ARGUMENTS,
            *MESSAGES,
            *ENV_CONFIG,
        ),
        never=HTTP,
    ),
    Rule(
        STAGES,
        (
            *STAGES,
            *TRACING,
            *ADAPTERS,
            *STAGE_PIPELINE,
            *ENGINE,
            *DENOISING,
            *FEATURES,
            *ACCELERATIONS,
            *RANKS,
            *WEIGHTS,
            *MEDIA,
            *MEMORY,
            *TENSORS,
            *DEVICES,
            *MODULES,
            *ARGUMENTS,
            *MESSAGES,
            *ENV_CONFIG,
        ),
        never=("ray", *HTTP),
    ),
    Rule(
        DENOISING,
        (*DENOISING, *STAGE_PIPELINE, *ENGINE, *TENSORS, *MESSAGES),
        never=("ray", *HTTP),
    ),
    Rule(
        FEATURES,
        (*FEATURES, *ADAPTERS, *DENOISING, *STAGE_PIPELINE, *ENGINE, *TENSORS, *MODULES, *MESSAGES, *ENV_CONFIG),
        never=("ray", *HTTP),
    ),
    Rule(
        ENGINE,
        (*ENGINE, *TENSORS, "deployments.errors"),
        never=("ray", "diffusers", "transformers", *HTTP),
    ),
    Rule(
        STAGE_PIPELINE,
        (*STAGE_PIPELINE, *WEIGHTS, *MEMORY, *TENSORS, "deployments.media.fields", *MESSAGES),
        never=("ray", *HTTP),
    ),
    Rule(
        ADAPTERS,
        (*ADAPTERS, *STAGE_PIPELINE, *WEIGHTS, *TENSORS, *MODULES, *ARGUMENTS, *MESSAGES, *ENV_CONFIG),
        never=("ray", *HTTP),
    ),
    Rule(RANKS, (*RANKS, *ENGINE, *TENSORS, *MODULES, *ARGUMENTS, *MESSAGES), never=("ray", *HTTP)),
    Rule(MEMORY, (*MEMORY, *TENSORS, *MODULES, *ARGUMENTS, *MESSAGES), never=("ray", *HTTP)),
    Rule(
        ACCELERATIONS,
        (*ACCELERATIONS, *WEIGHTS, *OUT_OF_MEMORY, *MODULES, *DEVICES, *ARGUMENTS, *MESSAGES, *ENV_CONFIG),
        never=("ray", *HTTP),
    ),
    Rule(OBSERVABILITY, (*OBSERVABILITY, *TRACING, *DEVICES, *MESSAGES, *ENV_CONFIG), never=("ray", *HTTP)),
    Rule(
        ("deployments.media.outputs", "deployments.media.pixels", "deployments.media.samples"),
        (*MEDIA, *LORAS, *MESSAGES, *ENV_CONFIG),
        never=("ray", *HTTP),
    ),
    Rule(
        ("deployments.media.files",),
        (*MEDIA, *MESSAGES),
        never=(*(name for name in HEAVY if name != "safetensors"), *HTTP, "ray"),
    ),
    Rule(MEDIA, (*MEDIA, *MESSAGES, *ENV_CONFIG), never=(*HEAVY, *HTTP, "ray")),
    Rule(
        (
            "deployments.weights.locate",
            "deployments.weights.files",
            "deployments.weights.s3",
            "deployments.weights.shared.same_files",
        ),
        (*WEIGHTS, *MESSAGES),
        never=(*HEAVY, *HTTP, "ray"),
    ),
    Rule(("deployments.weights.stream",), (*WEIGHTS, *MESSAGES, "env_config.streamer_memory"), never=("ray", *HTTP)),
    Rule(WEIGHTS, (*WEIGHTS, *ARGUMENTS, *MESSAGES), never=("ray", *HTTP)),
    Rule(TENSORS, (*TENSORS, *MESSAGES), never=("ray", *HTTP)),
    Rule(MODULES, (*DEVICES, *ARGUMENTS, *MESSAGES), never=("ray", *HTTP)),
    Rule(DEVICES, (*DEVICES, *ACCELERATORS, *MESSAGES, *ENV_CONFIG), never=("ray", *HTTP)),
    Rule(ENV_CONFIG, ENV_CONFIG, never=(*HEAVY, *HTTP, "ray", "numpy")),
)

# A library that not every machine has, or that one room wraps: the only modules that may import it.
WRAPPED_BY = {
    "alembic": ("serve_app.jobs.database", "serve_app.jobs.migrations.*"),
    "av": (
        "deployments.media.files",
        "deployments.media.input_sounds",
        "serve_app.storage.previews",
        "serve_app.requests.input_videos",
    ),
    "boto3": ("serve_app.storage.s3", "deployments.weights.*"),
    "cache_dit": ("deployments.features.cache_dit.*", "deployments.ranks.by_cache_dit.*"),
    "flash_attn": ("deployments.accelerations.*",),
    "flash_attn_interface": ("deployments.accelerations.*",),
    "opentelemetry": ("deployments.tracing.sdk",),
    "mlx": ("deployments.accelerations.*",),
    "gguf": ("deployments.weights.*",),
    "runai_model_streamer": ("deployments.weights.*",),
    "sqlalchemy": ("serve_app.jobs.*", "serve_app.adapters.store"),
    "torch_musa": ("deployments.devices",),
    "torch_npu": ("deployments.devices",),
    "torchao": ("deployments.weights.*",),
}

MAY_READ_THE_ENVIRONMENT = ("env_config", "tests", "benchmarks", "checkpoints")
ANY_IMPORTS = tuple(name for name in MAY_READ_THE_ENVIRONMENT if name not in PACKAGES)  # no rule is about these
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}


def test_every_import_of_the_project_keeps_the_rules() -> None:
    assert violations(ROOT) == []


def test_every_rule_speaks_of_a_module_that_exists() -> None:
    modules = modules_of(ROOT)
    unused = [rule.modules for rule in RULES if not any(matches(module, rule.modules) for module in modules)]
    assert unused == []


PLANTED = {
    "serve_app/ingress.py": ("import torch", "serve_app.ingress imports torch"),
    "serve_app/storage/s3.py": (
        "from deployments import devices",
        "serve_app.storage.s3 imports deployments.devices",
    ),
    "serve_app/jobs.py": (
        "def late():\n    from deployments.weights.load import load",
        "serve_app.jobs imports deployments.weights.load",
    ),
    "deployments/stage_pipeline/sessions/session.py": (
        "import ray.serve as serve",
        "deployments.stage_pipeline.sessions.session imports ray.serve",
    ),
    "deployments/engine/engine.py": ("from ray import serve", "deployments.engine.engine imports ray"),
    "deployments/messages.py": ("from torch import Tensor", "deployments.messages imports torch"),
    "deployments/weights/load.py": (
        "import deployments.features.cache_dit.contexts",
        "deployments.weights.load imports deployments.features.cache_dit.contexts",
    ),
    "deployments/weights/locate.py": (
        "from deployments.weights import load\nimport torch",
        "deployments.weights.locate imports torch",
    ),
    "deployments/weights/quantization/nvfp4.py": (
        "from deployments.accelerations import fp4_gemm",
        "deployments.weights.quantization.nvfp4 imports deployments.accelerations",
    ),
    "deployments/replicas/table.py": (
        "from serve_app import jobs",
        "deployments.replicas.table imports serve_app.jobs",
    ),
    "deployments/media/pixels.py": ("import mlx.core as mx", "deployments.media.pixels imports mlx.core"),
    "deployments/replicas/replica.py": ("from . import media", "deployments.replicas.replica: relative import"),
    "env_config/section.py": ("import torch", "env_config.section imports torch"),
    "deployments/misplaced.py": ("", "deployments.misplaced: no rule"),
    "deployments/devices.py": ("import os\nos.environ['A']", "deployments.devices reads os.environ"),
    "deployments/replicas/dev.py": ("from os import getenv", "deployments.replicas.dev reads os.getenv"),
    "benchmarks/overhead.py": ("import os\nos.environ['A']", None),
    "env_config/parsing.py": ("import os\nos.environ['A']", None),
}


@pytest.mark.parametrize("file", PLANTED)
def test_a_planted_violation_is_found_and_nothing_else(file: str, tmp_path: Path) -> None:
    for name in PLANTED:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "deployments/misplaced.py").unlink()
    code, expected = PLANTED[file]
    (tmp_path / file).write_text(code)

    found = violations(tmp_path)

    assert len(found) == (1 if expected else 0)
    assert all(violation.startswith(expected or "") for violation in found)


def test_an_ingress_and_what_builds_an_application_load_no_torch() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import serve_app.app, sys; print(*sorted(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout.split()
    assert "serve_app.ingress" in loaded
    assert [name for name in HEAVY if name in loaded] == []


def test_nothing_is_imported_from_a_test_module(tmp_path: Path) -> None:
    assert imports_from_tests(ROOT) == []
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("from tests.support.toy import A\nfrom tests.unit.test_b import B")
    assert imports_from_tests(tmp_path) == ["tests/test_a.py:2 imports tests.unit.test_b"]


OTHER_TESTS = re.compile(r"\btests\.(?!support|side_by_side)")  # where it is not written, it is not imported


def imports_from_tests(root: Path) -> list[str]:
    """What is imported from tests but from tests.support, whose modules hold what tests share."""
    found = [file for folder in ("tests", "benchmarks") for file in sorted((root / folder).rglob("*.py"))]
    files = [file for file in found if OTHER_TESTS.search(file.read_text(encoding="utf-8"))]
    return [
        f"{file.relative_to(root)}:{line} imports {module}"
        for file in files
        for line, module in imports_in(nodes_of(file), set())
        if module.startswith("tests.") and not module.startswith(("tests.support", "tests.side_by_side"))
    ]


def violations(root: Path) -> list[str]:
    """Every broken rule in the tree at `root`, one sentence each, with the line where it stands."""
    modules = modules_of(root)
    found = []
    for module, path in modules.items():
        if module.partition(".")[0] in ANY_IMPORTS:
            continue
        nodes = nodes_of(path)
        found += [
            f"{violation} ({path.relative_to(root)}:{line})"
            for line, violation in [
                *import_violations(module, nodes, set(modules)),
                *environment_reads(module, nodes),
            ]
        ]
    return found


def modules_of(root: Path) -> dict[str, Path]:
    """The dotted name of every Python file below `root`, tests and virtual environments apart."""
    apart = ("tests", "build", "dist")
    folders = [top for top in root.iterdir() if top.is_dir() and not top.name.startswith(".") and top.name not in apart]
    found = [*root.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    files = sorted(path.relative_to(root) for path in found)
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): root / file for file in files}


def import_violations(module: str, nodes: Iterable[ast.AST], modules: set[str]) -> Iterator[tuple[int, str]]:
    if module.split(".")[0] not in PACKAGES:
        return
    rule = next((rule for rule in RULES if matches(module, rule.modules)), None)
    if rule is None:
        yield 1, f"{module}: no rule says what it may import; add one to {Path(__file__).name}"
        return
    for line, imported in imports_in(nodes, modules):
        library = imported.split(".")[0]
        never = (*rule.never, *(HEAVY if module.startswith("serve_app") else ()))
        refused = library in never or not matches(module, WRAPPED_BY.get(library, ("*",)))
        if imported == "":
            yield line, f"{module}: relative import"
        elif refused or (library in PACKAGES and not matches(imported, rule.may_import)):
            yield line, f"{module} imports {imported}"


def imports_in(nodes: Iterable[ast.AST], modules: set[str]) -> Iterator[tuple[int, str]]:
    """The modules that a file imports anywhere in it, with their lines; "" for a relative import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, ""
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in sorted({n if n in modules else node.module for n in names}))


def environment_reads(module: str, nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    if module.split(".")[0] in MAY_READ_THE_ENVIRONMENT:
        return
    for node in nodes:
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name in ENVIRONMENT:
                yield node.lineno, f"{module} reads os.{name}"
            case ast.ImportFrom(module="os", names=names):
                yield from (
                    (node.lineno, f"{module} reads os.{alias.name}") for alias in names if alias.name in ENVIRONMENT
                )


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)
