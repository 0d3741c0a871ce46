"""What `precision` means for each component of a pipeline, and how it goes together with the dtypes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from deployments.errors import CheckpointError
from deployments.weights.precision.gguf_files import SUFFIX, find_gguf
from deployments.weights.precision.scheme import Scheme
from deployments.weights.precision.table import GGUF, PLAIN, missing_packages, scheme_named

Asked = str | Mapping[str, str] | None


@dataclass(frozen=True)
class Precision:
    """How the weights of one component are held."""

    scheme: Scheme
    file: str | None = None  # the address of a GGUF file, then its path here

    def says(self, dtype: torch.dtype | None) -> str:
        """What tells it from any other: part of a fingerprint, and of the log."""
        return f"{Path(self.file).name if self.file else self.scheme.name} in {str(dtype).removeprefix('torch.')}"


def by_component(asked: Asked, models: Collection[str], denoisers: Collection[str]) -> dict[str, str]:
    """What is asked for each component: a word alone is for the denoisers. Raises CheckpointError."""
    if asked is None:
        return {}
    if isinstance(asked, str):
        if asked.endswith(SUFFIX) and len(denoisers) > 1:
            raise CheckpointError(
                f"precision: a file is for one model, and this pipeline has {' and '.join(denoisers)}: name one for "
                "each, such as `precision: {transformer: FILE, transformer_2: FILE}`"
            )
        return dict.fromkeys(denoisers, asked)
    if unknown := sorted(asked.keys() - set(models)):
        raise CheckpointError(f"precision names {', '.join(unknown)}; the models are {', '.join(models)}")
    return dict(asked)


def precisions(asked: Mapping[str, str]) -> dict[str, Precision]:
    """Of the components whose weights are held otherwise than in the dtype they compute in."""
    found = {}
    for name, value in asked.items():
        if value.endswith(SUFFIX):
            found[name] = Precision(GGUF, value)
        elif (scheme := scheme_named(value)) is not None:
            found[name] = Precision(scheme)
    return found


def with_files(asked: Mapping[str, str], needed: Collection[str], cache_root: Path) -> dict[str, str]:
    """The same with the local paths of the GGUF files of components that are `needed` here. Raises CheckpointError."""
    found = dict(asked)
    for name in needed:
        if asked.get(name, "").endswith(SUFFIX):
            try:
                found[name] = str(find_gguf(asked[name], cache_root))
            except CheckpointError as error:
                raise CheckpointError(f"precision: {name}: {error}") from error
    return found


def own_files_needed(needed: Collection[str], asked: Mapping[str, str]) -> list[str]:
    """Without the components whose weights come from a GGUF file."""
    return [name for name in needed if not asked.get(name, "").endswith(SUFFIX)]


def plain_dtypes(asked: Mapping[str, str], component_dtypes: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Those that `precision` names, as exceptions to `dtype`. Raises CheckpointError where two are named for one."""
    found: dict[str, torch.dtype] = {}
    for name, value in asked.items():
        if value in PLAIN:
            found[name] = getattr(torch, PLAIN[value])
            other = component_dtypes.get(name)
            if other not in (None, found[name]):
                raise CheckpointError(
                    f"precision: {name} is to be in {value}, and component_dtypes says {_word(other)}: leave one out"
                )
    return found


def compute_dtype(name: str, precision: Precision, wanted: torch.dtype | None) -> torch.dtype:
    """In which a component computes; `wanted` is what was asked for, or else how it is stored (None: not known).

    Raises CheckpointError for a dtype that it cannot compute in. Another is not taken in its place: pipelines hand the
    encoders' numbers to the denoiser in the encoders' dtype.
    """
    allowed: list[torch.dtype] = [getattr(torch, each) for each in precision.scheme.compute_dtypes]
    if wanted is None:
        return allowed[0]
    if wanted not in allowed:
        raise CheckpointError(
            f"precision: {name} in {precision.scheme.name} computes in {' or '.join(precision.scheme.compute_dtypes)}, "
            f"not in {_word(wanted)}: say `dtype: {precision.scheme.compute_dtypes[0]}`"
        )
    return wanted


def ready(name: str, precision: Precision, cls: type[torch.nn.Module], device: torch.device) -> Precision:
    """The same. Raises CheckpointError for what this process cannot have: hardware, packages, a model's library."""
    scheme = precision.scheme
    cause = missing_packages(scheme) or scheme.obstacle(device)
    if cause is None and scheme.name != GGUF.name:
        cause = _other_library(cls, scheme)
    if cause is not None:
        raise CheckpointError(f"precision: {name} cannot be in {scheme.name}: {cause}")
    return precision


def _other_library(cls: type[torch.nn.Module], scheme: Scheme) -> str | None:
    from diffusers import ModelMixin

    if issubclass(cls, ModelMixin) or scheme.for_transformers is not None:
        return None
    return (
        f"{cls.__name__} is a model of transformers, whose code reads the dtype of its weights between its layers; "
        "int8, fp8 and nf4 are for these"
    )


def _word(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
