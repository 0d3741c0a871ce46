"""A routed component looks like the real one, and its calls go to the router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, ModelMixin
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from deployments.stage_pipeline.sessions.component import RoutedComponent, is_computing_method, unrouted
from deployments.stage_pipeline.sessions.own_modules import OwnModules


class Model(ModelMixin):
    """A class of ours has no computing methods beside the usual ones: only those of the libraries bring their own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        self.named = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2)})
        self.tiles = False

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.layers[0]

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
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.own = OwnModules(torch.nn.Identity(), in_parts=True)

    def on_hook(self, component: str, path: str, register: str, hook: Any, options: Any) -> Any:
        self.calls.append((component, f"{register} of {path}"))

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


def test_everything_else_is_read_from_the_real_one_and_what_is_set_is_the_requests_own(router: Router) -> None:
    real = Model()
    routed = RoutedComponent(real, "vae", router, is_denoiser=False)
    assert isinstance(routed, Model)
    assert routed.__class__ is Model
    assert isinstance(routed.linear, torch.nn.Linear)
    assert routed.linear.in_features == 2
    assert routed.encode.__doc__ == "Encodes."
    routed.enable_tiles()
    assert routed.tiles
    routed.tiles = "some"
    assert routed.tiles == "some"
    routed.of_its_own = 1
    assert routed.of_its_own == 1
    routed.linear.scale = 2
    assert routed.linear.scale == 2
    assert not real.tiles
    assert not hasattr(real, "of_its_own")
    assert not hasattr(real.linear, "scale")
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
    assert unrouted(routed.linear).weight is real.linear.weight
    assert isinstance(routed.linear, torch.nn.Linear)
    assert router.calls == []


def test_parts_take_the_way_of_the_component_under_the_path_to_them(router: Router) -> None:
    real = Model()
    routed = RoutedComponent(real, "vae", router, is_denoiser=False)
    x = torch.ones(2)
    parts = [routed.linear, routed.layers[-1], *routed.layers, routed.layers[:1][0], routed.named["one"]]
    parts.append(routed.get_input_embeddings())
    reals = [real.linear, real.layers[1], *real.layers, real.layers[0], real.named["one"], real.layers[0]]
    assert all(torch.equal(part(x), true(x)) for part, true in zip(parts, reals, strict=True))
    names = ["linear", "layers.1", "layers.0", "layers.1", "layers.0", "named.one", "layers.0"]
    assert router.calls == [("vae", f"{name}.forward") for name in names]
    assert (len(routed.layers), list(routed.named)) == (2, ["one"])
    assert not hasattr(type(routed.linear), "__len__")


def test_a_part_of_a_denoiser_is_no_forward_of_it(router: Router) -> None:
    RoutedComponent(Model(), "unet", router, is_denoiser=True).linear(torch.ones(2))
    assert router.calls == [("unet", "denoiser's linear.forward")]


def test_a_parameter_is_read_only_where_its_numbers_are_used_and_read_once(router: Router) -> None:
    real = Model()
    routed = RoutedComponent(real, "vae", router, is_denoiser=False)
    weight = routed.linear.weight
    assert isinstance(weight, torch.nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device, weight.ndim) == ((2, 2), torch.float32, router.device, 2)
    assert not weight.is_meta
    assert not weight.requires_grad
    assert router.calls == []
    assert torch.equal(torch.cat([weight, weight + 1]), torch.cat([real.linear.weight, real.linear.weight + 1]))
    assert router.calls == [("vae", "parameter:linear.weight")]


def test_no_request_changes_a_shared_parameter_through_what_it_reads(router: Router) -> None:
    real = Model()
    before = real.linear.bias.detach().clone()
    RoutedComponent(real, "vae", router, is_denoiser=False).linear.bias.add_(1)
    assert torch.equal(real.linear.bias, before)


def test_all_parameters_say_where_the_stage_is_also_those_that_are_elsewhere(router: Router) -> None:
    real = Model()
    real.linear.to("meta")
    routed = RoutedComponent(real, "vae", router, is_denoiser=False)
    named = dict(routed.named_parameters(prefix="model"))
    assert named.keys() == {f"model.{name}" for name, _ in real.named_parameters()}
    for tensors in (named.values(), routed.parameters(), routed.parameters(recurse=True), routed.linear.parameters()):
        assert {tensor.device for tensor in tensors} == {router.device}
    assert (list(routed.parameters(False)), list(routed.buffers())) == ([], [])
    assert router.calls == []


def test_a_hook_goes_to_the_router_and_not_to_the_module(router: Router) -> None:
    real = Model()
    RoutedComponent(real, "vae", router, is_denoiser=False).layers[0].register_forward_hook(print)
    assert router.calls == [("vae", "register_forward_hook of layers.0")]
    assert not real.layers[0]._forward_hooks


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
