"""A Serve config file with a mistake is refused by name; Serve itself would accept most of these."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve_app.tools.check_config import check_config, main
from serve_app.tools.check_policy import check_our_policy

POLICY = "ray.serve.autoscaling_policy:default_autoscaling_policy"


def good_config() -> dict[str, Any]:
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": 8000},
        "applications": [
            {
                "name": "toy",
                "route_prefix": "/",
                "import_path": "tests.support.toy_app:build_app",
                "args": {"load_s": 1, "limits": {"largest_side": 64}},
                "runtime_env": {"env_vars": {"SGLANG_CLOUD_STORAGE_TYPE": ""}},
                "deployments": [
                    {"name": "Ingress", "num_replicas": 1},
                    {
                        "name": "Encoder",
                        "autoscaling_config": {
                            "min_replicas": 1,
                            "max_replicas": 2,
                            "policy": {"policy_function": POLICY, "policy_kwargs": {"anything": 1}},
                        },
                        "ray_actor_options": {
                            "num_cpus": 0.5,
                            "resources": {"anything": 1},
                            "runtime_env": {"env_vars": {"SGLANG_CLOUD_STORAGE_TYPE": ""}},
                        },
                        "user_config": {"anything": 1},
                    },
                ],
            }
        ],
    }


def problems_of(config: object, tmp_path: Path) -> list[str]:
    file = tmp_path / "serve.yaml"
    file.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return [problem.removeprefix(f"{file}: ") for problem in check_config(file)]


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good config with one key set, named like `applications.0.args.load_s`."""
    config: Any = good_config()
    *parents, last = path.split(".")
    place = config
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    place[last] = value
    return config


def test_a_config_without_mistakes_has_no_problems(tmp_path: Path) -> None:
    assert problems_of(good_config(), tmp_path) == []


ENCODER = "applications.0.deployments.1"
MISSPELT = {
    "htp_options": ("htp_options", "http_options"),
    "http_options.prot": ("http_options.prot", "port"),
    "applications.0.import_pth": ("applications[toy].import_pth", "import_path"),
    f"{ENCODER}.num_replica": ("applications[toy].deployments[Encoder].num_replica", "num_replicas"),
    f"{ENCODER}.ray_actor_options.num_gpu": (
        "applications[toy].deployments[Encoder].ray_actor_options.num_gpu",
        "num_gpus",
    ),
    f"{ENCODER}.ray_actor_options.runtime_env.env_var": (
        "applications[toy].deployments[Encoder].ray_actor_options.runtime_env.env_var",
        "env_vars",
    ),
    f"{ENCODER}.autoscaling_config.max_replica": (
        "applications[toy].deployments[Encoder].autoscaling_config.max_replica",
        "max_replicas",
    ),
    f"{ENCODER}.autoscaling_config.policy.policy_fn": (
        "applications[toy].deployments[Encoder].autoscaling_config.policy.policy_fn",
        "policy_function",
    ),
    "applications.0.runtime_env.env_var": ("applications[toy].runtime_env.env_var", "env_vars"),
    "applications.0.args.lod_s": ("applications[toy].args.lod_s", "load_s"),
    "applications.0.args.limits.largest_sides": (
        "applications[toy].args.limits.largest_sides",
        "largest_side",
    ),
}


@pytest.mark.parametrize("path", MISSPELT)
def test_a_misspelt_key_is_refused_with_the_closest_name(path: str, tmp_path: Path) -> None:
    where, meant = MISSPELT[path]
    assert problems_of(changed(path, {}), tmp_path) == [f"{where}: unknown key; did you mean {meant!r}?"]


def test_serve_itself_accepts_a_misspelt_key() -> None:
    """Why this check exists; once it fails, Serve has become strict and much of the check can go."""
    ServeDeploySchema.model_validate(changed(f"{ENCODER}.ray_actor_options.num_gpu", 1))


