"""Looking at the model on the way: held-out loss, and text that it writes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch

from orchestrator.config.schema import RunConfig
from orchestrator.data.tokenize import Tokenizer
from orchestrator.models.generate import choose
from orchestrator.observe.metrics import Metrics
from orchestrator.observe.sink import Channel, JsonLines, SideChannels
from orchestrator.strategies.base import ParallelStrategy
from orchestrator.train.module import evaluate
from orchestrator.train.rundir import SAMPLES


class Evaluation(lightning.Callback):
    """Loss and perplexity on the held-out data, every so many steps and at the end; nothing where there is none."""

    def __init__(
        self,
        parallel: ParallelStrategy,
        metrics: Metrics,
        every: int | None,
        batches: Callable[[], Iterable[dict[str, Any]]] | None,
        say: Callable[[str], None],
    ):
        self._parallel, self._metrics, self._every, self._batches, self._say = parallel, metrics, every, batches, say
        self._done_at: int | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        if self._every and pl_module.step % self._every == 0:
            self.run(pl_module)

    def run(self, pl_module: Any) -> None:
        """Evaluate now, unless this step has been."""
        if self._batches is None or self._done_at == pl_module.step:
            return
        self._done_at = pl_module.step
        self._metrics.flush()
        loss = evaluate(pl_module.model, self._parallel, self._batches()).item()
        # exp of a diverged loss does not fit a float.
        perplexity = math.exp(min(loss, 700.0))
        self._metrics.write_evaluation(pl_module.step, val_loss=loss, val_perplexity=perplexity)
        self._say(f"step {pl_module.step}: validation loss {loss:.4f}, perplexity {perplexity:.2f}")
        self._metrics.pause()


class Samples(lightning.Callback):
    """Text that the sharded model writes, all ranks computing together."""

    def __init__(
        self,
        parallel: ParallelStrategy,
        tokenizer: Tokenizer,
        config: RunConfig,
        run_dir: Path,
        metrics: Metrics,
        channels: SideChannels,
    ):
        self._parallel, self._tokenizer, self._config, self._metrics = parallel, tokenizer, config, metrics
        self._kept: Channel[dict[str, Any]] = channels.open(SAMPLES, JsonLines(run_dir / SAMPLES).write, unit="samples")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        every = self._config.train.sample.every_steps
        if every and pl_module.step % every == 0:
            self._metrics.flush()
            self.run(pl_module)
            self._metrics.pause()

    def run(self, pl_module: Any) -> str:
        """Write a sample, keep it, and return prompt and continuation."""
        settings = self._config.train.sample
        ids = self._tokenizer.encode(settings.prompt) or [self._tokenizer.eos_id]
        text = settings.prompt + self._tokenizer.decode(self._continue(pl_module.model, ids)[len(ids) :])
        if self._parallel.rank == 0:
            row = {"step": pl_module.step, "prompt": settings.prompt, "text": text, "time": time.time()}
            self._kept.put([row])
        return text

    @torch.no_grad()
    def _continue(self, model: Any, ids: list[int]) -> list[int]:
        settings, layout = self._config.train.sample, self._parallel.layout
        # One shape for all tokens, padded on the right where causality hides it, so that nothing recompiles.
        split = layout.tensor * layout.context
        longest = self._config.train.seq_len // split * split
        length = min(longest, -(-(len(ids) + settings.tokens) // split) * split)
        generator = torch.Generator().manual_seed(self._config.seed)
        ids = ids[-(length - 1) :]
        model.eval()
        for _ in range(min(settings.tokens, length - len(ids))):
            padded = torch.full((1, length), self._tokenizer.eos_id)
            padded[0, : len(ids)] = torch.tensor(ids)
            positions = torch.arange(length).unsqueeze(0)
            with self._parallel.forward_context():
                logits = model(**self._parallel.prepare_batch({"tokens": padded, "positions": positions})).float()
            # The position is data, not a constant of the program: a traced one then serves every token.
            at = torch.tensor([len(ids) - 1]).to(logits.device)
            last = logits[0].index_select(0, at)[0, : self._tokenizer.vocab_size]
            token = choose(last, settings.temperature, generator)
            ids.append(token)
            if token == self._tokenizer.eos_id:
                break
        model.train()
        return ids
