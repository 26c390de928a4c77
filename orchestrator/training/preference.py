"""Direct preference optimization (DPO): the gradients of a step of pairs, on every layout.

Rafailov et al. 2023, arXiv 2305.18290. A sequence of a batch holds pairs of responses, each a document of its own: the
prompt and the chosen response, then the prompt and the rejected one. A step has two passes. The first, without
gradients, gives the log-probability of each response. From these follow the loss of each pair and its derivative by the
log-probabilities; with that as the weight of each target the gradient of the cross-entropy, which every strategy
computes, is DPO's exactly. What the reference model makes of the responses is known before, or asked in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from orchestrator.config.schema import PreferenceConfig, RunConfig
from orchestrator.constants import IGNORE_INDEX
from orchestrator.data.pairs import NO_RESPONSE, RESPONSES
from orchestrator.distributed import standing
from orchestrator.errors import ConfigError
from orchestrator.models.protocol import ShardableModel
from orchestrator.strategies.parallel_strategy import ParallelStrategy, StepHooks
from orchestrator.training.live_reference import LiveReference
from orchestrator.training.reference_scores import ReferenceScores

FIGURES = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")
_SUMS = ("loss", *FIGURES, "pairs")
_SOURCES = "sources"  # of a batch, where there are several

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """The responses of a batch's pairs.

    Attributes:
        keys: of each pair, a digest of its tokens and targets.
        logps: [pairs, 2] fp64, log-probabilities of the chosen and of the rejected response.
        lengths: [pairs, 2], target tokens of these.
        place: [B, T], index into the flattened responses; -1 where there is none.
        rows: [pairs], the sequence of each pair.
    """

    keys: list[bytes]
    logps: np.ndarray
    lengths: np.ndarray
    place: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, batch: Arrays, losses: np.ndarray) -> Pairs:
        """Sum what each response of a batch has.

        Args:
            batch: its arrays.
            losses: [B, T], of its targets; 0 where there is none.
        """
        responses = batch[RESPONSES]
        # Of a sequence that fills up a batch nothing counts.
        has = (responses != NO_RESPONSE) & (batch["targets"] != IGNORE_INDEX).any(1, keepdims=True)
        # A pair that comes twice in a batch is in two of its sequences.
        stride = 2 + int(responses.max(initial=0)) // 2 * 2
        row = np.arange(len(responses), dtype=np.int64)[:, None] * stride
        keys, which = np.unique((responses + row)[has], return_inverse=True)
        assert not (keys[1::2] - keys[::2] - 1).any(), "the responses of a pair are in one sequence"
        counts = batch["targets"][has] != IGNORE_INDEX
        logps = -np.bincount(which, weights=losses[has].astype(np.float64), minlength=keys.size)
        lengths = np.bincount(which, weights=counts, minlength=keys.size)
        place = np.full(responses.shape, -1, dtype=np.int64)
        place[has] = which
        order = np.argsort(which, kind="stable")
        content = np.stack((batch["tokens"][has][order], batch["targets"][has][order], which[order] % 2), -1)
        ends = np.cumsum(np.bincount(which // 2))[:-1]
        digests = [_digest(part) for part in np.split(content, ends)] if keys.size else []
        return cls(digests, logps.reshape(-1, 2), lengths.reshape(-1, 2), place, keys[::2] // stride)

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Return a value for each position, 0 where there is no response: fp32 [B, T].

        Args:
            values: [pairs, 2].
        """
        return np.append(values.reshape(-1), 0.0).astype(np.float32)[self.place]


def _digest(content: np.ndarray) -> bytes:
    return hashlib.blake2b(content.astype("<i8").tobytes(), digest_size=16).digest()