def test_a_key_of_an_application_wide_autoscaling_policy_is_looked_at(tmp_path: Path) -> None:
    config = changed("applications.0.autoscaling_policy", {"policy_function": POLICY, "policy_kwarg": {}})
    assert problems_of(config, tmp_path) == [
        "applications[toy].autoscaling_policy.policy_kwarg: unknown key; did you mean 'policy_kwargs'?"
    ]


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("http_options.port", "many", "http_options.port: "),
        (
            f"{ENCODER}.ray_actor_options.num_gpus",
            -1,
            "applications.0.deployments.1.ray_actor_options.num_gpus: ",
        ),
        (
            f"{ENCODER}.autoscaling_config.min_replicas",
            5,
            "applications[toy].deployments[Encoder].autoscaling_config: ",
        ),
        ("applications.0.args.load_s", "long", "applications[toy].args.load_s: "),
        ("applications.0.args.limits.largest_side", "big", "applications[toy].args.limits.largest_side: "),
        (
            f"{ENCODER}.name",
            "Encodr",
            "applications[toy].deployments: no deployment is named 'Encodr'; did you ",
        ),
        (f"{ENCODER}.name", "Ingress", "applications[toy].deployments: 'Ingress' stands there twice"),
        (
            "applications.0.import_path",
            "tests.support.toy_app:biuld_app",
            "applications[toy].import_path: 'tests.support.toy_app:biuld_app': "
            "tests.support.toy_app has no function biuld_app; did you mean 'build_app'?",
        ),
        (
            "applications.0.import_path",
            "tests.serve_app.no_app:build_app",
            "applications[toy].import_path: 'tests.serve_app.no_app:build_app': No module named",
        ),
        (
            "applications.0.import_path",
            "tests.support.toy_app:build_app_untyped",
            "applications[toy].import_path: 'tests.support.toy_app:build_app_untyped': must take one",
        ),
    ],
)
def test_a_bad_value_is_refused_where_it_stands(path: str, value: Any, expected: str, tmp_path: Path) -> None:
    problems = problems_of(changed(path, value), tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith(expected)


def test_a_host_that_is_not_written_is_refused_because_serve_would_listen_everywhere(tmp_path: Path) -> None:
    problems = problems_of(changed("http_options", {"port": 8000}), tmp_path)
    assert [problem.split(":")[0] for problem in problems] == ["http_options.host"]


def test_an_unknown_environment_variable_is_refused(tmp_path: Path) -> None:
    config = changed("applications.0.runtime_env.env_vars.SGLANG_CLOUD_STORAGE_TIPE", "s3")
    problems = problems_of(config, tmp_path)
    assert any("SGLANG_CLOUD_STORAGE_TIPE" in problem for problem in problems)
    assert any("SGLANG_CLOUD_STORAGE_TYPE" in problem for problem in problems)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = yaml.safe_dump(good_config()) + "proxy_location: Disabled\n"
    problems = problems_of(text, tmp_path)
    assert len(problems) == 1
    assert "'proxy_location' stands twice" in problems[0]


def test_a_merge_key_may_stand_beside_the_keys_it_brings(tmp_path: Path) -> None:
    text = yaml.safe_dump(good_config()).replace(
        "http_options:\n  host: 127.0.0.1\n", "http_options:\n  <<: {host: 0.0.0.0}\n  host: 127.0.0.1\n"
    )
    assert "<<" in text
    assert problems_of(text, tmp_path) == []


@pytest.mark.parametrize("text", ["applications: [", "", "- a list", "\x00"])
def test_a_file_that_holds_no_config_is_refused(text: str, tmp_path: Path) -> None:
    assert len(problems_of(text, tmp_path)) == 1


def test_the_config_inside_a_ray_service_is_looked_at(tmp_path: Path) -> None:
    service = {
        "kind": "RayService",
        "spec": {"serveConfigV2": yaml.safe_dump(changed("http_options.prot", 1))},
    }
    assert problems_of(service, tmp_path) == ["http_options.prot: unknown key; did you mean 'port'?"]


def test_the_command_tells_each_file_and_fails_when_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text(yaml.safe_dump(good_config()))
    bad.write_text(yaml.safe_dump(changed("http_options.prot", 1)))
    assert main([str(good), str(bad)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{good}: ok",
        f"{bad}: http_options.prot: unknown key; did you mean 'port'?",
    ]


# --- the policy that scales all stages together ---

OURS = {"policy_function": "serve_app.autoscaling:ReplicaRatio"}


def scaled_by_ours(settings: dict[str, Any], **autoscaling_config: Any) -> dict[str, Any]:
    """The good config, whose Encoder scales by our policy."""
    config = changed(f"{ENCODER}.autoscaling_config", {"upscale_delay_s": 0, "downscale_delay_s": 0})
    config["applications"][0]["autoscaling_policy"] = OURS | {"policy_kwargs": settings}
    config["applications"][0]["deployments"][1]["autoscaling_config"] |= autoscaling_config
    return config


def test_our_policy_with_good_settings_has_no_problems(tmp_path: Path) -> None:
    assert problems_of(scaled_by_ours({"cooldown_s": 60, "accelerators": 4}), tmp_path) == []


BAD_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt": ({"target_utilization": 0.5}, ".target_utilization: unknown key; did you mean 'target_utilisation'?"),
    "out of range": ({"cooldown_s": -1}, ": cooldown_s must be a number of at least 0, got -1"),
    "too few": (
        {"accelerators": 1},
        ".accelerators: 1 is less than min_replicas of the deployments take, 2 together",
    ),
    "unknown deployment": (
        {"accelerators": 4, "accelerators_each": {"Encodr": 1}},
        ".accelerators_each.Encodr: no deployment of this name has an autoscaling_config; did you mean 'Encoder'?",
    ),
    "no pool": (
        {"priorities": {"flux": 2}},
        ": priorities has an effect only with accelerators, the number that all share",
    ),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_of_our_policy_is_refused_by_name(case: str, tmp_path: Path) -> None:
    settings, meant = BAD_SETTINGS[case]
    config = scaled_by_ours(settings, min_replicas=2, max_replicas=5)
    assert problems_of(config, tmp_path) == [f"applications[toy].autoscaling_policy.policy_kwargs{meant}"]


def test_a_priority_of_a_model_that_nobody_serves_is_refused(tmp_path: Path) -> None:
    [problem] = problems_of(scaled_by_ours({"accelerators": 4, "priorities": {"flux": 2}}), tmp_path)
    assert ".priorities.flux: no deployment with an autoscaling_config belongs to this model" in problem


def test_a_replica_that_takes_more_gpus_than_it_is_counted_as_is_refused(tmp_path: Path) -> None:
    config = scaled_by_ours({"accelerators": 8})
    config["applications"][0]["deployments"][1]["ray_actor_options"] = {"num_gpus": 2}
    [problem] = problems_of(config, tmp_path)
    assert problem.endswith("accelerators_each.Encoder: a replica takes 2 GPUs and is counted as 1; write Encoder: 2")
    config["applications"][0]["autoscaling_policy"]["policy_kwargs"]["accelerators_each"] = {"Encoder": 2}
    assert problems_of(config, tmp_path) == []


@pytest.mark.parametrize("delay", ["upscale_delay_s", "downscale_delay_s"])
def test_a_delay_of_serve_on_top_of_our_policys_is_refused(delay: str, tmp_path: Path) -> None:
    [written] = problems_of(scaled_by_ours({}, **{delay: 30}), tmp_path)
    config = scaled_by_ours({})
    del config["applications"][0]["deployments"][1]["autoscaling_config"][delay]
    [left_out] = problems_of(config, tmp_path)
    assert written == left_out
    assert f"applications[toy].deployments[Encoder].autoscaling_config.{delay}: must be 0" in written


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"accelerators": 1, "idle_s": 60}, None),
        ({"idle_s": 0}, ": idle_s must be a number above 0"),
        ({"idle_s": {"flux": 60}}, ".idle_s.flux: no deployment of a model 'flux' has min_replicas: 0"),
    ],
)
def test_how_long_a_model_is_idle_before_it_sleeps_is_checked(
    settings: dict[str, Any], meant: str | None, tmp_path: Path
) -> None:
    problems = problems_of(scaled_by_ours(settings, min_replicas=0, downscale_to_zero_delay_s=0), tmp_path)
    assert len(problems) == (meant is not None)
    assert all(f"applications[toy].autoscaling_policy.policy_kwargs{meant}" in each for each in problems)


