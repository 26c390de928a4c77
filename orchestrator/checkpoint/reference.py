"""Handover check: whether a restored model reproduces loss, gradient norm and logits recorded at the save.

    reference.safetensors   a few short sequences as the model gets them, and a digest of the logits that it gave
    handover.json           the loss and the norm of the gradients that it gave
    sums.json               a sum over the bits of each tensor (`writer.sum_bits`), however it is cut

The digest is numbers, not a hash, so that a tolerance can be applied to it. Per position of the reference batch, all
fp32 of shape [rows, length]:

    logits.logsumexp    log of the sum of the exponentials of all logits
    logits.target       logit of the target; 0 where there is none
    logits.projection0  sum of s_v * logit_v over the vocabulary, divided by sqrt(V), with signs s_v from `signs`
    logits.projection1  the same with other signs

A loss of two models can agree by chance, a random projection of all their logits does not. A weight that does little
to the logits shows in the sums: every tensor is restored to the bit. No torch: comparing is arithmetic on small arrays.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.format import SUMS, parse_json
from orchestrator.constants import IGNORE_INDEX
from orchestrator.errors import CheckpointError, HandoverError

REFERENCE, MEASURED = "reference.safetensors", "handover.json"
DIGEST = ("logsumexp", "target", "projection0", "projection1")
PROJECTIONS = 2
_SIDE = ("target", "runtime", "device_names", "devices", "hosts", "layout", "precision", "numerics", "software")
# Of which checkpoints of before had none: what is not known has not changed.
_NEW = ("runtime", "numerics")
_NAMES = {"loss": "loss", "grad_norm": "gradient norm", "logits": "logits"}
_NAMED = 8  # tensors that are listed
_FIELDS, _OPTIONAL = ("tokens", "targets", "positions"), ("documents",)
_MAX_BYTES, _MAX_TOKENS = 1 << 26, 1 << 20
# Below these a difference counts as it is: rounding of the logits does not shrink with what is computed from them.
_LEAST_LOSS, _LEAST_NORM = 1.0, 0.1


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed differences of two measurements, each relative to the saved one.

    Attributes:
        loss: of a loss below 1 nat, absolute.
        grad_norm: of a norm below 0.1, relative to that.
        logits: root mean square of the difference over that of the saved values, for each part of the digest.
    """

    loss: float
    grad_norm: float
    logits: float


# By the precisions of the two sides. The losses' are those of the strategies' conformance suite, and so is the norm's
# in fp32. Between layouts and backends a small model's logits were measured to differ by 2e-7 in fp32, and by 3e-3
# where one side has bf16: depth adds to both.
TOLERANCES = {
    ("fp32", "fp32"): Tolerance(1e-5, 1e-4, 5e-5),
    ("bf16", "fp32"): Tolerance(1e-2, 5e-2, 3e-2),
    ("bf16", "bf16"): Tolerance(1e-2, 5e-2, 3e-2),
    ("fp32", "fp8"): Tolerance(2e-2, 1e-1, 1e-1),
    ("bf16", "fp8"): Tolerance(2e-2, 1e-1, 1e-1),
    ("fp8", "fp8"): Tolerance(2e-2, 1e-1, 1e-1),
}


def tolerance(one: str, other: str) -> Tolerance:
    """Return the declared tolerance between two precisions, in either order.

    Args:
        one: a precision, such as `bf16`.
        other: another one.

    Raises:
        CheckpointError: there is none for them.
    """
    first, second = sorted((one, other))
    if (first, second) not in TOLERANCES:
        raise CheckpointError(
            "no tolerance is declared between these precisions",
            got=f"{first} and {second}"[:100],
            allowed="; ".join(" and ".join(pair) for pair in TOLERANCES),
        )
    return TOLERANCES[first, second]


@dataclass(frozen=True)
class Measurement:
    """Loss, gradient norm and logits of a model for a reference batch.

    Attributes:
        loss: mean over the target tokens, in nats; None where it is not finite.
        grad_norm: global L2 norm of the gradients of that loss; None where it is not finite.
        digest: the parts of `DIGEST`, fp32 [rows, length]. Rows beyond those of the batch are repetitions of it, as
            each group of devices gets some.
    """

    loss: float | None
    grad_norm: float | None
    digest: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """A reference batch (int64 arrays [rows, length], as `data.stream` gives them) and the saved model's results.

    Attributes:
        batch: the reference batch.
        measured: by the saved model.
    """

    batch: Mapping[str, np.ndarray]
    measured: Measurement


