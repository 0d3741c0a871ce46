"""Features: one file and one row each, asked for by a request, at work around its forwards."""

from deployments.features.cache_dit.request import CACHE_DIT
from deployments.features.feature import Feature
from deployments.features.lora.request import LORA
from deployments.features.rewiring.request import REWIRING
from deployments.modules import StageModules
from env_config.variables import EnvConfig

# In the order in which they are begun, and entered around a forward.
FEATURES: tuple[Feature, ...] = (REWIRING, CACHE_DIT, LORA)


def install_features(modules: StageModules, env: EnvConfig, features: tuple[Feature, ...] = FEATURES) -> list[str]:
    """Prepares the modules of a stage, after all accelerations; the lines for the log. Raises AccelerationError."""
    lines = [feature.install(modules, env) for feature in features]
    return [line for line in lines if line]


def fields_of_features(features: tuple[Feature, ...] = FEATURES) -> tuple[str, ...]:
    """The names of fields that callers may write for them."""
    return tuple(feature.name for feature in features if feature.is_asked_for and feature.is_a_field)


__all__ = ["FEATURES", "Feature", "fields_of_features", "install_features"]