def test_a_delay_of_serve_before_the_last_replica_goes_is_refused(tmp_path: Path) -> None:
    [problem] = problems_of(scaled_by_ours({}, min_replicas=0, downscale_to_zero_delay_s=60), tmp_path)
    assert "autoscaling_config.downscale_to_zero_delay_s: must be 0" in problem


def test_there_must_be_room_for_each_model_when_it_is_awake() -> None:
    least = {"VAE-wan": 0, "Denoiser-wan": 0, "Pipeline-flux": 1}
    configs = [
        {"name": name, "autoscaling_config": {"min_replicas": count, "max_replicas": 2}}
        for name, count in least.items()
    ]
    assert check_our_policy({"accelerators": 3}, configs, "here") == []
    [problem] = check_our_policy({"accelerators": 2}, configs, "here")
    assert "2 leaves no room for wan, whose deployments need 2 when it is awake, beside the 1" in problem
    assert check_our_policy({"idle_s": {"wan": 5}}, configs, "here") == []


def test_our_policy_is_refused_where_no_deployment_scales(tmp_path: Path) -> None:
    config = changed(f"{ENCODER}.autoscaling_config", None)
    config["applications"][0]["autoscaling_policy"] = OURS
    [problem] = problems_of(config, tmp_path)
    assert "no deployment has an autoscaling_config" in problem


def test_our_policy_is_refused_for_one_deployment_alone(tmp_path: Path) -> None:
    [problem] = problems_of(changed(f"{ENCODER}.autoscaling_config.policy", OURS), tmp_path)
    assert "is for `autoscaling_policy` of the application" in problem
