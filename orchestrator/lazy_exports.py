"""Import a package's public names when they are first used.

A package that imported its modules itself would load torch also for a constant of it, and would close
circles of imports.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_exports(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package (PEP 562).

    Args:
        package: `__name__` of the package.
        modules: module, relative to the root package `orchestrator`, and the names of it that the package exports.

    Returns:
        `__getattr__`, which imports the module of a name that is asked for and raises `AttributeError` for a name that
        is not exported, and `__dir__`, which lists the exported names beside those that are there.
    """
    module_of = {name: module for module, names in modules.items() for name in names}

    def get_attribute(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(importlib.import_module(f"orchestrator.{module_of[name]}"), name)

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return get_attribute, list_names
