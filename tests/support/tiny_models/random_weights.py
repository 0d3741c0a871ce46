"""Models with reproducible random weights in which every input matters."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from transformers import PreTrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound=torch.nn.Module)

NOISE_SCALE = 0.05


def diffusers_model(model_class: type[Model], *, seed: int = 0, **config: Any) -> Model:
    """A diffusers model made from its constructor's arguments."""
    return _randomized(lambda: model_class(**config), seed)


def diffusers_model_like(model: ModelMixin, *, seed: int = 0, **changes: Any) -> ModelMixin:
    """A new model of the same class whose config differs from `model`'s only by `changes`."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return diffusers_model(type(model), seed=seed, **{**config, **changes})


def transformers_model(model_class: type[Model], config: PreTrainedConfig, *, seed: int = 0) -> Model:
    """A transformers model made from its config object."""
    assert issubclass(model_class, PreTrainedModel)
    return _randomized(lambda: model_class(config), seed)


def random_like(tensor: torch.Tensor, low: float, high: float, *, seed: int = 0) -> torch.Tensor:
    """Uniform numbers in [low, high) with the shape of `tensor`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tensor.shape, generator=generator) * (high - low) + low


def _randomized(build: Callable[[], Model], seed: int) -> Model:
    with torch.random.fork_rng(devices=[]), _nan_in_uninitialized_memory():
        torch.manual_seed(seed)
        model = build()
        _fill_silent_parameters(model, seed)
    return model.eval()


@contextmanager
def _nan_in_uninitialized_memory() -> Iterator[None]:
    # PyTorch fills torch.empty() with NaN in this mode, so parameters that nobody initialises can be found.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _fill_silent_parameters(model: torch.nn.Module, seed: int) -> None:
    # Zero-initialised output layers would make the time step and the text irrelevant to the picture.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all() or (parameter == 0).all():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * NOISE_SCALE)
