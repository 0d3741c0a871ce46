"""The files of ray_configs/: each builds its application, and a mistake in one is refused by name."""

import inspect
import math
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from benchmarks.report import table_in
from deployments.plan.budget import needed, usable
from deployments.plan.cards import card_of
from env_config.ray_proxy import AROUND_PROXY, VARIABLE
from serve_app.app import AppArgs, ModelEntry, build_app
from serve_app.tools.check_config import check_config, deployment_names
from serve_app.tools.fits import demanded
from tests.support.measured_published import kept_measurement
from tests.support.planned_configs import PAGE, comment, planned_comment, planned_files, planned_table
from tests.support.planned_configs import application_of as planned_application

FOLDER = Path(__file__).resolve().parents[3] / "ray_configs"
SERVE_FILES = sorted(FOLDER.rglob("serve_*.yaml"))
KUBERAY_FILES = sorted(FOLDER.rglob("kuberay_*.yaml"))
CLUSTER_FILES = sorted(FOLDER.glob("cluster_*.yaml"))
DEPLOYMENTS = {
    "three_stage": {"Encoder", "Denoiser", "VAE"},
    "two_stage": {"EncoderVAE", "Denoiser"},
    "one_stage": {"Pipeline"},
}
PIPELINES = {  # what `model_index.json` of each checkpoint names
    "checkpoints/emoji-flux": "FluxPipeline",
    "checkpoints/emoji-wan": "WanPipeline",
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
    "black-forest-labs/FLUX.2-dev": "Flux2Pipeline",
    "Lightricks/LTX-2": "LTX2Pipeline",
    "Qwen/Qwen-Image": "QwenImagePipeline",
    "Qwen/Qwen-Image-Edit": "QwenImageEditPipeline",
    "Tongyi-MAI/Z-Image-Turbo": "ZImagePipeline",
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": "WanPipeline",
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": "WanPipeline",
}


def file_name(file: Path) -> str:
    return file.name


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def application_of(file: Path) -> Any:
    [application] = load(file)["applications"]
    return application


ENTRIES = [
    (f"{file.name} {name}", entry)
    for file in SERVE_FILES
    for name, entry in AppArgs(**application_of(file)["args"]).entries.items()
]
ONE_MODEL = [file for file in SERVE_FILES if "model" in application_of(file)["args"]]


def test_the_promised_models_are_there() -> None:
    assert {entry.model for _, entry in ENTRIES} == set(PIPELINES)


def test_every_placement_has_an_example() -> None:
    assert {entry.placement for _, entry in ENTRIES} == set(DEPLOYMENTS)


@pytest.mark.parametrize("file", SERVE_FILES + KUBERAY_FILES, ids=file_name)
def test_a_file_has_no_problems(file: Path) -> None:
    assert check_config(file) == []


@pytest.mark.parametrize("file", SERVE_FILES, ids=file_name)
def test_a_file_builds_the_deployments_of_its_placement(file: Path) -> None:
    args = AppArgs(**application_of(file)["args"])
    named = {name: f"-{name}" if args.models else "" for name in args.entries}
    stages = {f"{kind}{named[name]}" for name, entry in args.entries.items() for kind in DEPLOYMENTS[entry.placement]}
    assert set(deployment_names(build_app(args))) == {"Ingress", *stages}


@pytest.mark.parametrize("file", SERVE_FILES, ids=file_name)
def test_a_file_opens_its_port_to_this_machine_only(file: Path) -> None:
    assert load(file)["http_options"]["host"] == "127.0.0.1"


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_the_defaults_are_within_the_limits(name: str, entry: ModelEntry) -> None:
    defaults, limits = entry.default_arguments, entry.limits
    if "width" in defaults:  # else it follows from the picture
        assert defaults["width"] * defaults["height"] <= limits.max_pixels
        assert max(defaults["width"], defaults["height"]) <= limits.max_side
    assert defaults["num_inference_steps"] <= limits.max_steps
    assert defaults.get("num_frames", 1) <= limits.max_frames


