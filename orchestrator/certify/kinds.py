"""The kinds of cases: what each measures, and the largest value that passes, with the reason for it. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

PRODUCT_TERMS = 512
"""Terms of each sum in the matrix products that are measured."""
_EPS = 2.0**-24  # half a unit in the last place of fp32


@dataclass(frozen=True)
class Kind:
    """A kind of case.

    Attributes:
        title: a few words for a table.
        measures: what the number is.
        tolerance: the largest value that passes.
        why: the reason for the tolerance.
    """

    title: str
    measures: str
    tolerance: float
    why: str


_BITS = "the same bits or others: nothing is rounded in between"
KINDS: dict[str, Kind] = {
    "host_cpu": Kind(
        "this host's CPU",
        "largest relative difference of its 20 losses from the recorded ones",
        5e-6,
        "rounding alone makes 1.2e-7 (fp32 against fp64), bf16 in the products 1.5e-5: recorded.json",
    ),
    "matrix_products": Kind(
        "matrix products",
        "relative error (Frobenius norm) of fp32 products, forward and backward, against fp64; the worst device",
        2 * math.sqrt(PRODUCT_TERMS) * _EPS,
        f"sums of {PRODUCT_TERMS} terms in fp32 err by about sqrt({PRODUCT_TERMS}) x 2^-24 = 1.3e-6 at most; "
        "TF32 errs by about 3e-4, bf16 by 2e-3",
    ),
    "each_device": Kind(
        "each device alone",
        "devices whose loss and gradients of one batch have other bits than those of the first one",
        0.0,
        "equal devices that are given equal work give equal bits",
    ),
    "initial_weights": Kind("initial weights", "tensors with other bits than the recorded ones", 0.0, _BITS),
    "collectives": Kind(
        "collectives",
        "largest relative difference of loss and gradient norm from the host's, over batches in which one part alone "
        "has targets; 1 and more where a token is not counted exactly once",
        2e-5,
        "between layouts on a CPU 2e-7 was measured; a part that is dropped changes them by their whole size",
    ),
    "gradients": Kind(
        "gradients",
        "largest relative L2 difference of a tensor's first gradient from that of the host's CPU",
        2e-5,
        "between layouts on a CPU 4e-7 was measured, from sums over 2,304 tokens in another order",
    ),
    "losses": Kind(
        "20 losses",
        "largest relative difference from the recorded ones",
        5e-6,
        "rounding alone makes 1.2e-7 (fp32 against fp64), bf16 in the products 1.5e-5: recorded.json",
    ),
    "gradient_norms": Kind(
        "20 gradient norms",
        "largest relative difference from the recorded ones",
        5e-5,
        "rounding alone makes 1.9e-7 (fp32 against fp64), bf16 in the products 2.3e-4: recorded.json",
    ),
    "accumulation": Kind(
        "accumulation",
        "largest relative difference of losses and norms, with small micro-batches, from the recorded ones",
        5e-5,
        "that of the gradient norms",
    ),
    "save": Kind("save → load on the CPU", "tensors whose bits on disk are not those on the devices", 0.0, _BITS),
    "load": Kind("load on the devices", "tensors whose bits after a load are not those on disk", 0.0, _BITS),
    "resume": Kind(
        "resume",
        "losses, norms and tensors at the end that are not bitwise those of a training that was not stopped",
        0.0,
        "the same operations in the same order",
    ),
    "handover_in": Kind(
        "handover, CPU → devices",
        "largest difference of loss, gradient norm and logits, over what the handover check allows of each",
        1.0,
        "1e-5 of the loss, 1e-4 of the norm, 5e-5 of the logits: docs/checkpoint-format.md",
    ),
    "handover_out": Kind(
        "handover, devices → CPU",
        "the same, for a checkpoint of the devices that the host's CPU loads",
        1.0,
        "1e-5 of the loss, 1e-4 of the norm, 5e-5 of the logits: docs/checkpoint-format.md",
    ),
    "determinism": Kind(
        "determinism",
        "losses, norms and tensors that are not bitwise the same in two equal trainings",
        0.0,
        "the same operations in the same order",
    ),
    "nonfinite": Kind(
        "NaN and infinity",
        "ways in which a weight that is NaN or infinite is not noticed, or reaches other weights",
        0.0,
        "a step that is not finite is left out on all ranks, or stops all of them, and changes no bit",
    ),
    "losses_bf16": Kind(
        "20 losses in bf16",
        "largest relative difference from the recorded ones, with matrix products in bf16",
        1e-2,
        "the declared tolerance of bf16",
    ),
}
"""Name → kind, in the order in which they run."""
