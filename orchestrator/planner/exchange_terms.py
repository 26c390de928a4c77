"""How the islands of a planned job exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.planner.estimate.exchange_bytes import exchange_bytes, typical_bytes
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.quantity import Value, given
from orchestrator.planner.spec import ModelShape


@dataclass(frozen=True)
class ExchangeTerms:
    """How the islands of a job exchange; as in the group `islands` of the configuration.

    Attributes:
        algorithm: `diloco`, `decoupled` or `synchronous`.
        inner_steps: between two exchanges of a tensor.
        fragments: parts of the model that are exchanged one after the other.
        overlap_steps: that an island goes on with before it needs the answer.
        kind: numbers on the way, a key of `KINDS`.
        shapes: of what is trained; None where only the model's size is known.
    """

    algorithm: str = "diloco"
    inner_steps: int = 64
    fragments: int = 1
    overlap_steps: int = 0
    kind: str = "fp32"
    shapes: tuple[tuple[int, ...], ...] | None = None

    @property
    def exact(self) -> ExchangeTerms:
        """The reference: gradients at every step, in fp32."""
        return replace(self, algorithm="synchronous", inner_steps=1, fragments=1, overlap_steps=0, kind="fp32")

    @property
    def label(self) -> str:
        """In words."""
        if self.algorithm == "synchronous":
            return "synchronous, fp32"
        said = f"{self.algorithm}, every {self.inner_steps:,} steps, {self.kind}"
        said += f", {self.fragments} fragments" if self.fragments > 1 else ""
        return said + (f", overlap {self.overlap_steps:,}" if self.overlap_steps else "")

    def size(self, model: ModelShape) -> Value:
        """Return the bytes of all that is exchanged, in one direction.

        Args:
            model: that is trained.
        """
        name = f"bytes of an exchange ({self.kind}, each way)"
        if self.shapes is not None:
            return given(name, float(exchange_bytes(self.shapes, self.kind)), "bytes", "shapes of what is trained")
        count = typical_bytes(parameters(model), self.kind)
        return given(name, count, "bytes", "the model's size, as if all of it were matrices", estimated=True)
