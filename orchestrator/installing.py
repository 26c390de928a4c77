"""How the user brings in what is missing, by how this product was installed.

The command that is named must work as it is typed, and must not fetch a package of another project: so a checkout is
installed from where it is, and of an installed wheel the packages of an extra are named one by one.
"""

from __future__ import annotations

import importlib.metadata
import os
import site
import sys
import sysconfig
from pathlib import Path

DISTRIBUTION = "lm-orchestrator"


def how_to_install(extra: str = "") -> str:
    """Return the command that installs the product's dependencies, or those of one of its extras.

    Args:
        extra: of pyproject.toml; empty for what every run needs.
    """
    root = checkout()
    if root is None:
        return f"pip install {_packages(extra)}"
    if Path(sys.prefix) == root / ".venv":
        return f"scripts/setup {extra}".rstrip()
    if Path(sys.prefix) == Path(sys.base_prefix):
        return f"{f'scripts/setup {extra}'.rstrip()}, then: source .venv/bin/activate"
    target = f"{root}[{extra}]" if extra else str(root)
    return f"{sys.executable} -m pip install --constraint {root / 'constraints.txt'} --editable '{target}'"


def own_environment(extra: str) -> str:
    """Return how to make a separate environment for an extra whose packages conflict with those of the others.

    Args:
        extra: its name.
    """
    root = checkout()
    if root is None:
        return f"in an environment of its own: pip install {_packages(extra)}"
    if extra in ("xla", "tpu"):
        return f"scripts/setup {extra}, then run .venv-xla/bin/python -m orchestrator"
    return f"ORCHESTRATOR_VENV=.venv-{extra} scripts/setup {extra}, then run .venv-{extra}/bin/python -m orchestrator"


def importable() -> dict[str, str]:
    """Return the variables with which a process that is started here finds this package and the caller's modules.

    A script has its own folder on the path, and a notebook what it was told: a process of a run has neither by itself.
    """
    installed = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    installed |= {*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_config_var("DESTSHARED")}
    paths = [path for path in (str(Path(__file__).resolve().parents[1]), *sys.path) if path not in installed]
    wanted = [path for path in paths if path and Path(path).is_dir()]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(wanted))} if wanted else {}


def checkout() -> Path | None:
    """Return the checkout that this package is run from; None for an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "scripts" / "setup").is_file() and (root / "pyproject.toml").is_file() else None


def _packages(extra: str) -> str:
    """Return the requirements of an extra as the installed wheel states them, quoted for a shell."""
    try:
        stated = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        stated = []
    marks = {f"extra == '{extra}'", f'extra == "{extra}"'} if extra else {""}
    found = []
    for requirement in stated:
        package, _, condition = (part.strip() for part in requirement.partition(";"))
        if any(mark in condition if mark else not condition for mark in marks):
            found.append(f"'{package}'")
    return " ".join(found) or f"the packages of the extra '{extra}' that pyproject.toml lists"
