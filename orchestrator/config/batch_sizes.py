"""The size of the global batch at each step: a function of the configuration. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.train_schema import TrainConfig


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of the global batch, in tokens or sequences.

    Attributes:
        stages: of the warm-up: the step behind each stage, and the size in it.
        last: the size from then on.
    """

    stages: tuple[tuple[int, int], ...]
    last: int

    @classmethod
    def of(cls, train: TrainConfig) -> BatchSizes:
        """Return the sizes in tokens.

        Args:
            train: of a run.
        """
        stages, end = [], 0
        for stage in train.batch_warmup:
            end += stage.steps
            stages.append((end, stage.tokens))
        return cls(tuple(stages), train.global_batch_tokens)

    def divided(self, by: int) -> BatchSizes:
        """Return the sizes in units of `by`.

        Args:
            by: such as the tokens of a sequence.
        """
        return BatchSizes(tuple((end, size // by) for end, size in self.stages), self.last // by)

    @property
    def all(self) -> tuple[int, ...]:
        """Every size that there is, in the order of the steps."""
        return tuple(dict.fromkeys([*(size for _, size in self.stages), self.last]))

    def at(self, step: int) -> int:
        """Return the size of the step that follows `step` completed ones.

        Args:
            step: completed steps.
        """
        return next((size for end, size in self.stages if step < end), self.last)

    def upto(self, step: int) -> int:
        """Return the sum over the first steps.

        Args:
            step: how many.
        """
        total, begin = 0, 0
        for end, size in self.stages:
            total += size * max(0, min(step, end) - begin)
            begin = end
        return total + self.last * max(0, step - begin)

    def steps_of(self, amount: int) -> int:
        """Return the fewest steps whose sum is at least `amount`.

        Args:
            amount: of tokens or sequences.
        """
        begin = 0
        for end, size in self.stages:
            if amount <= size * (end - begin):
                return begin + -(-amount // size)
            amount -= size * (end - begin)
            begin = end
        return begin + -(-amount // self.last)

    def behind(self, step: int) -> BatchSizes:
        """Return what is left of the sizes behind `step` completed steps, to compare.

        Args:
            step: completed steps.
        """
        left = [(end, size) for end, size in self.stages if end > step]
        while left and left[-1][1] == self.last:
            left.pop()
        return BatchSizes(tuple(left), self.last)
