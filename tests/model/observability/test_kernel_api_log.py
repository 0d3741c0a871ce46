"""The kernel API log: what each level writes, where it goes, what a crash leaves behind."""

import inspect
import json
import os
import re
import signal
import subprocess
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from deployments.observability.kernel_api_log import KernelApiLog, make_kernel_api_log
from deployments.observability.observer import Observers
from deployments.observability.table import OBSERVERS
from env_config.variables import EnvConfig
from tests.support.forking.command import python_with_libraries
from tests.support.observing import replica_with
from tests.support.tiny_models.autoencoders import kl_autoencoder
from tests.support.tiny_models.text_encoders import clip_text_encoder

ROOT = Path(__file__).parents[3]
HEAD = re.compile(
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\] Kernel API (\w+): (\S+) call=(\d+) pid=(\d+) thread=(\d+)"
)


def kernel_log(tmp_path: Path, level: int, **settings: str) -> KernelApiLog:
    environ = {
        "SGLANG_KERNEL_API_LOGLEVEL": str(level),
        "SGLANG_KERNEL_API_LOGDEST": str(tmp_path / "log"),
        "SGLANG_KERNEL_API_DUMP_DIR": str(tmp_path / "dumps"),
    }
    environ |= {f"SGLANG_KERNEL_API_{name.upper()}": value for name, value in settings.items()}
    return KernelApiLog(EnvConfig.from_environ(environ).kernel_api)


def dumps(tmp_path: Path) -> list[dict[str, Any]]:
    folders = sorted((tmp_path / "dumps").glob("*")) if (tmp_path / "dumps").exists() else []
    return [json.loads((folder / "metadata.json").read_text()) | {"folder": folder} for folder in folders]


def add(left: torch.Tensor, *, right: torch.Tensor) -> torch.Tensor:
    return left + right


def test_at_level_0_there_is_no_log_and_nothing_is_wrapped(tmp_path):
    variables = {"SGLANG_KERNEL_API_LOGLEVEL": "0", "SGLANG_KERNEL_API_LOGDEST": str(tmp_path / "log")}
    assert make_kernel_api_log(replica_with(variables)) is None
    observers = Observers(replica_with(variables), OBSERVERS)
    module = torch.nn.Linear(2, 2)
    observers.install({"transformer": module})
    assert "forward" not in vars(module)
    assert observers.wrap_kernel("add", add) is add
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("level", "has_metadata", "has_statistics", "has_dump"),
    [
        (1, False, False, False),
        (2, False, False, False),
        (3, True, False, False),
        (4, True, False, False),
        (5, True, True, False),
        (9, True, True, False),
        (10, True, True, True),
        (11, True, True, True),
    ],
)
def test_each_level_adds_what_the_document_says(tmp_path, level, has_metadata, has_statistics, has_dump):
    logged = kernel_log(tmp_path, level).wrap_kernel("test.add", add)
    assert torch.equal(logged(torch.ones(2, 3), right=torch.ones(3)), torch.full((2, 3), 2.0))
    text = (tmp_path / "log").read_text()
    assert [found[:3] for found in HEAD.findall(text)] == [
        ("Call", "test.add", "1"),
        ("Return", "test.add", "1"),
    ]
    metadata = "Tensor(shape=(2, 3), dtype=torch.float32, device=cpu, requires_grad=False, is_contiguous=True"
    for name in ("arg_0", "result"):
        assert (f"  {name}: {metadata}" in text) == has_metadata
    assert ("  kwarg_right: Tensor(shape=(3,)" in text) == has_metadata
    assert ("min=2, max=2, mean=2, nan_count=0, inf_count=0" in text) == has_statistics
    assert bool(dumps(tmp_path)) == has_dump


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_the_statistics_are_those_of_the_numbers(tmp_path, dtype):
    numbers = torch.tensor([[0.0, 1.0], [3.0, 4.0]]).to(dtype)
    kernel_log(tmp_path, 5).wrap_kernel("identity", lambda x: x)(numbers)
    plain = torch.view_as_real(numbers) if dtype.is_complex else numbers
    values = plain.double().numpy()
    expected = f"min={values.min():.6g}, max={values.max():.6g}, mean={values.mean():.6g}"
    assert expected in (tmp_path / "log").read_text()


def test_the_statistics_count_what_is_not_a_number(tmp_path):
    numbers = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    kernel_log(tmp_path, 5).wrap_kernel("identity", lambda x: x)(numbers)
    assert "nan_count=1, inf_count=2" in (tmp_path / "log").read_text()


def test_an_empty_tensor_and_one_without_numbers_are_logged_without_statistics(tmp_path):
    kernel_log(tmp_path, 10).wrap_kernel("identity", lambda *x: x)(torch.empty(0, 2), torch.empty(2, device="meta"))
    text = (tmp_path / "log").read_text()
    assert "shape=(0, 2)" in text
    assert "device=meta" in text
    assert "min=" not in text