@pytest.mark.parametrize(("name", "entry"), ENTRIES)
def test_the_pipeline_takes_the_defaults(name: str, entry: ModelEntry) -> None:
    """The replica would refuse them too, but only after the weights were downloaded."""
    pipeline_class = getattr(diffusers, PIPELINES[entry.model])
    assert set(entry.default_arguments) <= set(inspect.signature(pipeline_class.__call__).parameters)


@pytest.mark.parametrize("file", SERVE_FILES, ids=file_name)
def test_the_stages_of_one_replica_each_fit_into_whole_gpus(file: Path) -> None:
    """Shares that cannot be laid out on the GPUs that they add up to would leave a replica pending for ever."""
    options = [each.get("ray_actor_options", {}) for each in application_of(file)["deployments"]]
    shares = [option["num_gpus"] for option in options if "num_gpus" in option]
    free: list[float] = []
    for share in sorted(shares, reverse=True):
        fitting = next((index for index, left in enumerate(free) if left + 1e-6 >= share), None)
        if fitting is None:
            free.append(1 - share)
        else:
            free[fitting] -= share
    assert len(free) == math.ceil(sum(shares)), f"{shares} take {len(free)} GPUs"


@pytest.mark.parametrize("file", planned_files(), ids=file_name)
def test_the_comment_of_a_file_is_what_the_plan_says_today(file: Path) -> None:
    """After `python -m tests.support.planned_configs`."""
    assert comment(file) == planned_comment(file, planned_files()[file])


@pytest.mark.parametrize("file", planned_files(), ids=file_name)
def test_by_the_plan_a_file_fits_its_card_with_all_that_it_may_merge(file: Path) -> None:
    application, args, measured = planned_application(file)
    totals = needed(demanded(measured, args, application, args.denoising.max_batch_size))
    assert max(totals.values()) <= usable(planned_files()[file].num_bytes)


@pytest.mark.parametrize("file", planned_files(), ids=file_name)
def test_a_file_was_planned_at_its_default_size(file: Path) -> None:
    _, args, measured = planned_application(file)
    sizes = {name: args.default_arguments.get(name) for name in ("width", "height", "num_frames")}
    planned = {"width": measured.width, "height": measured.height, "num_frames": measured.num_frames}
    assert {name: size for name, size in sizes.items() if size is not None}.items() <= planned.items()


def test_every_file_for_a_gpu_has_its_plan_and_the_page_has_them_all() -> None:
    on_gpus = [file for file in ONE_MODEL if "TARGET_DEVICE: cuda" in file.read_text(encoding="utf-8")]
    assert list(planned_files()) == on_gpus
    assert table_in(PAGE.read_text(encoding="utf-8"), "plan") == planned_table()


def test_several_models_fit_their_cards_together() -> None:
    file = FOLDER / "serve_many_models.yaml"
    application, card = application_of(file), card_of("H100")
    args = AppArgs(**application["args"])
    all_demands = [
        demand
        for name, entry in args.entries.items()
        for demand in demanded(kept_measurement(entry.model), args, application, entry.denoising.max_batch_size, name)
    ]
    totals = needed(all_demands)
    assert len(totals) == 4
    assert max(totals.values()) <= usable(card.num_bytes)


