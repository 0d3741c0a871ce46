import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.devices import (
    DEVICES,
    DeviceError,
    available_devices,
    memory_allocated,
    select_device,
    synchronize,
)
from env_config.variables import BY_VARIABLE, EnvConfig
from tests.support.forking.command import python_with_libraries

ROOT = Path(__file__).parents[2]


def test_the_devices_are_those_that_the_variable_accepts() -> None:
    for name in DEVICES:
        assert EnvConfig.from_environ({"SGLANG_DIFFUSION_TARGET_DEVICE": name}).runtime.target_device == name
    assert all(name in BY_VARIABLE["SGLANG_DIFFUSION_TARGET_DEVICE"].description for name in DEVICES)


def test_the_cpu_is_always_there() -> None:
    device = select_device("cpu")
    assert (device.name, device.torch_device) == ("cpu", torch.device("cpu"))
    assert "cpu" in available_devices()
    synchronize(device)
    assert memory_allocated(device) is None


@pytest.mark.parametrize("name", ["cuda", "rocm", "xpu", "npu", "musa", "mps"])
def test_an_absent_device_is_refused_with_the_variable_the_value_and_what_was_found(name: str) -> None:
    if name in available_devices():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(DeviceError) as refusal:
        select_device(name)
    sentence = str(refusal.value)
    assert f"SGLANG_DIFFUSION_TARGET_DEVICE={name}" in sentence
    assert f"This machine has: {', '.join(available_devices())}" in sentence
    assert DEVICES[name].hint in sentence


def test_an_unknown_name_is_refused_with_the_seven_names() -> None:
    with pytest.raises(DeviceError, match=r"one of cuda, rocm, xpu, npu, musa, mps, cpu, got 'tpu'"):
        select_device("tpu")


def test_rocm_is_cuda_to_torch_and_cuda_refuses_on_a_rocm_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("rocm").torch_device == torch.device("cuda")
    with pytest.raises(DeviceError, match="built for ROCm, whose name here is rocm"):
        select_device("cuda")


def test_cuda_is_found_and_rocm_refuses_on_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("cuda").torch_device == torch.device("cuda")
    with pytest.raises(DeviceError, match="built without ROCm"):
        select_device("rocm")


@pytest.mark.parametrize("error", [OSError("libhccl.so: cannot open shared object file"), RuntimeError("no CANN")])
def test_a_plugin_that_fails_to_load_its_own_libraries_is_an_absent_device(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> Any:
        raise error

    monkeypatch.setattr("deployments.devices.importlib.import_module", import_module)
    with pytest.raises(DeviceError) as refusal:
        select_device("npu")
    assert str(error) in str(refusal.value)


@pytest.mark.rest
@pytest.mark.parametrize("name", ["npu"])
def test_a_pipeline_runs_wholly_on_the_selected_device(name: str) -> None:
    """A simulated device: tensors of two devices cannot mix there, so one left on the CPU would raise."""
    command = [*python_with_libraries(), "-m", "tests.support.place_on_simulated_device", name]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["device"] == name
    assert report["torch_device"] == name
    assert report["available"] == [name, "cpu"]
    assert report["parameters"] == [name]
    assert report["operations"] > 100
    assert report["spread"] > 0.01
    assert report["largest_difference"] < 1e-4
    assert "same device" in report["mixing"]
    assert report["memory"] >= report["weight_bytes"] > 0
    assert report["synchronized"] == 1
