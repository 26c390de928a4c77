"""Look for loss spikes in the numbers that are on the host already, and warn of them or take the run back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as lightning

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.config.schema import RunConfig
from orchestrator.optim.schedule import warmup_steps
from orchestrator.training.divergence import Diverged
from orchestrator.training.spikes import Spike, SpikeDetector

_KEY = "spikes"  # of state.json


class SpikeWatch(lightning.Callback):
    """Judges each step when its numbers are fetched. They are the same bits on all ranks, and so is what follows.

    Args:
        config: of the run.
        say: prints a line.

    Attributes:
        found: spikes of this leg, for its record.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None]):
        self._action, self._say = config.train.on_spike, say
        self._detector = SpikeDetector(config.train.spike, warmup_steps(config))
        self._spike: Spike | None = None
        self.found: list[dict[str, Any]] = []

    @property
    def trusted_step(self) -> int | None:
        """The last step that the run cannot be taken back to before; None where it never is for a spike."""
        return self._detector.trusted_step if self._action == "rewind" else None

    def see(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Judge steps whose numbers have been fetched.

        Args:
            rows: as `Metrics` writes them.
        """
        for row in rows if self._action != "ignore" else ():
            self._spike = self._detector.see(row["step"], row) or self._spike

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Do what is asked for, where a spike has been found.

        Raises:
            Diverged: the run is to be taken back to before it.
        """
        spike, self._spike = self._spike, None
        if spike is None:
            return
        self.found.append(asdict(spike))
        if self._action == "warn":
            self._say(f"warning: a spike: {spike}; train.on_spike=rewind takes a run back to before one")
            return
        # The first step that shows it was computed with what the update of the step before has made of the weights.
        in_a_row = pl_module.step - spike.onset + 2
        raise Diverged(pl_module.step, {spike.figure: spike.value}, "spike", in_a_row, what=f"a spike: {spike}")

    def rewind(self, step: int) -> None:
        """Forget the steps that were undone.

        Args:
            step: optimizer steps completed.
        """
        self._spike = None
        self._detector.forget_after(step)

    def save(self) -> dict[str, Any]:
        """Return what is added to the state of a checkpoint: the steps that the next ones are judged by."""
        return {} if self._action == "ignore" else {_KEY: self._detector.state()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Judge as the run of `checkpoint` would have."""
        self._detector.restore(checkpoint.state().get(_KEY, []))
