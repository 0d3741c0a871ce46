"""Accelerations: one file and one row each, put into a stage's modules once, when its replica starts."""

from deployments.accelerations.acceleration import Acceleration
from deployments.accelerations.attention import ATTENTION
from deployments.accelerations.compile import COMPILE
from deployments.accelerations.fp4_gemm import FP4_GEMM
from deployments.accelerations.miopen_autotune import MIOPEN_AUTOTUNE
from deployments.accelerations.mlx_norms import MLX_NORMS
from deployments.accelerations.rocm_vae import ROCM_VAE
from deployments.modules import StageModules
from env_config.variables import EnvConfig

# In the order of installation: what is compiled is what those before have put in.
ACCELERATIONS: tuple[Acceleration, ...] = (
    ATTENTION,
    ROCM_VAE,
    MIOPEN_AUTOTUNE,
    MLX_NORMS,
    FP4_GEMM,
    COMPILE,
)


def install_all(modules: StageModules, env: EnvConfig) -> list[str]:
    """Install what the variables ask for; the lines for the log. Raises AccelerationError."""
    lines = [acceleration.install(modules, env) for acceleration in ACCELERATIONS if acceleration.is_on(env)]
    return [line for line in lines if line]


__all__ = ["ACCELERATIONS", "Acceleration", "install_all"]
