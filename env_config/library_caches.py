"""Points the compilers' caches of libraries below SGLANG_DIFFUSION_CACHE_ROOT."""

import os
from pathlib import Path

# Read by the libraries themselves, late, so setting them in a replica's constructor is early enough.
LIBRARY_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",  # torch.compile
    "TRITON_CACHE_DIR": "triton",
    "MIOPEN_USER_DB_PATH": "miopen/db",  # what MIOpen's search found
    "MIOPEN_CUSTOM_CACHE_DIR": "miopen/kernels",
}


def set_library_caches(cache_root: Path) -> dict[str, str]:
    """The folder of each library's cache, by its own variable; one that the user has set stays as it is."""
    return {name: os.environ.setdefault(name, str(cache_root / folder)) for name, folder in LIBRARY_CACHES.items()}