MISTAKES: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "key": (("applications", 0, "rout_prefix"), "/", "rout_prefix: unknown key; did you mean 'route_prefix'?"),
    "deployment's key": (
        ("applications", 0, "deployments", 0, "graceful_shutdown_timeout"),
        60,
        "did you mean 'graceful_shutdown_timeout_s'?",
    ),
    "actor option": (
        ("applications", 0, "deployments", 1, "ray_actor_options", "num_gpu"),
        1,
        "did you mean 'num_gpus'?",
    ),
    "argument": (("applications", 0, "args", "default_argument"), {}, "did you mean 'default_arguments'?"),
    "limit": (("applications", 0, "args", "limits", "max_pixel"), 1, "did you mean 'max_pixels'?"),
    "placement": (("applications", 0, "args", "placement"), "3_stage", "'three_stage', 'two_stage' or 'one_stage'"),
    "deployment": (("applications", 0, "deployments", 1, "name"), "Encoders", "did you mean 'Encoder'?"),
    "variable": (
        ("applications", 0, "runtime_env", "env_vars", "SGLANG_DIFFUSION_TARGET_DEVISE"),
        "cpu",
        "the closest name is SGLANG_DIFFUSION_TARGET_DEVICE",
    ),
    "value of a variable": (
        ("applications", 0, "runtime_env", "env_vars", "SGLANG_DIFFUSION_TARGET_DEVICE"),
        "gpu",
        "SGLANG_DIFFUSION_TARGET_DEVICE = 'gpu': must be one of cuda, rocm, xpu, npu, musa, mps, cpu",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_refused_with_what_was_meant(mistake: str, tmp_path: Path) -> None:
    path, value, meant = MISTAKES[mistake]
    config = load(FOLDER / "serve_flux1_dev_h100.yaml")
    place = config
    for part in path[:-1]:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[path[-1]] = value
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    assert any(meant in problem for problem in check_config(file))


@pytest.mark.parametrize("file", KUBERAY_FILES, ids=file_name)
def test_a_ray_service_serves_what_its_serve_file_does(file: Path) -> None:
    """The file for Kubernetes repeats the Serve config, and adds the names of its Service: no drifting apart."""
    service = load(file)
    served = yaml.safe_load(service["spec"]["serveConfigV2"])
    original = FOLDER / file.name.replace("kuberay_", "serve_")
    [application] = served["applications"]
    assert f"{service['metadata']['name']}-serve-svc" in application["args"].pop("allowed_hosts")
    assert served["applications"] == load(original)["applications"]


@pytest.mark.parametrize("file", CLUSTER_FILES, ids=file_name)
def test_ray_accepts_a_cluster_file(file: Path) -> None:
    validate_config(prepare_config(load(file)))


@pytest.mark.parametrize("file", CLUSTER_FILES + KUBERAY_FILES, ids=file_name)
def test_a_cluster_runs_the_pinned_ray(file: Path) -> None:
    """Ray refuses to join machines of different versions."""
    [pinned] = re.findall(r"^ray==(.+)$", (FOLDER.parent / "constraints.txt").read_text(), re.MULTILINE)
    named = re.findall(r"(?:rayproject/ray:|rayVersion: )([\d.]+)", file.read_text())
    assert set(named) == {pinned}


@pytest.mark.parametrize("file", SERVE_FILES + KUBERAY_FILES, ids=file_name)
def test_an_ingress_that_is_replaced_may_answer_all_that_its_queue_holds(file: Path) -> None:
    """By default, and where the file says another number."""
    config = load(file)
    [application] = (yaml.safe_load(config["spec"]["serveConfigV2"]) if "spec" in config else config)["applications"]
    args = AppArgs(**application["args"])
    ingress = build_app(args)._bound_deployment
    by_file = {each["name"]: each for each in application["deployments"]}.get("Ingress", {})
    draining_s = by_file.get("graceful_shutdown_timeout_s", ingress._deployment_config.graceful_shutdown_timeout_s)
    assert draining_s >= max(entry.admission.max_queue_s for entry in args.entries.values()) + 300
    assert ingress._deployment_config.max_surge_percent == 100


@pytest.mark.parametrize("file", CLUSTER_FILES + KUBERAY_FILES, ids=file_name)
def test_every_node_wraps_serves_proxies(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert VARIABLE in text
    assert AROUND_PROXY in text
    if "rayClusterConfig" in text:
        cluster = load(file)["spec"]["rayClusterConfig"]
        groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
        for container in (each for group in groups for each in group["template"]["spec"]["containers"]):
            assert {"name": VARIABLE, "value": AROUND_PROXY} in container["env"]