def test_a_line_describes_four_items_of_a_list_and_eight_of_a_mapping(tmp_path):
    sizes = [torch.zeros(size) for size in range(1, 7)]
    kernel_log(tmp_path, 3).wrap_kernel("f", lambda a, b: None)(sizes, {f"k{i}": i for i in range(10)})
    text = (tmp_path / "log").read_text()
    assert "shape=(4,)" in text
    assert "shape=(5,)" not in text
    assert "... 2 more" in text
    assert "k7: 7" in text
    assert "k8" not in text


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_the_log_can_go_to_a_stream_of_the_process(tmp_path, stream, capfd):
    kernel_log(tmp_path, 1, logdest=stream).wrap_kernel("test.add", add)(torch.ones(1), right=torch.ones(1))
    out, err = capfd.readouterr()
    written, other = (out, err) if stream == "stdout" else (err, out)
    assert written.count("test.add") == 2
    assert "test.add" not in other


def test_percent_i_is_the_process_in_the_names_of_log_and_dumps(tmp_path):
    log = kernel_log(tmp_path, 10, logdest=f"{tmp_path}/logs/%i.log", dump_dir=f"{tmp_path}/dumps-%i")
    log.wrap_kernel("test.add", add)(torch.ones(1), right=torch.ones(1))
    assert "test.add" in (tmp_path / "logs" / f"{os.getpid()}.log").read_text()
    assert len(list((tmp_path / f"dumps-{os.getpid()}").iterdir())) == 1


def test_an_existing_log_is_appended_to(tmp_path):
    (tmp_path / "log").write_text("before\n")
    kernel_log(tmp_path, 1).wrap_kernel("test.add", add)(torch.ones(1), right=torch.ones(1))
    assert (tmp_path / "log").read_text().startswith("before\n[")


def test_a_log_file_that_cannot_be_opened_is_refused_with_the_variable(tmp_path):
    with pytest.raises(ValueError, match=r"SGLANG_KERNEL_API_LOGDEST=.*Is a directory"):
        kernel_log(tmp_path, 1, logdest=str(tmp_path))


def test_a_dump_holds_inputs_outputs_and_how_the_call_ended(tmp_path):
    def both(pair: tuple[torch.Tensor, torch.Tensor], *, by: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"sum": pair[0] + pair[1], "scaled": pair[0] * by["factor"]}

    logged = kernel_log(tmp_path, 10).wrap_kernel("test.both", both)
    base = torch.arange(100.0)
    for _ in range(2):
        logged((base[:3], base[10:13]), by={"factor": torch.tensor(2.0)})
    first, second = dumps(tmp_path)
    name = rf"\d{{8}}_\d{{6}}_\d{{3}}_pid{os.getpid()}_test\.both_call0001"
    assert re.fullmatch(name, first["folder"].name)
    assert second["folder"].name.endswith("_call0002")
    inputs = torch.load(first["folder"] / "inputs.pt", weights_only=True)
    assert inputs.keys() == {"arg_0_0", "arg_0_1", "kwarg_by_factor"}
    assert torch.equal(inputs["arg_0_1"], base[10:13])
    assert inputs["arg_0_1"].untyped_storage().nbytes() == 12  # the part that was passed, not all of `base`
    outputs = torch.load(first["folder"] / "outputs.pt", weights_only=True)
    assert torch.equal(outputs["result_sum"], base[:3] + base[10:13])
    assert first["function_name"] == "test.both"
    assert first["process_id"] == os.getpid()
    assert first["execution_status"] == "completed"
    assert first["input_tensor_keys"] == ["arg_0_0", "arg_0_1", "kwarg_by_factor"]
    assert first["output_tensor_keys"] == ["result_sum", "result_scaled"]


def test_the_dumped_inputs_are_those_before_a_call_that_changes_them(tmp_path):
    tensor = torch.zeros(2)
    kernel_log(tmp_path, 10).wrap_kernel("add_", lambda x: x.add_(1))(tensor)
    (dump,) = dumps(tmp_path)
    assert torch.equal(torch.load(dump["folder"] / "inputs.pt", weights_only=True)["arg_0"], torch.zeros(2))
    assert torch.equal(torch.load(dump["folder"] / "outputs.pt", weights_only=True)["result"], torch.ones(2))


def test_an_exception_is_logged_dumped_and_raised(tmp_path):
    logged = kernel_log(tmp_path, 10).wrap_kernel("test.matmul", torch.matmul)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        logged(torch.ones(2, 3), torch.ones(2, 3))
    assert "Kernel API Exception: test.matmul" in (tmp_path / "log").read_text()
    (dump,) = dumps(tmp_path)
    assert dump["execution_status"] == "exception"
    assert dump["exception"]["type"] == "RuntimeError"
    assert "cannot be multiplied" in dump["exception"]["message"]