def pair_losses(
    config: PreferenceConfig, logps: np.ndarray, reference: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each pair [pairs] and its derivative by the log-probabilities [pairs, 2].

    Args:
        config: which loss, and its settings.
        logps: [pairs, 2], of the chosen and of the rejected response.
        reference: the same, of the reference model.
        lengths: [pairs, 2], target tokens.

    The sources are Rafailov et al. (sigmoid; smoothed as in their section on noisy preferences, and by Mitchell 2023),
    Azar et al. 2023, arXiv 2310.12036 (ipo; of means over the tokens), and Zhao et al. 2023, arXiv 2305.10425 (hinge).
    """
    beta = config.beta
    scale = 1.0 / np.maximum(lengths, 1.0) if config.loss == "ipo" else np.ones_like(logps)
    ratios = (logps - reference) * scale
    delta = ratios[:, 0] - ratios[:, 1]
    if config.loss == "ipo":
        losses, slopes = (delta - 0.5 / beta) ** 2, 2.0 * (delta - 0.5 / beta)
    elif config.loss == "hinge":
        losses, slopes = np.maximum(0.0, 1.0 - beta * delta), np.where(beta * delta < 1.0, -beta, 0.0)
    else:
        wrong = config.label_smoothing  # how likely a label is the wrong way round
        losses = (1.0 - wrong) * np.logaddexp(0.0, -beta * delta) + wrong * np.logaddexp(0.0, beta * delta)
        slopes = beta * (np.exp(-np.logaddexp(0.0, -beta * delta)) - (1.0 - wrong))
    return losses, np.stack((slopes, -slopes), -1) * scale


def without_preferences(config: RunConfig) -> RunConfig:
    """Return the configuration of a run whose step is the second pass alone: what needs most, for a rehearsal.

    Args:
        config: of a run.

    Raises:
        ConfigError: the run has a second model, which that is not.
    """
    if config.train.preference.holds_copy(config.train.lora):
        raise ConfigError(
            "a rehearsal knows the model that is trained, and not the reference beside it",
            got="train.preference.reference=live",
            fix="set train.preference.reference=cached, and add 4 bytes for each parameter that a device holds",
        )
    return replace(config, train=replace(config.train, preference=PreferenceConfig()))


class Preferences:
    """The step of a run that learns from preferences.

    Args:
        config: of the run, settled.
        parallel: the strategy.

    Attributes:
        reference: what the reference model makes of the pairs, where that is computed once.
        live: the reference model, where it is asked in every step; else None.
        held_out: figures of the last evaluation.
    """

    def __init__(self, config: RunConfig, parallel: ParallelStrategy):
        self._config, self._parallel = config.train.preference, parallel
        self.reference = ReferenceScores()
        self.live = LiveReference(config, parallel) if self._config.reference == "live" else None
        self.held_out: dict[str, float] = {}

    def score(self, model: ShardableModel, batch: Arrays, micro_batch: int, begin: Callable[[int, int], None]) -> Pairs:
        """Return the log-probabilities of this rank's pairs, without gradients. All ranks call it together.

        Args:
            model: placed, in its mode of training or evaluation.
            batch: arrays of this rank's sequences.
            micro_batch: sequences of a forward pass.
            begin: called before each, as `StepHooks.begin`, so that both passes draw the same dropout.
        """
        seen = {name: value for name, value in batch.items() if name != RESPONSES}
        losses = []
        for number, at in enumerate(range(0, len(batch["tokens"]), micro_batch)):
            begin(number, 0)
            part = {name: value[at : at + micro_batch] for name, value in seen.items()}
            losses.append(self._parallel.token_scores(model, part).losses.numpy())
        return Pairs.of(batch, np.concatenate(losses))

    def refer(self, model: ShardableModel, batch: Arrays, micro_batch: int, pairs: Pairs) -> np.ndarray:
        """Return the reference model's log-probabilities of this rank's pairs [pairs, 2]. All ranks call it together.

        Args:
            model: that of the run, placed.
            batch: arrays of this rank's sequences.
            micro_batch: sequences of a forward pass.
            pairs: of the batch.
        """
        if self.live is None:
            return self.reference.look_up(pairs.keys)
        with self.live.asked(model) as reference:
            return self.score(reference, batch, micro_batch, lambda micro_batch, part: None).logps

    def judge(self, pairs: Pairs, reference: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Return what is summed of this rank's pairs, [pairs, `_SUMS`], and the derivative of the summed losses.

        Args:
            pairs: of this rank.
            reference: the reference model's log-probabilities of them.
        """
        losses, slopes = pair_losses(self._config, pairs.logps, reference, pairs.lengths)
        rewards = self._config.beta * (pairs.logps - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        columns = [losses, *rewards.T, margins, margins > 0, np.ones_like(losses)]
        return torch.from_numpy(np.stack(columns, -1)), slopes

    def evaluate(self, model: ShardableModel, batches: Iterable[Arrays], sets: Sequence[int]) -> Tensor:
        """Return the mean loss over the pairs of `batches`, and over those of each set. All ranks call it together.

        Args:
            model: placed, in evaluation.
            batches: of this rank.
            sets: the number of the set of each batch; empty: they are one.
        """
        sums = torch.zeros(max(sets, default=0) + 1, len(_SUMS))
        for number, batch in enumerate(batches):
            standing.mark()
            rows = len(batch["tokens"])
            pairs = self.score(model, batch, rows, lambda micro_batch, part: None)
            sums[sets[number] if sets else 0] += self.judge(pairs, self.refer(model, batch, rows, pairs))[0].sum(0)
        found = [self.sum(row) for row in (sums.sum(0), *sums)]
        names = FIGURES[2:]
        values = self._parallel.fetch([found[0][name] for name in names])
        self.held_out = {f"val_{name}": value for name, value in zip(names, values, strict=True)}
        return torch.stack([row["loss"] for row in found])

    def sum(self, sums: Tensor) -> dict[str, Tensor]:
        """Return the means over the pairs of all ranks: `loss` and `FIGURES`; and `pairs`, how many they are.

        Args:
            sums: [`_SUMS`], of this rank.
        """
        whole = self._parallel.sum_over_data(self._parallel.once_per_row(sums.to(self._parallel.root_device)))
        found = dict(zip(_SUMS, whole.unbind(), strict=True))
        return {
            name: value if name == "pairs" else value / found["pairs"].clamp(min=1) for name, value in found.items()
        }

    def forward_backward(
        self, model: ShardableModel, batch: Arrays, micro_batch: int, hooks: StepHooks
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Compute the gradients of the mean loss of the pairs of a step. All ranks call it together.

        Args:
            model: placed.
            batch: arrays of this rank's sequences.
            micro_batch: sequences of a forward pass.
            hooks: called on the way; `begin` in both passes.

        Returns:
            This rank's part of the weighted cross-entropy, as `reduce_and_clip` takes it; the number of target tokens
            of the step; and what `sum` returns.
        """
        parallel = self._parallel
        pairs = self.score(model, batch, micro_batch, hooks.begin)
        judged, slopes = self.judge(pairs, self.refer(model, batch, micro_batch, pairs))
        found = self.sum(judged.sum(0).float())
        arrays = {name: value for name, value in batch.items() if name not in (RESPONSES, _SOURCES)}
        if _SOURCES in batch and (told := model.head.source_losses) is not None:
            sources = torch.from_numpy(batch[_SOURCES][pairs.rows, :1].T)
            rows = [tensor.to(parallel.root_device) for tensor in (judged[:, 0].float()[None], sources)]
            told.add(rows[0], torch.zeros_like(rows[1]), rows[1])
        # A target's cross-entropy is minus its part of the log-probability.
        placed = parallel.prepare_batch({**arrays, "weights": pairs.spread(-slopes)})
        targets = parallel.sum_over_data((placed["targets"] != IGNORE_INDEX).sum()).clamp(min=1)
        # The routers' losses are means over the targets, so these divide, and the weights have it the other way round.
        placed["weights"] = placed["weights"] * (targets / found["pairs"].clamp(min=1))
        part = parallel.forward_backward(model, placed, micro_batch, targets, hooks)
        return part, targets, found
