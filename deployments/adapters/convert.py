"""What the pipeline's own LoRA loader would put into which component, without a component at hand.

`load_lora_weights` of the pipeline's class runs on a copy of the pipeline whose components have their shapes but no
weights, and note what they are given. So each of diffusers' loaders converts its formats, and a process knows also
what other processes put into theirs.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import convert_unet_state_dict_to_peft

from deployments.adapters.fetch import refusal
from deployments.adapters.formats import refuse_settings
from deployments.adapters.use import AdapterUse
from deployments.errors import InvalidRequestError
from deployments.stage_pipeline.roles import PipelineLayout
from deployments.stage_pipeline.skeleton import build_from_config

DIFFUSERS, TRANSFORMERS = "load_lora_adapter", "load_adapter"  # the methods of their models
STANDING_IN = (DIFFUSERS, TRANSFORMERS, "to")
MOST_NAMED = 3
MOST_TOLD = 300  # characters of what a loader says

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Part:
    """What goes into one component: a call of its own loader."""

    method: str  # DIFFUSERS or TRANSFORMERS
    tensors: Tensors  # on the host
    options: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()  # that its layers have
    num_layers: int = 0
    has_alphas: bool = False  # network alphas, or settings of the file's own, beside the factors

    def without_tensors(self) -> Part:
        return replace(self, tensors={}, options={})

    @property
    def num_elements(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Converter:
    """Of one pipeline: what its loader makes of a file. Any thread may ask; one at a time is answered."""

    def __init__(self, pipeline: Any, layout: PipelineLayout) -> None:
        self.pipeline, self.layout = pipeline, layout
        self._stand_ins: dict[str, torch.nn.Module] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # of their parameters
        self._lock = threading.Lock()

    @property
    def loadable(self) -> tuple[str, ...]:
        """Components that the loader of the pipeline's class knows, and that this pipeline has."""
        return loadable_components(type(self.pipeline), self.layout.models)

    def parts(self, use: AdapterUse, file: Path) -> dict[str, Part]:
        """By component, of a file of LoRA layers. Raises InvalidRequestError for one that does not fit as a whole."""
        if not self.loadable:
            raise refusal(use, f"{type(self.pipeline).__name__} takes no LoRA")
        with self._lock, ExitStack() as stack:
            stack.callback(self._let_go)
            noted = self._loaded(use, Noted(use), file, use.component)
            left = noted.unplaced()
            for name in self.loadable:
                # One file for several experts: diffusers takes the layers of one after the other.
                if own := without_prefix(left, name):
                    first = getattr(type(self.pipeline), "transformer_name", "transformer")
                    renamed = {f"{first}.{key}": tensor for key, tensor in own.items()}
                    settings = without_prefix(noted.metadata or {}, name)
                    second = Noted(use, {f"{first}.{key}": each for key, each in settings.items()} or None)
                    noted.parts |= self._loaded(use, second, renamed, name).parts
                    left = {key: tensor for key, tensor in left.items() if not key.startswith(f"{name}.")}
            if left or not noted.parts:
                raise refusal(use, self._unplaced_words(left or noted.converted))
            return {name: self._checked(use, name, part) for name, part in noted.parts.items()}

    def _let_go(self) -> None:
        """Of the file that was noted last: the stand-ins stay."""
        for stand_in in self._stand_ins.values():
            for name in STANDING_IN:
                stand_in.__dict__.pop(name, None)

    def _loaded(self, use: AdapterUse, noted: Noted, source: Path | Tensors, component: str | None) -> Noted:
        """What `load_lora_weights` puts where; `component`: the one that it is told to load into."""
        told = {} if component is None else {f"load_into_{component}": True}
        try:
            given = str(source) if isinstance(source, Path) else source
            self._recording(noted).load_lora_weights(given, adapter_name="noted", use_safetensors=True, **told)
        except InvalidRequestError:
            raise
        except Exception as error:  # whatever a loader raises for a file that it does not know
            absent = set(type(self.pipeline)._lora_loadable_modules) - set(self.loadable)
            left = {key: each for key, each in noted.unplaced().items() if key.partition(".")[0] in absent}
            said = str(error).replace(str(source), "its file") if isinstance(source, Path) else str(error)
            cause = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(said.split())[:MOST_TOLD]
            why = self._unplaced_words(left) if left else f"{type(self.pipeline).__name__} does not load it: {cause}"
            raise refusal(use, why) from error
        if component is not None and set(noted.parts) != {component}:
            able = " and ".join(noted.parts) or "nothing"
            raise refusal(use, f"it cannot be put into {component}: its loader puts it into {able}")
        self._refuse_changed_shapes(use)
        return noted

    def _refuse_changed_shapes(self, use: AdapterUse) -> None:
        for name, stand_in in list(self._stand_ins.items()):
            if shapes_of(stand_in) != self._shapes[name]:
                del self._stand_ins[name]
                raise refusal(
                    use, f"it changes the shapes of layers of {name}, as a Control LoRA does, and requests share them"
                )

    def _unplaced_words(self, left: Collection[str]) -> str:
        some = ", ".join(sorted(left)[:MOST_NAMED])
        return (
            f"{len(left)} of its tensors have no place in {type(self.pipeline).__name__}, such as {some}: its loader "
            f"knows {' and '.join(self.loadable)}"
        )

    def _recording(self, noted: Noted) -> Any:
        cls: Any = type(self.pipeline)

        def lora_state_dict(owner: Any, *args: Any, **kwargs: Any) -> Any:
            found = cls.lora_state_dict.__func__(owner, *args, **kwargs)
            if not isinstance(found, tuple):  # a caller that asks for no more
                noted.note_converted(found, cls)
                return found
            *others, metadata = found
            noted.note_converted(others[0], cls)
            noted.metadata = metadata if noted.metadata is None else noted.metadata
            return (*others, noted.metadata)

        members = {
            "components": property(lambda _: {}),
            "lora_state_dict": classmethod(lora_state_dict),
            "__module__": cls.__module__,
        }
        recording = type(cls.__name__, (cls,), members)
        pipeline: Any = object.__new__(recording)
        vars(pipeline).update(vars(self.pipeline))
        for name in self.loadable:
            vars(pipeline)[name] = self._stand_in(name, noted)
        return pipeline

    def _stand_in(self, name: str, noted: Noted) -> torch.nn.Module:
        """The component's modules and shapes; what it is given to load is noted."""
        if name not in self._stand_ins:
            made = build_from_config(self.layout.models[name], self.layout.folder / name, meta_buffers=True)
            self._stand_ins[name] = without_memory(made.eval())
            self._shapes[name] = shapes_of(made)
        stand_in = self._stand_ins[name]

        def load_lora_adapter(tensors: Tensors, **options: Any) -> None:
            noted.note_diffusers(name, tensors, options)

        def load_adapter(adapter_name: str, adapter_state_dict: Tensors, peft_config: Any, **_: Any) -> None:
            noted.note_transformers(name, adapter_state_dict, peft_config)

        own: tuple[Callable[..., Any], ...] = (load_lora_adapter, load_adapter, lambda *_, **__: stand_in)
        stand_in.__dict__.update(zip(STANDING_IN, own, strict=True))
        return stand_in

    def _checked(self, use: AdapterUse, name: str, part: Part) -> Part:
        """The part with its ranks. Raises InvalidRequestError for tensors without a layer, or of another shape."""
        layers = dict(self._stand_ins[name].named_modules())
        factors: dict[str, dict[str, torch.Tensor]] = {}
        model = f"{name} ({type(self._stand_ins[name]).__name__})"
        lost = []
        for key, tensor in layer_tensors(part).items():
            path, _, factor = key.rpartition(".lora_")
            if not path or getattr(layers.get(path), "weight", None) is None:
                lost.append(key)
            else:
                factors.setdefault(path, {})[factor] = tensor
        if lost:
            raise refusal(
                use,
                f"{len(lost)} of its {len(part.tensors)} tensors for {model} fit no layer of it, such as "
                f"{', '.join(sorted(lost)[:MOST_NAMED])}: it was made for another model",
            )
        ranks = {rank_of(use, f"{name}.{path}", layers[path], of) for path, of in factors.items()}
        settings = part.options.get("metadata") or {}
        config = part.options.get("peft_config")
        refuse_settings(use, vars(config) if config is not None else without_prefix(settings, part.options["prefix"]))
        has_alphas = bool(config is None and (settings or part.options["network_alphas"]))
        return replace(part, has_alphas=has_alphas, ranks=tuple(sorted(ranks)), num_layers=len(factors))


