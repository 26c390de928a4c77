"""The versions of the software that a result depends on. No torch."""

from __future__ import annotations

import platform
from importlib import metadata

from orchestrator import __version__


def software() -> dict[str, str]:
    """Versions that a result may depend on."""
    names = ("torch", "lightning", "numpy", "grain", "tokenizers", "safetensors")
    return {
        "orchestrator": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
    }
