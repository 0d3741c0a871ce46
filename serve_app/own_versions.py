"""A version for each deployment of an application: an update restarts those that it concerns, and no other.

Serve gives all deployments one version, a hash of all `args`, the import path and the variables: a model's new argument
would restart the replicas of every model. Variables and other options of an actor count apart from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

from pydantic import BaseModel, PrivateAttr
from ray.serve import Application
from ray.serve._private.config import DeploymentConfig


class VersionedConfig(DeploymentConfig):
    """Serve's options of a deployment, sent to its controller with a version of their own."""

    _own_version: str = PrivateAttr(default="")

    def to_proto_bytes(self) -> bytes:
        """What the controller gets; Serve has set the version of the application before."""
        self.version = self._own_version
        return bytes(super().to_proto_bytes())

    @classmethod
    def of(cls, config: DeploymentConfig, version: str) -> VersionedConfig:
        versioned: VersionedConfig = cls.model_construct(_fields_set=set(config.model_fields_set), **dict(config))
        versioned._own_version = version
        return versioned


def with_own_versions(application: Application) -> Application:
    """The same application, whose deployments and those that they are bound to are versioned by their own arguments."""
    for each in {id(bound): bound for bound in deployments_in(application)}.values():
        deployment: Any = each._bound_deployment
        deployment._deployment_config = VersionedConfig.of(deployment._deployment_config, version_of(deployment))
    return application


def deployments_in(value: Any) -> Iterator[Application]:
    """Those that a value is or holds, and those that they are bound to."""
    if isinstance(value, Application):
        yield value
        deployment: Any = value._bound_deployment
        yield from deployments_in([deployment.init_args, deployment.init_kwargs])
    elif isinstance(value, Mapping):
        yield from deployments_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from deployments_in(item)


def version_of(deployment: Any) -> str:
    """Equal for deployments that run the same class with equal arguments, bound to those of the same names."""
    runs = deployment.func_or_class
    told = [runs if isinstance(runs, str) else f"{runs.__module__}.{runs.__qualname__}"]
    told += [plain(deployment.init_args), plain(deployment.init_kwargs)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value as JSON that is equal for equal values. Raises TypeError for one of which that is not known."""
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Application():
            return ["deployment", value._bound_deployment.name]
        case BaseModel():
            return [
                type(value).__qualname__,
                *([name, plain(getattr(value, name))] for name in type(value).model_fields),
            ]
        case Mapping():
            return [[plain(key), plain(item)] for key, item in value.items()]
        case list() | tuple():
            return [plain(item) for item in value]
        case set() | frozenset():
            return sorted(json.dumps(plain(item)) for item in value)
        case PurePath():
            return str(value)
        case _ if is_dataclass(value) and not isinstance(value, type):
            return [
                type(value).__qualname__,
                *([each.name, plain(getattr(value, each.name))] for each in fields(value)),
            ]
    raise TypeError(f"the arguments of a deployment hold a {type(value).__name__}, which no version can be made of")
