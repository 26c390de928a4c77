"""The outer weights of a run, and the chain of updates that made them: all outer arithmetic is here, in fp32.

What leaves the hub is an update in the numbers of the exchange. The hub adds what these stand for, as the islands do,
so all of them have the same bits, whatever was lost in rounding; that is added to the next update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orchestrator.errors import CheckpointError
from orchestrator.islands.boxes import Box
from orchestrator.islands.codec import Encoded
from orchestrator.islands.fragments import fragments
from orchestrator.islands.island_messages import Terms
from orchestrator.islands.outer import OuterOptimizer, bits, weighted_mean

Array = np.ndarray[Any, np.dtype[np.float32]]
_THREADS = 4


@dataclass
class Contribution:
    """What an island has brought of one fragment.

    Attributes:
        island: its name.
        lease: in which it was.
        fragment: number of it.
        step: of the lease.
        version: of the outer weights that it is relative to.
        targets: tokens that are in it.
        arrays: by tensor, whole.
        missing: elements that have not come.
        seen: parts that have come, by tensor.
        digests: of the outer weights that the ranks have, by rank.
        nbytes: that came.
        infinite: name of a tensor in which a number is not finite.
    """

    island: str
    lease: int
    fragment: int
    step: int
    version: int
    targets: int
    arrays: dict[str, Array]
    missing: int
    seen: dict[str, list[Box]] = field(default_factory=dict)
    digests: dict[int, int] = field(default_factory=dict)
    nbytes: int = 0
    infinite: str = ""

    @property
    def digest(self) -> int:
        """Sum over the bits of the island's outer weights of the fragment."""
        return sum(self.digests.values()) % (1 << 64)


