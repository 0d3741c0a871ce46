"""A routed component looks like the real one, and its calls go to the router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, ModelMixin
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from deployments.stage_pipeline.sessions.component import RoutedComponent, is_computing_method
from deployments.stage_pipeline.sessions.own_modules import OwnModules


class Model(ModelMixin):
    """A class of ours has no computing methods beside the usual ones: only those of the libraries bring their own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.tiles = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Encodes."""
        return x + 2

    def enable_tiles(self) -> None:
        self.tiles = True

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        raise AssertionError("the caches of a shared denoiser were reset")


class Router:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.own = OwnModules()

    def on_component_call(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        self.calls.append((component, method))
        return function(*args, **kwargs)

    def on_denoiser_forward(self, component: str, real: Any, args: Any, kwargs: Any) -> Any:
        self.calls.append((component, "denoiser's forward"))
        return real(*args, **kwargs)

    def on_denoiser_method(self, component: str, method: str, function: Any, args: Any, kwargs: Any) -> Any:
        self.calls.append((component, f"denoiser's {method}"))
        return function(*args, **kwargs)

    @contextmanager
    def cache_context(self, component: str, name: Any = None, **kwargs: Any) -> Iterator[None]:
        self.calls.append((component, f"context {name}"))
        yield

    def own_modules_of(self, component: str) -> OwnModules:
        return self.own


@pytest.fixture
def router() -> Router:
    return Router()


def test_calls_and_computing_methods_of_an_encoder_go_to_the_router(router: Router) -> None:
    routed = RoutedComponent(Model(), "vae", router, is_denoiser=False)
    assert torch.equal(routed(torch.zeros(1)), torch.ones(1))
    assert torch.equal(routed.encode(torch.zeros(1)), torch.full((1,), 2.0))
    assert router.calls == [("vae", "forward"), ("vae", "encode")]


def test_a_denoisers_forward_methods_and_contexts_go_to_the_router_apart(router: Router) -> None:
    routed = RoutedComponent(Model(), "unet", router, is_denoiser=True)
    with routed.cache_context("cond"):
        routed(torch.zeros(1))
    routed.encode(torch.zeros(1))
    assert router.calls == [("unet", "context cond"), ("unet", "denoiser's forward"), ("unet", "denoiser's encode")]


def test_a_request_does_not_reset_the_caches_of_a_shared_denoiser(router: Router) -> None:
    assert RoutedComponent(Model(), "unet", router, is_denoiser=True)._reset_stateful_cache() is None


def test_everything_else_passes_through(router: Router) -> None:
    real = Model()
    routed = RoutedComponent(real, "vae", router, is_denoiser=False)
    assert isinstance(routed, Model)
    assert routed.__class__ is Model
    assert routed.linear is real.linear
    assert routed.encode.__doc__ == "Encodes."
    routed.enable_tiles()
    assert real.tiles
    routed.tiles = False
    assert not real.tiles
    assert router.calls == []
    with pytest.raises(AttributeError, match="cannot be changed by a request"):
        routed.__class__ = torch.nn.Module
    with pytest.raises(AttributeError, match="nowhere"):
        _ = routed.nowhere


def test_what_a_request_rewires_in_a_denoiser_is_its_own(router: Router) -> None:
    real = Model()
    routed = RoutedComponent(real, "unet", router, is_denoiser=True)
    routed.linear.processor = "another"
    dict(routed.named_modules())["linear"].switch = True
    routed.enable_tiles()
    routed.register_forward_hook(lambda *_: None)
    assert routed.tiles
    assert routed.linear.switch
    assert not real.tiles
    assert not real._forward_hooks
    assert not hasattr(real.linear, "processor")
    assert not hasattr(real.linear, "switch")
    assert routed.linear.weight is real.linear.weight
    assert isinstance(routed.linear, torch.nn.Linear)
    assert router.calls == []


@pytest.mark.parametrize(
    ("cls", "name", "computes"),
    [
        (AutoencoderKL, "encode", True),
        (AutoencoderKL, "decode", True),
        (AutoencoderKL, "tiled_decode", True),
        (AutoencoderKL, "enable_tiling", False),
        (AutoencoderKL, "to", False),
        (AutoencoderKL, "save_pretrained", False),
        (FluxTransformer2DModel, "forward", True),
        (FluxTransformer2DModel, "fuse_qkv_projections", False),
        (T5EncoderModel, "generate", True),
        (T5EncoderModel, "get_input_embeddings", False),
        (CLIPTextModelWithProjection, "state_dict", False),
        (Model, "linear", False),
    ],
)
def test_only_methods_that_compute_are_routed(cls: type, name: str, computes: bool) -> None:
    assert is_computing_method(cls, name) == computes
