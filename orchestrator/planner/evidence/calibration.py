"""Constants fitted to measured runs, from `calibration.yaml`, per software stack."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from orchestrator.chips.chip import Chip
from orchestrator.errors import ConfigError

FILE = Path(__file__).with_name("calibration.yaml")
COMPILED = ("google", "aws")
"""Vendors for whose chips a compiler lays out the whole step (XLA)."""


@dataclass(frozen=True)
class Calibration:
    """How a software stack uses a vendor's chips. All rates are fractions of the catalogue's.

    Attributes:
        stack: the key in `calibration.yaml`.
        vendor: of the chip.
        gemm: fraction of the achievable rate that matrix products reach in a training step (clocks under load
            included); where the catalogue has no achievable rate, `achievable` of the peak stands for it.
        gemm_fp8: the same for products in fp8.
        sustained: what a chip's clocks sustain under load, relative to the vendor's others.
        sustained_fp8: the same in fp8.
        attention_scale: how well the stack's attention suits a chip, relative to the vendor's others.
        gemm_traffic: bytes that a matrix product moves without hiding them, over the least it has to move.
        attention: of the bf16 peak that attention's products reach.
        causal: attention skips what the mask hides.
        window_block: positions by which a window is exceeded, since kernels skip whole blocks.
        narrow_heads: exponent of how much slower attention is with heads narrower than 128.
        expert_gemm: rate of grouped products over many experts, relative to `gemm`.
        expert_seconds: least time of a sparse layer and micro-batch, forward and backward: what the host needs to
            launch its kernels and to learn how many tokens went where.
        elementwise: bytes that the kernels between the matrix products move, over those of `time.fused_bytes`.
        eager: the same where nothing fuses them (`compiled=False`), over `elementwise`.
        optimizer: bytes that the optimizer moves, over the least it has to.
        layer_seconds: fixed cost per layer and micro-batch.
        step_seconds: fixed cost per step.
        intra_link: fraction of the links' rate that collectives reach inside a domain.
        inter_link: the same between domains.
        intra_hop: seconds per step of a ring inside a domain.
        inter_hop: the same between domains.
        tensor_hidden: share of the tensor axis' traffic that computation hides.
        context_hidden: the same of the context axis.
        expert_hidden: the same of the expert axis.
        pipeline_hidden: the same of the pipeline axis.
        fsdp_hidden: share of the computation that hides the gathers and scatters of fsdp.
        replicate_hidden: share of the last backward pass that hides the gradients' all-reduce.
        straggler: how much a step is longer each time that the hosts double.
        selective_recompute: share of the matrix products that run again under selective remat.
        offload_recompute: the same where activations are offloaded.
        weight_bytes: of the working copy, per parameter.
        gradient_bytes: of the gradients, per parameter.
        optimizer_bytes: of the rest, per parameter: moments, and a master copy where the working one is not fp32.
        gradients_stay: gradients have a buffer for the whole run; else they come as activations go.
        reduced_bytes: per gradient on the links.
        logit_bytes: per token and word at the peak of the loss.
        logits_gathered: the loss is computed on all words by every device of the tensor axis, not on its share.
        loss_chunk: tokens whose logits are alive at once; None for all of the micro-batch.
        eager_kept: elements per token and `dim` that norms keep beyond it where nothing fuses them.
        keeps_gathered: sequence parallelism keeps the gathered inputs of the products, where others gather again.
        extra_in_flight: micro-batches that a pipeline stage holds beyond those of 1F1B.
        kept: bytes of activations that a layer without remat keeps, over those of `memory.layer_bytes`.
        selective_kept: share of them that selective remat keeps; None takes the products' results.
        fragmentation: share of the activations that the allocator wastes.
        fused_norms: a kernel normalises in one go and keeps its input alone (the product's own memory model).
        context_bytes: of the runtime and its communication libraries.
    """

    stack: str
    vendor: str
    achievable: float = 0.8
    gemm: float = 0.9
    gemm_fp8: float = 0.75
    sustained: float = 1.0
    sustained_fp8: float = 1.0
    attention_scale: float = 1.0
    gemm_traffic: float = 1.0
    attention: float = 0.4
    causal: bool = True
    window_block: int = 128
    narrow_heads: float = 0.5
    expert_gemm: float = 0.8
    expert_seconds: float = 1e-3
    elementwise: float = 1.0
    eager: float = 2.0
    optimizer: float = 1.2
    layer_seconds: float = 100e-6
    step_seconds: float = 5e-3
    intra_link: float = 0.75
    inter_link: float = 0.7
    intra_hop: float = 2e-6
    inter_hop: float = 6e-6
    tensor_hidden: float = 0.2
    context_hidden: float = 0.5
    expert_hidden: float = 0.2
    pipeline_hidden: float = 0.3
    fsdp_hidden: float = 0.8
    replicate_hidden: float = 0.5
    straggler: float = 0.005
    selective_recompute: float = 0.0
    offload_recompute: float = 0.75
    weight_bytes: float = 4.0
    gradient_bytes: float = 4.0
    optimizer_bytes: float = 8.0
    gradients_stay: bool = True
    reduced_bytes: float = 4.0
    logit_bytes: float = 10.0
    logits_gathered: bool = False
    loss_chunk: int | None = None
    eager_kept: float = 0.0
    keeps_gathered: bool = False
    extra_in_flight: int = 0
    kept: float = 1.0
    selective_kept: float | None = None
    fragmentation: float = 0.05
    fused_norms: bool = False
    context_bytes: float = 1.0e9

    @property
    def own(self) -> bool:
        """Whether the stack is this product."""
        return self.stack.startswith("orchestrator")


def calibration(chip: Chip, stack: str = "auto") -> Calibration:
    """Return the constants of `stack` on `chip`, or with `auto` of the vendor's default stack.

    Raises:
        ConfigError: there is no such stack.
    """
    return _of(_stack_name(chip.vendor, stack), chip.key)


@functools.lru_cache(maxsize=512)
def _of(stack: str, chip: str) -> Calibration:
    return parse(_data(), stack, chip)


def stacks() -> tuple[str, ...]:
    """All stacks with constants of their own."""
    return tuple(_data()["stacks"])


def parse(data: Mapping[str, Any], stack: str, chip: str) -> Calibration:
    """Read one stack's constants from the file's mapping: the vendor's, then the chip's, then what the stack changes.

    Args:
        data: the parsed YAML.
        stack: name of the stack.
        chip: key of the chip.
    """
    entry = data["stacks"][stack]
    vendor = data["vendors"][entry["vendor"]]
    constants = {
        **vendor["constants"],
        **vendor.get("chips", {}).get(chip, {}),
        **entry.get("constants", {}),
        **entry.get("chips", {}).get(chip, {}),
    }
    wrong = set(constants) - {field.name for field in fields(Calibration)}
    assert not wrong, f"calibration.yaml: {stack}: {wrong}"
    return Calibration(stack, entry["vendor"], **constants)


@functools.lru_cache(maxsize=64)
def _stack_name(vendor: str, stack: str) -> str:
    if stack == "auto":
        vendors = _data()["vendors"]
        return str(vendors.get(vendor, vendors["generic"])["default_stack"])
    if stack == "orchestrator" and f"orchestrator-{vendor}" in stacks():
        return f"orchestrator-{vendor}"
    if stack not in stacks():
        close = difflib.get_close_matches(stack, stacks(), n=1)
        raise ConfigError(
            "there is no such software stack in the calibration",
            got=f"stack={stack}",
            allowed=", ".join(("auto", *stacks())),
            fix=f"did you mean '{close[0]}'?" if close else "take stack=auto",
        )
    return stack


@functools.cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return data