class OuterWeights:
    """The outer weights, their optimizer, and the updates since the oldest version that an island may come back to.

    Args:
        terms: of the exchange.
        shapes: of the tensors, in the order of the model.

    Attributes:
        fragments: names of the tensors of each fragment.
        versions: merges of each fragment so far.
        weights: by tensor; empty until an island has brought them, and where gradients are exchanged.
    """

    def __init__(self, terms: Terms, shapes: Mapping[str, tuple[int, ...]]):
        self.terms, self.shapes = terms, dict(shapes)
        self.fragments = fragments(shapes, terms.fragments)
        self.versions = [0] * len(self.fragments)
        self.weights: dict[str, Array] = {}
        self._given: dict[str, int] = {}
        self._optimizer = OuterOptimizer(terms.lr, terms.momentum, terms.nesterov)
        self._residuals: dict[str, Array] = {}
        self._chain: dict[tuple[int, int], dict[str, Encoded]] = {}
        self._digests: dict[tuple[int, int], int] = {}
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="outer")

    @property
    def needed(self) -> bool:
        """Whether there are outer weights, and they are not here yet."""
        return not self.terms.gradients and len(self._given) < len(self.shapes)

    @property
    def retained_bytes(self) -> int:
        """Bytes of the updates that are kept."""
        return sum(one.nbytes for made in self._chain.values() for one in made.values())

    # --- initial weights ----------------------------------------------------------------------------

    def give(self, box: Box, values: Array) -> None:
        """Take a part of the initial weights.

        Args:
            box: which one.
            values: of the box.
        """
        if box.name not in self.weights:
            self.weights[box.name] = np.empty(self.shapes[box.name], dtype=np.float32)
        self.weights[box.name][box.slices] = values

    def given(self) -> None:
        """Say that all parts of the initial weights are here."""
        self._given = dict.fromkeys(self.shapes, 1)

    # --- a merge --------------------------------------------------------------------------------------

    def collect(self, island: str, lease: int, fragment: int, step: int, version: int, targets: int) -> Contribution:
        """Return an empty contribution, to be filled by parts.

        Args:
            island: its name.
            lease: in which it is.
            fragment: number of it.
            step: of the lease.
            version: that it is relative to.
            targets: tokens that are in it.
        """
        names = self.fragments[fragment]
        arrays = {name: np.empty(self.shapes[name], dtype=np.float32) for name in names}
        missing = sum(array.size for array in arrays.values())
        return Contribution(island, lease, fragment, step, version, targets, arrays, missing)

    def merge(self, fragment: int, given: Sequence[tuple[float, Contribution]], part: float = 1.0) -> int:
        """Make the next version of a fragment of what islands have brought. Returns its number.

        Args:
            fragment: number of it.
            given: weights and contributions, in the order of the islands' names.
            part: of a round's tokens that is in it.
        """
        weights = [weight for weight, _ in given]
        names = self.fragments[fragment]
        # The outer optimizer's state comes into being here, one tensor after the other; then they are independent.
        merged = self._pool.map(lambda name: self._merge_one(name, given, weights, part), names)
        found = dict(zip(names, merged, strict=True))
        self.versions[fragment] += 1
        self._chain[fragment, self.versions[fragment]] = {name: encoded for name, (encoded, _) in found.items()}
        if not self.terms.gradients:
            total = sum(count for _, count in found.values())
            self._digests[fragment, self.versions[fragment]] = total % (1 << 64)
        return self.versions[fragment]

    def _merge_one(
        self, name: str, given: Sequence[tuple[float, Contribution]], weights: Sequence[float], part: float
    ) -> tuple[Encoded, int]:
        """Return the update of a tensor, and the bits of the new weights."""
        total = weighted_mean([one.arrays[name] for _, one in given], weights)
        if self.terms.gradients:
            return Encoded.of(total, name, self.terms.exchange), 0
        update = self._optimizer.step(name, total, part)
        if self.terms.error_feedback and name in self._residuals:
            update = update + self._residuals[name]
        encoded = Encoded.of(update, name, self.terms.exchange)
        decoded = encoded.decoded()
        if self.terms.error_feedback and self.terms.exchange != "fp32":
            self._residuals[name] = update - decoded
        # A new array: somebody may be reading the old one.
        self.weights[name] = self.weights[name] + decoded
        return encoded, bits(self.weights[name])

    def digest(self, fragment: int, version: int) -> int | None:
        """Return the sum over the bits of a fragment's weights; None where it is not known any more.

        Args:
            fragment: number of it.
            version: of the weights.
        """
        if version == self.versions[fragment] and (fragment, version) not in self._digests and not self.needed:
            total = sum(bits(self.weights[name]) for name in self.fragments[fragment])
            self._digests[fragment, version] = total % (1 << 64)
        return self._digests.get((fragment, version))

    # --- updates for islands ----------------------------------------------------------------------------

    def has_updates(self, fragment: int, have: int, to: int) -> bool:
        """Return whether the updates from one version to another are here.

        Args:
            fragment: number of it.
            have: version of an island.
            to: version that it needs.
        """
        return have <= to and all((fragment, version) in self._chain for version in range(have + 1, to + 1))

    def part_of(self, fragment: int, version: int, box: Box) -> bytes | memoryview:
        """Return a part of the update that makes `version`, in the numbers of the exchange.

        Args:
            fragment: number of it.
            version: that it makes.
            box: the part.
        """
        return self._chain[fragment, version][box.name].part(box)

    def trim(self, floors: Sequence[int]) -> None:
        """Forget the updates up to these versions.

        Args:
            floors: of each fragment.
        """
        for fragment, version in list(self._chain):
            if version <= floors[fragment]:
                del self._chain[fragment, version]
        for fragment, version in list(self._digests):
            if version < floors[fragment]:
                del self._digests[fragment, version]

    def roll_back(self, versions: Sequence[int]) -> None:
        """Forget the merges after these versions, where gradients are exchanged: weights lie with the islands.

        Args:
            versions: of each fragment.
        """
        self.versions = list(versions)
        self._chain = {key: made for key, made in self._chain.items() if key[1] <= versions[key[0]]}

    # --- state -------------------------------------------------------------------------------------------

    def tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the state as named arrays, that are not changed any more."""
        found: dict[str, np.ndarray[Any, Any]] = {f"model.{name}": self.weights[name] for name in self.weights}
        found |= {f"outer.momentum.{name}": array.copy() for name, array in self._optimizer.momentum.items()}
        found |= {f"outer.residual.{name}": array for name, array in self._residuals.items()}
        for (fragment, version), made in self._chain.items():
            for name, encoded in made.items():
                payload = encoded.part(Box.whole(name, self.shapes[name]))
                found[f"outer.update.{fragment}.{version}.{name}"] = np.frombuffer(payload, dtype=np.uint8)
        return found

    def plain(self) -> dict[str, Any]:
        """Return the rest of the state for JSON."""
        return {"versions": list(self.versions), "given": not self.needed}

    def restore(self, tensors: Mapping[str, np.ndarray[Any, Any]], plain: Mapping[str, Any]) -> None:
        """Take over what `tensors` and `plain` gave.

        Args:
            tensors: by name.
            plain: from a checkpoint.

        Raises:
            CheckpointError: it is of another model.
        """
        self.versions = [int(version) for version in plain["versions"]]
        if len(self.versions) != len(self.fragments):
            raise CheckpointError(
                "the outer weights were exchanged in another number of fragments",
                got=f"islands.fragments={len(self.fragments)}",
                allowed=str(len(self.versions)),
            )
        for key, array in tensors.items():
            kind, _, rest = key.partition(".")
            if kind == "model":
                self.weights[rest] = self._checked(rest, array)
            elif key.startswith("outer.momentum."):
                name = key.removeprefix("outer.momentum.")
                self._optimizer.momentum[name] = self._checked(name, array)
            elif key.startswith("outer.residual."):
                name = key.removeprefix("outer.residual.")
                self._residuals[name] = self._checked(name, array)
            elif key.startswith("outer.update."):
                fragment, version, name = key.removeprefix("outer.update.").split(".", 2)
                encoded = Encoded.read(array.tobytes(), Box.whole(name, self.shapes[name]), self.terms.exchange)
                self._chain.setdefault((int(fragment), int(version)), {})[name] = encoded
        if plain["given"]:
            self.given()

    def _checked(self, name: str, array: np.ndarray[Any, Any]) -> Array:
        if self.shapes.get(name) != tuple(array.shape):
            raise CheckpointError(
                f"the tensor '{name}' of the outer weights is of another model",
                got=tuple(array.shape),
                allowed=str(self.shapes.get(name)),
            )
        return np.array(array, dtype=np.float32)