@dataclass(frozen=True)
class Difference:
    """One compared quantity; `saved` and `measured` are None where there is no single number, or it is not finite.

    Attributes:
        quantity: `loss`, `grad_norm` or `logits`.
        difference: relative, or between digests; NaN where a value is not finite.
        tolerance: largest difference that agrees.
    """

    quantity: str
    saved: float | None
    measured: float | None
    difference: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.difference <= self.tolerance  # of a NaN: no

    def values(self) -> str:
        """`5.1 instead of 5.2 `, where these are numbers."""
        known = self.saved is not None and self.measured is not None
        return f"{self.measured:.6g} instead of {self.saved:.6g} " if known else ""

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON; a difference that is not finite becomes None."""
        known = self.difference if math.isfinite(self.difference) else None
        return {
            "saved": self.saved,
            "measured": self.measured,
            "difference": known,
            "tolerance": self.tolerance,
            "agrees": self.agrees,
        }


def compare(saved: Measurement, measured: Measurement, allowed: Tolerance) -> list[Difference]:
    """Compare measured with saved values: `loss`, `grad_norm` and `logits`.

    Args:
        saved: values recorded at the save.
        measured: values of the restored model.
        allowed: the tolerance.
    """
    pairs = [
        ("loss", saved.loss, measured.loss, _LEAST_LOSS, allowed.loss),
        ("grad_norm", saved.grad_norm, measured.grad_norm, _LEAST_NORM, allowed.grad_norm),
    ]
    found = [Difference(name, a, b, _relative(a, b, least), limit) for name, a, b, least, limit in pairs]
    parts = [_digest_difference(saved.digest[name], measured.digest[name]) for name in DIGEST]
    return [*found, Difference("logits", None, None, max(parts), allowed.logits)]


def _relative(saved: float | None, measured: float | None, least: float) -> float:
    if saved is None or measured is None:
        return math.inf  # what is not finite agrees with nothing, itself included
    return abs(measured - saved) / max(abs(saved), least)


def _digest_difference(saved: np.ndarray, measured: np.ndarray) -> float:
    """Return the largest difference over the repetitions of the batch, so that no group of devices can hide."""
    rows, scale = len(saved), max(_rms(saved), 1e-30)
    copies = measured.reshape(-1, rows, *saved.shape[1:])
    if not np.isfinite(saved).all():
        return math.inf
    parts = [_rms(copy - saved) / scale for copy in copies]
    return max(parts) if np.isfinite(parts).all() else math.inf


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def signs(projection: int, size: int) -> np.ndarray:
    """Return the signs of a projection, float32 [size] of +1 and -1.

    Bit i of SHAKE-256 of the text `orchestrator/handover/<projection>` (bits of a byte from the least significant
    on), 1 for +1: any language can make them, for any vocabulary.

    Args:
        projection: its number.
        size: elements, that is the size of the vocabulary.
    """
    stream = hashlib.shake_256(f"orchestrator/handover/{projection}".encode()).digest(-(-size // 8))
    bits = np.unpackbits(np.frombuffer(stream, np.uint8), bitorder="little")[:size]
    return np.where(bits, np.float32(1), np.float32(-1))


def reference_batch(batch: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Return the first `length` positions of a stream's batch: later ones do not reach back to them.

    Args:
        batch: arrays [B, T].
        length: of each, in bytes.
    """
    return {name: np.ascontiguousarray(array[:, :length]) for name, array in batch.items()}


