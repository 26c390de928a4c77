"""Which devices compute products of 8-bit floats. No torch.

What torchao 0.18 has kernels for: CUDA from compute capability 8.9 (scales per tensor) or 9.0 (per row), 10.x for
MXFP8; of AMD's the architectures below, without MXFP8. On a CPU every recipe is emulated: operands are rounded to what
fp8 holds, and multiplied in fp32. That is for tests and rehearsals, and as slow as fp32.
"""

from __future__ import annotations

import importlib.util

from orchestrator.chips.load import load_catalogue
from orchestrator.errors import HardwareError, MissingExtraError
from orchestrator.hardware.target import Target

# Recipe -> compute capabilities, from the first to below the second.
_CAPABILITIES = {
    "tensorwise": (8.9, 99.0),
    "rowwise": (9.0, 99.0),
    "rowwise_gw_hp": (9.0, 99.0),
    "mxfp8": (10.0, 12.0),
}
_AMD = ("gfx942", "gfx950")
_FIX = "set hardware.precision=bf16"


def check_fp8(target: Target, recipe: str) -> None:
    """See that the devices of `target` compute products by an fp8 recipe, and that the library for it is there.

    Args:
        target: the hardware.
        recipe: as `hardware.fp8.recipe` has it.

    Raises:
        HardwareError: they do not.
        MissingExtraError: torchao is not installed.
    """
    if problem := _problem(target, recipe):
        raise HardwareError(
            f"hardware.precision=fp8 cannot be had here: {problem}",
            got=f"hardware.fp8.recipe={recipe} on target {target.name}, runtime {target.runtime}",
            allowed="NVIDIA from Ada (tensorwise), Hopper (rowwise) or Blackwell (mxfp8) on; AMD MI300 and MI350 "
            "without mxfp8; a CPU, which emulates all of them",
            fix=f"set hardware.fp8.recipe=rowwise or tensorwise, or {_FIX.removeprefix('set ')}"
            if recipe == "mxfp8" and target.name in ("cuda", "rocm")
            else _FIX,
        )
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtraError("torchao", "fp8", "hardware.precision=fp8")


def _problem(target: Target, recipe: str) -> str:
    """Return why the devices have no products of the recipe; empty where they have, or emulate them."""
    if target.strategy != "dtensor":
        return "XLA's compiler is given bf16 products, and none of fp8"
    match target.name:
        case "cpu":
            return ""
        case "cuda":
            return _cuda(target, recipe)
        case "rocm":
            return _rocm(target, recipe)
    return f"torchao has no fp8 kernels for the runtime {target.runtime}"


def _cuda(target: Target, recipe: str) -> str:
    probe, (least, below) = target.probe(), _CAPABILITIES[recipe]
    stated = probe.runtime.get("compute_capability")
    if stated is None:
        # Not known without the driver's tool: the catalogue knows whether the chip has fp8 at all.
        if probe.chip is None or (recipe != "mxfp8" and load_catalogue().get(probe.chip).fp8_flops.value is not None):
            return ""
        return f"nothing says that the chip {probe.chip} has it"
    if least <= float(stated) < below:
        return ""
    return f"compute capability {stated}; the recipe needs {least:g} or more{', below 12' if below < 99 else ''}"


def _rocm(target: Target, recipe: str) -> str:
    if recipe == "mxfp8":
        return "torchao's kernels for mxfp8 are for CUDA"
    found = target.probe().runtime.get("architecture", "")
    other = [name for name in found.split(", ") if name and name not in _AMD]
    return f"architecture {', '.join(other)} has no fp8 products in torch" if other else ""
