"""These tests run in the environment of torch_xla: `scripts/test --all`."""

from __future__ import annotations

import importlib.util
import os

# Most of these tests' time is compilation for virtual devices; the steps are few and small.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

collect_ignore_glob = [] if importlib.util.find_spec("torch_xla") else ["test_*.py"]