@pytest.mark.parametrize(
    ("settings", "dumped"),
    [
        ({}, {"attention.fa", "attention.sdpa", "vae.decode"}),
        ({"dump_include": "attention.*"}, {"attention.fa", "attention.sdpa"}),
        ({"dump_include": "*.fa, vae.*"}, {"attention.fa", "vae.decode"}),
        ({"dump_exclude": "vae.*"}, {"attention.fa", "attention.sdpa"}),
        ({"dump_include": "attention.*", "dump_exclude": "*sdpa"}, {"attention.fa"}),
    ],
)
def test_include_and_exclude_choose_dumps_and_leave_the_lines(tmp_path, settings, dumped):
    log = kernel_log(tmp_path, 10, **settings)
    for name in ("attention.fa", "attention.sdpa", "vae.decode"):
        log.wrap_kernel(name, torch.neg)(torch.ones(1))
    assert {dump["function_name"] for dump in dumps(tmp_path)} == dumped
    assert len(HEAD.findall((tmp_path / "log").read_text())) == 6


def test_after_a_segmentation_fault_the_last_line_names_the_kernel_and_its_inputs_are_saved(tmp_path):
    program = """
        import ctypes, sys, torch
        from deployments.observability.kernel_api_log import KernelApiLog
        from env_config.variables import EnvConfig

        log = KernelApiLog(EnvConfig.from_environ().kernel_api)
        log.wrap_kernel("kernels.good", torch.neg)(torch.ones(2))
        log.wrap_kernel("kernels.bad", lambda x: ctypes.string_at(0))(torch.arange(3))
    """
    environ = os.environ | {
        "SGLANG_KERNEL_API_LOGLEVEL": "10",
        "SGLANG_KERNEL_API_LOGDEST": str(tmp_path / "log-%i"),
        "SGLANG_KERNEL_API_DUMP_DIR": str(tmp_path / "dumps"),
    }
    done = subprocess.run(
        [*python_with_libraries(), "-c", textwrap.dedent(program)], env=environ, cwd=ROOT, capture_output=True
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr
    (log,) = tmp_path.glob("log-*")
    events = [(event, name) for event, name, *_ in HEAD.findall(log.read_text())]
    assert events == [("Call", "kernels.good"), ("Return", "kernels.good"), ("Call", "kernels.bad")]
    good, bad = dumps(tmp_path)
    assert (good["execution_status"], bad["execution_status"]) == ("completed", "inputs_saved")
    saved = torch.load(bad["folder"] / "inputs.pt", weights_only=True)
    assert torch.equal(saved["arg_0"], torch.arange(3))


@pytest.mark.rest
def test_a_compiled_graph_runs_without_the_log(tmp_path):
    logged = kernel_log(tmp_path, 10).wrap_kernel("test.neg", torch.neg)
    compiled = torch.compile(lambda x: logged(x) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.zeros(2))
    assert (tmp_path / "log").read_text() == ""
    assert not dumps(tmp_path)


def test_records_of_many_threads_stay_whole(tmp_path):
    logged = kernel_log(tmp_path, 3).wrap_kernel("test.neg", torch.neg)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: logged(torch.ones(2)), range(400)))
    lines = (tmp_path / "log").read_text().splitlines()
    heads, details = lines[::2], lines[1::2]
    assert all(HEAD.fullmatch(line) for line in heads)
    assert all(line.startswith(("  arg_0: Tensor(", "  result: Tensor(")) for line in details)
    numbers = [int(HEAD.fullmatch(line)[3]) for line in heads if "Return" in line]
    assert sorted(numbers) == list(range(1, 401))


def test_the_components_of_a_pipeline_are_logged_and_keep_results_and_signatures(tmp_path):
    modules = {"vae": kl_autoencoder(), "text_encoder": clip_text_encoder()}
    latents, ids = torch.randn(1, 4, 4, 4), torch.arange(5, 15)[None]
    signatures = [
        inspect.signature(modules["vae"].decode),
        inspect.signature(modules["text_encoder"].forward),
    ]
    with torch.no_grad():
        before = modules["vae"].decode(latents).sample, modules["text_encoder"](ids).last_hidden_state
        kernel_log(tmp_path, 3).install(modules)
        after = modules["vae"].decode(latents).sample, modules["text_encoder"](ids).last_hidden_state
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert signatures == [
        inspect.signature(modules["vae"].decode),
        inspect.signature(modules["text_encoder"].forward),
    ]
    names = [name for event, name, *_ in HEAD.findall((tmp_path / "log").read_text()) if event == "Call"]
    assert names == ["diffusion.vae.decode", "diffusion.text_encoder.forward"]