class Noted:
    """What one run of a loader has converted, and put where."""

    def __init__(self, use: AdapterUse, metadata: Mapping[str, Any] | None = None) -> None:
        """`metadata`: of the layers, where they come from no file whose header says it."""
        self.use = use
        self.metadata = metadata
        self.converted: Tensors = {}
        self.parts: dict[str, Part] = {}

    def note_converted(self, tensors: Tensors, pipeline_class: Any) -> None:
        norms = getattr(pipeline_class, "_control_lora_supported_norm_keys", ())
        for key in tensors:
            if any(norm in key for norm in norms):
                raise refusal(
                    self.use,
                    f"it replaces norm layers of the model ({key}), as a Control LoRA does, and requests share them",
                )
        self.converted = dict(tensors)

    def note_diffusers(self, name: str, tensors: Tensors, options: Mapping[str, Any]) -> None:
        prefix = options.get("prefix", "transformer")
        # Copies: who replaces the file in place must not change what is in use.
        own = {key: tensor.detach().clone() for key, tensor in tensors.items() if key.startswith(f"{prefix}.")}
        alphas = {
            key: alpha for key, alpha in (options.get("network_alphas") or {}).items() if key.startswith(f"{prefix}.")
        }
        if own:
            kept = {"prefix": prefix, "network_alphas": alphas or None, "metadata": options.get("metadata")}
            self.parts[name] = Part(DIFFUSERS, own, kept)

    def note_transformers(self, name: str, tensors: Tensors, peft_config: Any) -> None:
        self.parts[name] = Part(
            TRANSFORMERS,
            {key: tensor.detach().clone() for key, tensor in tensors.items()},
            {"peft_config": copy.deepcopy(peft_config), "prefix": name},
        )

    def unplaced(self) -> Tensors:
        """Of what was converted that which no component took."""
        taken = tuple(f"{part.options['prefix']}." for part in self.parts.values())
        return {key: tensor for key, tensor in self.converted.items() if not key.startswith(taken)}


