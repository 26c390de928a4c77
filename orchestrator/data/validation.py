"""The validation data of a run: what its sources hold out, or data of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.schema import ChatConfig, RunConfig
from orchestrator.data.prepare import PreparedData
from orchestrator.data.sequences import store_rows, too_short
from orchestrator.data.source_figures import labels_of
from orchestrator.data.store import TokenStore
from orchestrator.data.stream import TokenStream, mixture_shares
from orchestrator.data.validation_sets import ValidationSet
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
        sequences: that it has.
        label: in metrics.
    """

    name: str
    store: TokenStore
    split: str
    weight: float
    tokens: int
    sequences: int
    label: str = ""


@dataclass(frozen=True)
class ValidationData:
    """All validation data of a run.

    Attributes:
        parts: one for each source, or for each set of `data.validation`; some may have no sequence.
        seq_len: tokens of a sequence.
        wanted: sequences of an evaluation, where there are as many.
        named: the parts are sets with names of their own, and `wanted` is of each.
        chat: how conversations become sequences.
    """

    parts: tuple[ValidationPart, ...]
    seq_len: int
    wanted: int
    named: bool = False
    chat: ChatConfig = ChatConfig()

    @property
    def used(self) -> tuple[ValidationPart, ...]:
        """The parts that have a sequence."""
        return tuple(part for part in self.parts if part.sequences)

    @property
    def sequences(self) -> int:
        """How many an evaluation takes; 0 where there are none."""
        if self.named:
            return sum(min(self.wanted, part.sequences) for part in self.parts)
        return min(self.wanted, sum(part.sequences for part in self.parts))

    def sets(self, document_mask: bool) -> tuple[ValidationSet, ...]:
        """Return the sequences by set: of each name, or of what each source holds out; nothing where there are none.

        Args:
            document_mask: whether attention stays within a document.
        """
        if self.named:
            streams = [(part, self._stream((part,), document_mask)) for part in self.used]
            return tuple(
                ValidationSet(part.label, stream, range(min(self.wanted, part.sequences))) for part, stream in streams
            )
        stream = self.stream(document_mask)
        if stream is None:
            return ()
        parts, indices = self.used, range(self.sequences)
        if len(parts) == 1:
            return (ValidationSet(parts[0].label, stream, indices),)
        places = [stream.locate(index)[0] for index in indices]
        return tuple(
            ValidationSet(part.label, stream, [index for index in indices if places[index] == number])
            for number, part in enumerate(parts)
            if number in places
        )

    def stream(self, document_mask: bool) -> TokenStream | None:
        """Return the sequences, the same for every seed, so that runs can be compared; None where there are none.

        Where the sets have names it is the first one's.

        Args:
            document_mask: whether attention stays within a document.
        """
        parts = self.used[:1] if self.named else self.used
        return self._stream(parts, document_mask) if parts else None

    def _stream(self, parts: Sequence[ValidationPart], document_mask: bool) -> TokenStream:
        stores, weights = [part.store for part in parts], [part.weight for part in parts]
        return TokenStream(stores, weights, parts[0].split, self.seq_len, 0, document_mask, False, self.chat)

    def lines(self) -> list[str]:
        """For the user: what an evaluation consists of, by source."""
        if not self.used:
            return [f"none: {self._held()}; no evaluation is made"]
        total = self.sequences
        held = "" if self.named else " held out"
        places = ", ".join(f"{part.name} ({part.tokens:,} tokens{held})" for part in self.used)
        lines = [f"{total:,} sequences of {self.seq_len:,} tokens, of {places}"]
        lines += [
            f"none of {part.name}: what it {'has' if self.named else 'holds out'} ({part.tokens:,} tokens) is shorter"
            " than a sequence"
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
    seq_len, named = config.train.seq_len, bool(data.validation) and "" not in data.validation
    chat = config.data.chat
    if data.validation:
        parts = []
        for name, store in data.validation.items():
            # A store that was prepared for training: what it held out. Else all of it.
            split = "validation" if store.index.splits["validation"].tokens else "train"
            parts.append(_part(name or str(config.data.validation), store, split, 1.0, seq_len, name, chat))
    else:
        rows = zip(data.names, data.stores, data.weights, labels_of(data.names), strict=True)
        parts = [_part(name, store, "validation", weight, seq_len, label, chat) for name, store, weight, label in rows]
    return ValidationData(tuple(parts), seq_len, max(1, config.train.eval_tokens // seq_len), named, chat)


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
    for store in (*data.stores, *data.validation.values()):
        _check_kind(config, store)
    for store in data.stores:
        if not len(store_rows(store, "train", config.train.seq_len, config.data.chat)):
            raise too_short(store, "train", config.train.seq_len)
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


def _check_kind(config: RunConfig, store: TokenStore) -> None:
    """See that there are pairs of responses where these are learnt from, and only there."""
    loss = config.train.preference.loss
    if store.holds_pairs and loss is None:
        raise DataError(
            "the data is pairs of responses, and the run does not learn from preferences",
            got=f"{store.path}, train.preference.loss=null",
            fix="set train.preference.loss=sigmoid; or train on text or conversations",
        )
    if loss is not None and not store.holds_pairs:
        raise DataError(
            "the run learns from preferences, and the data has no pairs of responses",
            got=f"{store.path}, train.preference.loss={loss}",
            allowed="rows with prompt, chosen and rejected, or a store that was prepared from such",
            fix="set data.messages=preference; or leave out train.preference.loss",
        )


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


def packing_lines(data: PreparedData, seq_len: int, chat: ChatConfig) -> list[str]:
    """Describe how conversations became training sequences, where there are some, for the user.

    Args:
        data: the prepared sources of the run.
        seq_len: tokens of a sequence.
        chat: how conversations become sequences.
    """
    several = len(data.stores) > 1
    rows = [
        (name, store_rows(store, "train", seq_len, chat)) for name, store in zip(data.names, data.stores, strict=True)
    ]
    return [f"{name}: {line}" if several else line for name, part in rows for line in part.lines()]


def _part(
    name: str, store: TokenStore, split: str, weight: float, seq_len: int, label: str, chat: ChatConfig
) -> ValidationPart:
    tokens = store.index.splits[split].tokens
    return ValidationPart(name, store, split, weight, tokens, len(store_rows(store, split, seq_len, chat)), label)
