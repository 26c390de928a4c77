"""The validation data of a run: what its sources hold out, or data of its own."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.schema import RunConfig
from orchestrator.data.prepare import PreparedData
from orchestrator.data.store import TokenStore
from orchestrator.data.stream import TokenStream, mixture_shares, too_short, windows_of
from orchestrator.errors import DataError

_FEW_TOKENS = 2048  # an evaluation on less is hardly a figure


@dataclass(frozen=True)
class ValidationPart:
    """The validation data of one store.

    Attributes:
        name: of the store, in the user's words.
        store: a token store.
        split: of the store.
        weight: of the store in the mixture.
        tokens: of the split.
        sequences: windows that it has.
    """

    name: str
    store: TokenStore
    split: str
    weight: float
    tokens: int
    sequences: int


@dataclass(frozen=True)
class ValidationData:
    """All validation data of a run.

    Attributes:
        parts: one for each source, or the one of `data.validation`; some may have no sequence.
        seq_len: tokens of a sequence.
        wanted: sequences of an evaluation, where there are as many.
    """

    parts: tuple[ValidationPart, ...]
    seq_len: int
    wanted: int

    @property
    def used(self) -> tuple[ValidationPart, ...]:
        """The parts that have a sequence."""
        return tuple(part for part in self.parts if part.sequences)

    @property
    def sequences(self) -> int:
        """How many an evaluation takes; 0 where there are none."""
        return min(self.wanted, sum(part.sequences for part in self.parts))

    def stream(self, document_mask: bool) -> TokenStream | None:
        """Return the sequences, the same for every seed, so that runs can be compared; None where there are none.

        Args:
            document_mask: whether attention stays within a document.
        """
        parts = self.used
        if not parts:
            return None
        stores, weights = [part.store for part in parts], [part.weight for part in parts]
        return TokenStream(stores, weights, parts[0].split, self.seq_len, 0, document_mask, repeat=False)

    def lines(self) -> list[str]:
        """For the user: what an evaluation consists of, by source."""
        if not self.used:
            return [f"none: {self._held()}; no evaluation is made"]
        total = self.sequences
        places = ", ".join(f"{part.name} ({part.tokens:,} tokens held out)" for part in self.used)
        lines = [f"{total:,} sequences of {self.seq_len:,} tokens, of {places}"]
        lines += [
            f"none of {part.name}: what it holds out ({part.tokens:,} tokens) is shorter than a sequence"
            for part in self.parts
            if not part.sequences
        ]
        return lines

    def problem(self) -> DataError:
        """Make the error of an evaluation that is asked for and has no data."""
        return DataError(
            "there is nothing to evaluate on",
            got=self._held(),
            allowed=f"at least {self.seq_len + 1} tokens of one source (train.seq_len={self.seq_len})",
            fix="name files or a store of their own: data.validation=...; or hold out more with"
            " data.validation_fraction (of a prepared store: when it is prepared); or train.eval_every=null",
        )

    def _held(self) -> str:
        parts = [f"{part.tokens:,} tokens of {part.name}" for part in self.parts]
        return f"held out are {', '.join(parts)}"


def validation_data(config: RunConfig, data: PreparedData) -> ValidationData:
    """Return what a run of `config` is evaluated on.

    Args:
        config: of the run.
        data: the prepared sources of the run.
    """
    seq_len = config.train.seq_len
    if data.validation is not None:
        splits = data.validation.index.splits
        # A store that was prepared for training: what it held out. Else all of it.
        split = "validation" if splits["validation"].tokens else "train"
        parts = [_part(str(config.data.validation), data.validation, split, 1.0, seq_len)]
    else:
        rows = zip(data.names, data.stores, data.weights, strict=True)
        parts = [_part(name, store, "validation", weight, seq_len) for name, store, weight in rows]
    return ValidationData(tuple(parts), seq_len, max(1, config.train.eval_tokens // seq_len))


def check_data(config: RunConfig, data: PreparedData) -> list[str]:
    """Check that the data gives the sequences that a run of `config` takes. Costs nothing.

    Args:
        config: of the run.
        data: the prepared sources of the run.

    Returns:
        Warnings for the user.

    Raises:
        DataError: a source has not one sequence to train on, or an evaluation is wanted and has none.
    """
    for store in data.stores:
        tokens = store.index.splits["train"].tokens
        if not windows_of(tokens, config.train.seq_len):
            raise too_short(store, "train", tokens, config.train.seq_len)
    validation = validation_data(config, data)
    if not validation.used:
        if config.train.eval_every is not None:
            raise validation.problem()
        return []
    tokens = validation.sequences * validation.seq_len
    if tokens < min(_FEW_TOKENS, config.train.eval_tokens):
        return [
            f"validation is on {tokens:,} tokens, too few for more than a rough figure; raise"
            " data.validation_fraction, or name data of its own: data.validation=..."
        ]
    return []


def mixture_lines(data: PreparedData) -> list[str]:
    """Describe the share of the sequences that each source has, where there are several, for the user.

    Args:
        data: the prepared sources of the run.
    """
    if len(data.stores) == 1:
        return []
    lines = []
    for name, weight, share in zip(data.names, data.weights, mixture_shares(data.weights), strict=True):
        asked = "" if abs(share - weight) < 5e-5 else f" (asked for {weight:.2%}: shares are ratios of whole numbers)"
        lines.append(f"{share:.2%} of the sequences from {name}{asked}")
    return lines


def _part(name: str, store: TokenStore, split: str, weight: float, seq_len: int) -> ValidationPart:
    tokens = store.index.splits[split].tokens
    return ValidationPart(name, store, split, weight, tokens, windows_of(tokens, seq_len))
