"""Evaluate during training: loss on held-out data, and samples of text."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np

from orchestrator.config.schema import RunConfig
from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.stream import TokenStream
from orchestrator.data.tokenize import Tokenizer
from orchestrator.data.validation_sets import ValidationBatches
from orchestrator.distributed import standing
from orchestrator.inference.decoding import Decoding, TextRequest
from orchestrator.inference.place import LayoutPlace
from orchestrator.inference.sampling import Sampling
from orchestrator.observe.metrics import Metrics
from orchestrator.observe.progress import Progress
from orchestrator.observe.sink import Channel, JsonLines, SideChannels
from orchestrator.optim.steps import evaluated
from orchestrator.runs.messages import warn
from orchestrator.runs.run_directory import SAMPLES
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.divergence import Diverged

_OPENING_TOKENS = 16
_LONGEST_PROMPT = 512


def opening(stream: TokenStream) -> list[int]:
    """Return tokens to continue: of the second document in the first sequence of `stream`, if it has two.

    Of a text they are its first ones, of a conversation all up to the first that counts: the answer.

    Args:
        stream: of the data that is shown.
    """
    sequence = stream.sequence(0)
    tokens, counts = sequence["tokens"], sequence["targets"] != IGNORE_INDEX
    edges = [*np.flatnonzero(sequence["positions"] == 0).tolist(), len(tokens)]
    # What fills up a sequence counts nowhere.
    spans = [(a, b) for a, b in itertools.pairwise(edges) if counts[a:b].any()] or [(0, len(tokens))]
    begin, end = spans[min(1, len(spans) - 1)]
    if not counts[begin] and 0 < (answer := int(counts[begin:end].argmax())) < _LONGEST_PROMPT:
        return [int(token) for token in tokens[begin : begin + answer + 1]]
    end -= end < len(tokens)  # what ends a document is left out
    return [int(token) for token in tokens[begin : min(max(end, begin + 1), begin + _OPENING_TOKENS)]]


class Validation(lightning.Callback):
    """Evaluates loss and perplexity on the held-out data, every so many steps and at the end, if there is any.

    With several sets, of names or of sources, each has a loss of its own, too: `val_loss/NAME`. Where an average of the
    weights is kept, it is evaluated on the same data: `val_loss_ema`.

    Args:
        metrics: gets a row per evaluation.
        every: steps between evaluations; None: only when asked.
        batches: this rank's; None where there is no data.
        say: prints a line.
        progress: shows the batches; None: not shown.

    Attributes:
        latest: the last step after which it was evaluated, and the loss.
    """

    def __init__(
        self,
        metrics: Metrics,
        every: int | None,
        batches: ValidationBatches | None,
        say: Callable[[str], None],
        progress: Progress | None = None,
    ):
        self._metrics, self._every, self._batches, self._say = metrics, every, batches, say
        self._progress = progress
        self._done_at: int | None = None
        self.latest = (0, math.nan)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Evaluate where a period ends."""
        if self._every and pl_module.step % self._every == 0:
            self.run(pl_module)

    def only_asked(self) -> None:
        """Evaluate when `run` is called, and else never."""
        self._every = None

    def rewind(self) -> None:
        """Forget what was evaluated: the steps come again, with other weights."""
        self._done_at = None

    def run(self, pl_module: Any) -> None:
        """Evaluate now, unless this step has been.

        Args:
            pl_module: the `LanguageModule`.

        Raises:
            Diverged: the loss is not finite.
        """
        if self._batches is None or self._done_at == pl_module.step:
            return
        self._done_at = pl_module.step
        self._metrics.flush()
        shown = self._progress.watch("validating", self._batches) if self._progress else self._batches
        of_average: dict[str, float] = {}
        with standing.within(standing.EVALUATING):
            loss, *of_sets = pl_module.evaluate(shown, self._batches.numbers).tolist()
            figures, also = _further(pl_module, loss)
            if pl_module.average is not None:
                with pl_module.average.in_place():
                    of_average["val_loss_ema"] = pl_module.evaluate(self._batches)[0].item()
        labels = self._batches.labels
        each = dict(zip(labels, of_sets, strict=True)) if len(labels) > 1 else {}
        own = {f"val_loss/{label}": value for label, value in each.items()}
        self._metrics.write_evaluation(pl_module.step, val_loss=loss, **figures, **own, **of_average)
        more = f" ({', '.join(f'{label} {value:.4f}' for label, value in each.items())})" if each else ""
        more += "".join(f", of the average {value:.4f}" for value in of_average.values())
        self._say(f"step {pl_module.step}: validation loss {loss:.4f}, {also}{more}")
        self._metrics.pause()
        if not math.isfinite(loss):
            raise Diverged(pl_module.step, {"val_loss": loss}, "validation")
        self.latest = (pl_module.step, loss)


