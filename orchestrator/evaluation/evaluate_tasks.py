"""Tasks on the model of a checkpoint, or of a training: rank 0 leads, all compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.data.tokenize import Tokenizer
from orchestrator.evaluation.scoring import ScoredText, Scorer, TextScore, pack_texts, unpack_texts
from orchestrator.evaluation.writing import TaskWriter, WritingRequest
from orchestrator.models.protocol import ShardableModel
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.strategies.relay import Relay

if TYPE_CHECKING:
    from orchestrator.evaluation.harness_model import HarnessModel

Score = Callable[[Sequence[ScoredText]], list[TextScore]]
Result = TypeVar("Result")


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

    def lead_scores(self, work: Callable[[Score], Result]) -> Result | None:
        """Do `work` on rank 0, which scores texts on all processes. All of them call this together.

        Args:
            work: what is done with what scores texts.

        Returns:
            What `work` returned; None on the other processes.
        """
        relay = self._relay()
        return relay.lead(lambda: work(lambda texts: relay.call("score", pack_texts(texts))))

    def lead_harness(self, work: Callable[[HarnessModel], Result]) -> Result | None:
        """Do `work` with a model of lm-eval's on rank 0. All processes call it together.

        Args:
            work: what is asked of the model.

        Returns:
            What `work` returned; None on the other processes.
        """
        relay = self._relay()

        def ask() -> Result:
            from orchestrator.evaluation.harness_model import HarnessModel

            score: Score = lambda texts: relay.call("score", pack_texts(texts))  # noqa: E731
            write = lambda fields: relay.call("write", fields)  # noqa: E731
            facts = dict(self.facts or {})
            return work(HarnessModel(self.tokenizer, score, write, self.longest, bos=self.bos, facts=facts))

        return relay.lead(ask)

    def _relay(self) -> Relay:
        scorer = Scorer(self.model, self.parallel, self.longest, self.batch_tokens, self.heard)
        writer = TaskWriter(self.model, self.parallel, self.tokenizer, heard=self.heard)
        return Relay(
            self.parallel,
            {
                "score": lambda packed: scorer(unpack_texts(packed)),
                "write": lambda fields: writer(WritingRequest.from_dict(fields)),
            },
        )
