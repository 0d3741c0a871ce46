"""The variables of libraries that a replica sets for itself: compilers' caches, and how torch takes device memory."""

import os
import tempfile
from pathlib import Path

from env_config.section import EnvConfigError, Problem

# Read by the libraries themselves, late, so setting them in a replica's constructor is early enough.
LIBRARY_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",  # torch.compile
    "TRITON_CACHE_DIR": "triton",
    "MIOPEN_USER_DB_PATH": "miopen/db",  # what MIOpen's search found
    "MIOPEN_CUSTOM_CACHE_DIR": "miopen/kernels",
}
TORCHS_OWN = os.path.join(tempfile.gettempdir(), "torchinductor_")  # and the name of the user

# Requests have many sizes: segments that grow leave less memory between them that fits none. Any of the variables is
# the user's word, and torch reads the first that it finds.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
ALLOCATOR_SETTINGS = "expandable_segments:True"
WITH_EXPANDABLE_SEGMENTS = ("cuda", "rocm")  # devices; elsewhere torch has none


def check_cache_root(cache_root: Path) -> None:
    """Makes the folder. Raises EnvConfigError, naming the variable, where this process may not write in it."""
    try:
        cache_root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_root):
            pass
    except OSError as error:
        cause = f"it must be a folder that this process may write to ({error.strerror})"
        raise EnvConfigError(Problem("SGLANG_DIFFUSION_CACHE_ROOT", str(cache_root), cause)) from error


def set_library_caches(cache_root: Path) -> dict[str, str]:
    """The folder of each library's cache, by its own variable; one that the user has set stays as it is."""
    for name in LIBRARY_CACHES:
        # torch sets it to its default where libraries that we import touch its compiler.
        if os.environ.get(name, "").startswith(TORCHS_OWN):
            del os.environ[name]
    return {name: os.environ.setdefault(name, str(cache_root / folder)) for name, folder in LIBRARY_CACHES.items()}


def set_allocator_settings(target_device: str) -> str | None:
    """What torch will read at its first allocation on that device; None: nothing of ours."""
    if target_device not in WITH_EXPANDABLE_SEGMENTS or any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return None
    return os.environ.setdefault(ALLOCATOR_VARIABLES[0], ALLOCATOR_SETTINGS)
