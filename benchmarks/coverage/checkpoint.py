"""The tiny pipeline of a test class as a folder that anybody could have downloaded, and the test's call."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from benchmarks.coverage.exported import exported_class
from benchmarks.coverage.surroundings.allowances import MORE_ARGUMENTS, leave_guardrails_out

# Triptych sets these itself in every call.
NOT_ARGUMENTS = frozenset(
    {
        "callback",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "callback_steps",
        "generator",
        "output_type",
        "return_dict",
    }
)
ZERO_SCALE = 0.05  # of the numbers in place of zeros


@dataclass(frozen=True)
class TestCall:
    """The arguments of the pipeline's call, and the output_type that the test asks for."""

    __test__ = False

    arguments: dict[str, Any]
    output_type: str | None


def save_checkpoint(test_class: Any, folder: Path) -> TestCall:
    """Writes the folder; raises whatever the test's own code raises."""
    leave_guardrails_out()
    test = _instance_of(test_class)
    torch.manual_seed(0)
    components = test.get_dummy_components()
    inputs = _dummy_inputs(test)
    pipeline = test_class.pipeline_class(**components)
    models = [each for each in pipeline.components.values() if isinstance(each, torch.nn.Module)]
    for model in models:
        fill_zeros(model)
        model.eval()
    _fit_embeddings(pipeline.components)
    pipeline.save_pretrained(folder)
    pipeline_class = exported_class(test_class.pipeline_class)
    _repair_index(folder, pipeline_class, pipeline)
    arguments = {name: value for name, value in inputs.items() if name not in NOT_ARGUMENTS}
    return TestCall(arguments | MORE_ARGUMENTS.get(pipeline_class.__name__, {}), inputs.get("output_type"))


def fill_zeros(model: torch.nn.Module) -> None:
    """Layers that begin as zeros would make the time step and the text irrelevant to the picture."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and (not parameter.isfinite().all() or not parameter.any()):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * ZERO_SCALE)


def _instance_of(test_class: Any) -> Any:
    try:
        return test_class()
    except (TypeError, ValueError):  # unittest asks for the name of a test method
        return test_class.__new__(test_class)


def _dummy_inputs(test: Any) -> dict[str, Any]:
    takes_device = "device" in inspect.signature(test.get_dummy_inputs).parameters
    inputs: dict[str, Any] = test.get_dummy_inputs("cpu") if takes_device else test.get_dummy_inputs()
    return inputs


def _fit_embeddings(components: dict[str, Any]) -> None:
    """Our tokenizers may know more pieces than the tests' text encoders have rows for."""
    sizes = [len(each) for each in components.values() if isinstance(each, PreTrainedTokenizerBase)]
    sizes += [len(each.tokenizer) for each in components.values() if isinstance(each, ProcessorMixin)]
    for model in [each for each in components.values() if sizes and isinstance(each, PreTrainedModel)]:
        try:
            embeddings = model.get_input_embeddings()
        except NotImplementedError:
            continue
        if isinstance(embeddings, torch.nn.Embedding) and embeddings.num_embeddings < max(sizes):
            model.resize_token_embeddings(max(sizes), mean_resizing=False)


def _repair_index(folder: Path, pipeline_class: Any, pipeline: Any) -> None:
    """A test's wrapper becomes the class that it wraps; doubles of safety checkers are left out."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    index["_class_name"] = pipeline_class.__name__
    for name, value in list(index.items()):
        if not (isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)):
            continue
        library, class_name = value
        if "test" in library or "mock" in str(value).lower() or (class_name or "").startswith("Dummy"):
            index.pop(name)
        elif library == "diffusers" and (module := _pipeline_module(getattr(pipeline, name, None))):
            index[name] = [module, class_name]
    file.write_text(json.dumps(index, indent=2))


def _pipeline_module(component: Any) -> str | None:
    """Where a component that lives in the folder of a pipeline is found by its loader."""
    module = type(component).__module__
    parts = module.split(".")
    if parts[:2] != ["diffusers", "pipelines"]:
        return None
    library = parts[3] if parts[2] == "deprecated" else parts[2]
    return library if hasattr(diffusers.pipelines, library) else module