def loadable_components(pipeline_class: Any, there: Collection[str]) -> tuple[str, ...]:
    """Of the components that are `there` those into which the class's own loader can put LoRA layers."""
    is_able = isinstance(pipeline_class, type) and issubclass(pipeline_class, LoraBaseMixin)
    loadable: list[str] = pipeline_class._lora_loadable_modules if is_able else []
    return tuple(name for name in loadable if name in there)


def layer_tensors(part: Part) -> Tensors:
    """By the names of PEFT within the component, as its loader makes them."""
    if part.method == TRANSFORMERS:
        return part.tensors
    own = without_prefix(part.tensors, part.options["prefix"])
    return own if "lora_A" in next(iter(own)) else convert_unet_state_dict_to_peft(own)


def without_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(f"{prefix}."): each for key, each in values.items() if key.startswith(f"{prefix}.")}


def rank_of(use: AdapterUse, path: str, layer: Any, factors: Mapping[str, torch.Tensor]) -> int:
    """Raises InvalidRequestError for factors that are not two, or not of the layer's shape."""
    down, up = factors.get("A.weight"), factors.get("B.weight")
    if down is None or up is None:
        raise refusal(use, f"{path} has no {'lora_A' if down is None else 'lora_B'}")
    shape, made = tuple(layer.weight.shape), (up.shape[0], *down.shape[1:])
    if down.shape[0] != up.shape[1] or made != shape:
        raise refusal(
            use,
            f"{path} has factors of {tuple(down.shape)} and {tuple(up.shape)}, and the layer is of {shape}: it was "
            "made for another model",
        )
    return int(down.shape[0])


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def without_memory(module: torch.nn.Module) -> torch.nn.Module:
    """With parameters of the host, each one number seen as many: loaders make tensors where a component's are."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                seen = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                owner._parameters[name] = torch.nn.Parameter(seen, requires_grad=False)
    return module
