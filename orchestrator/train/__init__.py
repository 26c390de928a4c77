"""One training run, from its configuration to its last checkpoint.

Here everything else is put together: `start` begins or resumes a run, `build` turns the configuration into objects in
the order of a run.

The package can be called: `orchestrator.train(...)` is `api.training.train`, although this package has its name.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """A package that can be called: an attribute of the parent package is whatever was imported last by that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("orchestrator.api.training").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
