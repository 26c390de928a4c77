"""Tasks on the model of a checkpoint, or of a training: rank 0 leads, all compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.data.tokenize import Tokenizer
from orchestrator.evaluation.relay import Relay
from orchestrator.evaluation.scoring import Scorer, pack_texts, unpack_texts
from orchestrator.models.protocol import ShardableModel
from orchestrator.strategies.parallel_strategy import ParallelStrategy

if TYPE_CHECKING:
    from orchestrator.evaluation.harness_model import HarnessModel


@dataclass(frozen=True)
class Evaluated:
    """A model that is asked, on all processes of a job.

    Attributes:
        model: placed.
        parallel: the strategy that has placed it.
        tokenizer: of the model.
        longest: tokens that it takes at most.
        batch_tokens: of a batch of each data-parallel group, about.
        bos: put BOS in front of a text; None: as the documents began that it was trained on.
        facts: of the model, for the file of results.
        heard: called with the number of texts that a batch had.
    """

    model: ShardableModel
    parallel: ParallelStrategy
    tokenizer: Tokenizer
    longest: int
    batch_tokens: int = 8192
    bos: bool | None = None
    facts: Mapping[str, Any] | None = None
    heard: Callable[[int], object] = lambda count: None

    def lead(self, work: Callable[[HarnessModel], dict[str, Any]]) -> dict[str, Any] | None:
        """Do `work` with a model of lm-eval's on rank 0. All processes call it together.

        Args:
            work: what is asked of the model.

        Returns:
            What `work` returned; None on the other processes.
        """
        scorer = Scorer(self.model, self.parallel, self.longest, self.batch_tokens, self.heard)
        relay: Relay[dict[str, Any]] = Relay(self.parallel, {"score": lambda packed: scorer(unpack_texts(packed))})

        def ask() -> dict[str, Any]:
            from orchestrator.evaluation.harness_model import HarnessModel

            facts = dict(self.facts or {})
            score = lambda texts: relay.call("score", pack_texts(texts))  # noqa: E731
            return work(HarnessModel(self.tokenizer, score, self.longest, bos=self.bos, facts=facts))

        return relay.lead(ask)