def _further(pl_module: Any, loss: float) -> tuple[dict[str, float], str]:
    """Return what is recorded beside the loss, and said: the perplexity, or of pairs how many are told apart."""
    if pl_module.preferences is not None:
        figures = pl_module.preferences.held_out
        return figures, f"{figures['val_reward_accuracy']:.1%} of the pairs told apart"
    perplexity = math.exp(min(loss, 700.0))  # exp of a diverged loss does not fit a float
    return {"val_perplexity": perplexity}, f"perplexity {perplexity:.2f}"


class Samples(lightning.Callback):
    """Generates text during training, all ranks computing together.

    Args:
        parallel: the strategy.
        tokenizer: of the data.
        config: of the run.
        run_dir: the run's directory.
        metrics: flushed before a sample, and paused during it.
        channels: those of the run; samples are one of them.
        opening: tokens to continue where the configuration names no prompt.
    """

    def __init__(
        self,
        parallel: ParallelStrategy,
        tokenizer: Tokenizer,
        config: RunConfig,
        run_dir: Path,
        metrics: Metrics,
        channels: SideChannels,
        opening: Sequence[int],
    ):
        self._parallel, self._tokenizer, self._config, self._metrics = parallel, tokenizer, config, metrics
        self._opening, self._written = list(opening), (-1, "")
        self._kept: Channel[dict[str, Any]] = channels.open(SAMPLES, JsonLines(run_dir / SAMPLES).write, unit="samples")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Write a sample where a period ends."""
        every = self._config.train.sample.every_steps
        if every and pl_module.step % every == 0:
            self._metrics.flush()
            self.run(pl_module)
            self._metrics.pause()

    def rewind(self) -> None:
        """Forget what was written: the steps come again, with other weights."""
        self._written = (-1, "")

    def run(self, pl_module: Any) -> str | None:
        """Write a sample, keep it, and return prompt and continuation; None where samples are off or none came out.

        What goes wrong on all ranks alike ends no training. Where one rank alone fails the others wait for it, and the
        run ends.

        Args:
            pl_module: the `LanguageModule`.
        """
        settings = self._config.train.sample
        if not settings.tokens:
            return None
        if self._written[0] == pl_module.step:
            return self._written[1]
        prompt, text, problem = settings.prompt, "", None
        try:
            with evaluated(getattr(pl_module, "optimizer", None)), standing.within(standing.EVALUATING):
                prompt, text = self._sample(pl_module.model)
        except Exception as error:
            problem = error
        if self._parallel.any_raised(problem is not None):
            if self._parallel.rank == 0:
                warn(f"the sample of step {pl_module.step} failed: {getattr(problem, 'what', None) or repr(problem)}")
            return None
        if self._parallel.speaks:
            self._kept.put([{"step": pl_module.step, "prompt": prompt, "text": text, "time": time.time()}])
        self._written = (pl_module.step, text)
        return text

    def _sample(self, model: Any) -> tuple[str, str]:
        prompt, ids = self._config.train.sample.prompt, self._opening
        if prompt is None:
            prompt = self._tokenizer.decode(ids)
        else:
            ids = self._tokenizer.prompt_ids(prompt)
        ids = ids or [self._tokenizer.eos_id]
        return prompt, prompt + self._tokenizer.decode_after(ids, self._continue(model, ids))

    def _continue(self, model: Any, ids: list[int]) -> list[int]:
        """Return the tokens that follow on the last of `ids`; together they are no longer than what is trained on."""
        settings, longest = self._config.train.sample, self._config.train.seq_len
        ids = ids[-max(1, longest - 1) :]
        count, ends = min(settings.tokens, longest - len(ids)), {self._tokenizer.eos_id}
        request = TextRequest(ids, count, Sampling(settings.temperature), self._config.seed, ends)
        decoding = Decoding(LayoutPlace(model, self._parallel), [request], vocabulary=self._tokenizer.vocab_size)
        return [token for _, token in decoding if token is not None]
