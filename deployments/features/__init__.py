"""Features: one file and one row each, asked for by a request, at work around its forwards."""

from deployments.features.cache_dit.request import CACHE_DIT
from deployments.features.feature import Feature
from deployments.features.rewiring.request import REWIRING
from deployments.modules import StageModules
from env_config.variables import EnvConfig

# In the order in which they are begun, and entered around a forward.
FEATURES: tuple[Feature, ...] = (REWIRING, CACHE_DIT)


def install_features(modules: StageModules, env: EnvConfig, features: tuple[Feature, ...] = FEATURES) -> list[str]:
    """Prepares the modules of a stage, after all accelerations; the lines for the log. Raises AccelerationError."""
    lines = [feature.install(modules, env) for feature in features]
    return [line for line in lines if line]


__all__ = ["FEATURES", "Feature", "install_features"]