def share(batch: Mapping[str, np.ndarray], groups: int, split: int, rank: int, shares: int) -> dict[str, np.ndarray]:
    """Return a share of the reference batch, repeated so that every data-parallel group has as many rows.

    Every row occurs as often as every other one, so the mean loss and its gradient are those of the batch, whatever
    the number of groups. Each sequence is padded on the right, where causality hides it, to a length that `split`
    ranks can share; a padded position is a document of its own without a target.

    Args:
        batch: arrays [rows, length].
        groups: data-parallel groups.
        split: ranks that share a sequence.
        rank: number of the share.
        shares: number of shares.

    Returns:
        int64 arrays [lcm(rows, groups) / shares, length], the rows `rank * k` to `(rank + 1) * k - 1` of the whole.
    """
    rows, length = batch["tokens"].shape
    whole = math.lcm(rows, groups)
    mine = np.arange(whole)[rank * whole // shares : (rank + 1) * whole // shares] % rows
    padding = -length % split
    values = {"targets": IGNORE_INDEX, "documents": int(batch["documents"].max()) + 1 if "documents" in batch else 0}
    return {
        name: np.pad(array[mine], ((0, 0), (0, padding)), constant_values=values.get(name, 0))
        for name, array in batch.items()
    }


def to_files(reference: Reference) -> dict[str, bytes]:
    """Return the files of a checkpoint that carry `reference`, by name."""
    import safetensors.numpy

    measured = reference.measured
    arrays = {f"batch.{name}": array for name, array in reference.batch.items()}
    arrays |= {f"logits.{name}": array for name, array in measured.digest.items()}
    numbers = {"loss": measured.loss, "grad_norm": measured.grad_norm}
    return {REFERENCE: safetensors.numpy.save(arrays), MEASURED: json.dumps(numbers, allow_nan=False).encode()}


def read_reference(checkpoint: Checkpoint) -> Reference | None:
    """Read the reference that a checkpoint carries; None where it has none.

    Args:
        checkpoint: the checkpoint to read.

    Raises:
        CheckpointError: what it carries is damaged, or is nothing that its model could be given.
    """
    import safetensors
    import safetensors.numpy

    if not {REFERENCE, MEASURED} <= set(checkpoint.manifest.files):
        return None
    try:
        arrays = safetensors.numpy.load(checkpoint.read(REFERENCE, _MAX_BYTES))
        numbers = parse_json(checkpoint.read(MEASURED))
        reference = _reference(arrays, numbers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"the reference batch of the checkpoint is damaged: {error!r}"[:300], got=checkpoint.directory
        ) from None
    vocabulary = checkpoint.manifest.tensors.get("model.embed.weight")
    tokens, targets = reference.batch["tokens"], reference.batch["targets"]
    if vocabulary is not None and max(tokens.max(), targets.max()) >= vocabulary.shape[0]:
        raise CheckpointError(
            "the reference batch of the checkpoint has tokens that its model does not know",
            got=int(max(tokens.max(), targets.max())),
            allowed=f"less than {vocabulary.shape[0]}",
        )
    return reference


def read_sums(checkpoint: Checkpoint) -> dict[str, int]:
    """Read the sum over the bits of each stored tensor; empty for a checkpoint that has none.

    Args:
        checkpoint: the checkpoint to read.

    Raises:
        CheckpointError: they are damaged.
    """
    if SUMS not in checkpoint.manifest.files:
        return {}
    try:
        sums = parse_json(checkpoint.read(SUMS))
        return {name: int(text, 16) for name, text in sums.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"file '{SUMS}' of the checkpoint is damaged: {error!r}"[:300], got=checkpoint.directory
        ) from None


def _reference(arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> Reference:
    batch = {name: arrays[f"batch.{name}"] for name in _FIELDS}
    batch |= {name: arrays[f"batch.{name}"] for name in _OPTIONAL if f"batch.{name}" in arrays}
    digest = {name: arrays[f"logits.{name}"] for name in DIGEST}
    shape = batch["tokens"].shape
    if len(shape) != 2 or not 0 < math.prod(shape) <= _MAX_TOKENS:
        raise ValueError(f"a batch of shape {shape}")
    for kind, group in ((np.int64, batch), (np.float32, digest)):
        for name, array in group.items():
            if array.shape != shape or array.dtype != kind:
                raise ValueError(f"{name} is {array.dtype} {array.shape}")
    lowest = min(array.min() for name, array in batch.items() if name != "targets")
    if lowest < 0 or ((batch["targets"] < 0) & (batch["targets"] != IGNORE_INDEX)).any():
        raise ValueError("a negative token or position")
    if batch["positions"].max() >= shape[1]:
        raise ValueError("a position beyond its sequence")
    return Reference(batch, Measurement(_number(numbers["loss"]), _number(numbers["grad_norm"]), digest))


@dataclass(frozen=True)
class Handover:
    """The result of one handover check.

    Attributes:
        step: of the checkpoint.
        before: provenance of the side that saved, as a checkpoint's state has it.
        after: provenance of the side that restored.
        differences: what was compared; empty where the checkpoint carries no reference.
        tensors: those whose bits are not the saved ones.
    """

    step: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    differences: tuple[Difference, ...]
    tensors: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """`agrees`, `differs`, or `unchecked` where there was nothing to compare with."""
        if not self.differences:
            return "unchecked"
        return "agrees" if all(one.agrees for one in self.differences) else "differs"

    @property
    def changed(self) -> list[str]:
        """What of backend, layout, precision, numerics (how is rounded) and software is not as it was."""
        kinds: dict[str, tuple[str, ...]] = {"backend": ("target", "runtime", "device_names")}
        kinds |= {key: (key,) for key in ("layout", "precision", "numerics", "software")}
        known = [key for key in _SIDE if key in self.before or key not in _NEW]
        return [
            kind
            for kind, keys in kinds.items()
            if any(self.before.get(key) != self.after.get(key) for key in keys if key in known)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON."""
        return {
            "step": self.step,
            "verdict": self.verdict,
            "changed": self.changed,
            "other_bits": list(self.tensors[:_NAMED]),
            **{one.quantity: one.to_dict() for one in self.differences},
            "from": {key: self.before.get(key) for key in _SIDE},
            "to": {key: self.after.get(key) for key in _SIDE},
        }

    def __str__(self) -> str:
        """One line for a terminal."""
        if not self.differences:
            return "unchecked: the checkpoint carries no reference batch to compare with"
        parts = [f"{_NAMES[one.quantity]} by {one.difference:.1e} of {one.tolerance:g}" for one in self._computed]
        bits = f"{len(self.tensors)} tensors with other bits" if self.tensors else "every tensor to the bit"
        changed = f"changed: {', '.join(self.changed)}" if self.changed else "nothing changed"
        computed = f"{', '.join(parts)} allowed" if parts else "no reference batch to compute"
        return f"{self.verdict}: {computed}; {bits} ({changed})"

    def error(self) -> HandoverError:
        """Return the error of a check that differs."""
        if unmeasured := [_NAMES[one.quantity] for one in self._computed if not math.isfinite(one.difference)]:
            return HandoverError(
                "the model of the checkpoint gives numbers that are not finite: its run had diverged, or it does here",
                got=f"{', '.join(unmeasured)} of step {self.step}",
                fix="take an earlier checkpoint of that run, or another precision",
            )
        beyond = [one for one in self._computed if not one.agrees]
        got = [f"{_NAMES[one.quantity]} {one.values()}differs by {one.difference:.2g}" for one in beyond]
        got += [f"{name} has other bits" for name in self.tensors[:_NAMED]]
        if len(self.tensors) > _NAMED:
            got.append(f"and so have {len(self.tensors) - _NAMED} more tensors")
        allowed = [f"{_NAMES[one.quantity]} {one.tolerance:g}" for one in beyond]
        return HandoverError(
            "the model of the checkpoint is not what it was, or does not compute here what it did where it was saved",
            got="\n           ".join(got),
            allowed=", ".join(allowed) or "every tensor to the bit",
            fix="trust neither this hardware and software nor this checkpoint before you know why; "
            "checkpoint.handover.on_mismatch=warn goes on all the same",
        )

    @property
    def _computed(self) -> list[Difference]:
        return [one for one in self.differences if one.quantity in _NAMES]


def check(
    checkpoint: Checkpoint,
    reference: Reference | None,
    measured: Measurement | None,
    tensors: Sequence[str] | None,
    here: Mapping[str, Any],
) -> Handover:
    """Judge the values measured here by those that `checkpoint` was saved with.

    Args:
        checkpoint: the checkpoint that was restored.
        reference: the values recorded at the save; None where it has none.
        measured: the values of the restored model; None where they could not be measured.
        tensors: those whose bits are not the saved ones; None where bits were not compared.
        here: provenance of this side.

    Raises:
        CheckpointError: it was saved in a precision that no tolerance is declared for.
    """
    before = checkpoint.state()
    if tensors is None:
        return Handover(checkpoint.step, before, here, ())
    bits = Difference("tensors", None, None, float(len(tensors)), 0.0)
    if reference is None or measured is None:
        return Handover(checkpoint.step, before, here, (bits,), tuple(tensors))
    allowed = tolerance(str(before.get("precision", here["precision"])), here["precision"])
    found = (*compare(reference.measured, measured, allowed), bits)
    return Handover(checkpoint.step, before, here, found, tuple(tensors))


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"not a finite number: {value!r}"[:100])
    return float(value)
