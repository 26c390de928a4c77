"""The format of a document in tokens: what precedes its text, what ends it, and special tokens in its text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from orchestrator.errors import ConfigError, DataError

SpecialTokens = Literal["text", "token", "error"]
_MAX_PREFIX = 8


@dataclass(frozen=True)
class DocumentFormat:
    """How documents, and prompts as their beginnings, become tokens.

    Attributes:
        bos_ids: tokens in front of the text; none in stores of before this was an option.
        eos: whether the end-of-text token ends every document. If not, the tokens in front tell documents apart.
        special_tokens_in_text: what special tokens are that the text spells: plain text, the tokens, or an error.
    """

    bos_ids: tuple[int, ...] = ()
    eos: bool = True
    special_tokens_in_text: SpecialTokens = "text"

    def __post_init__(self) -> None:
        if not self.eos and not self.bos_ids:
            raise ConfigError(
                "without a token at either end, documents cannot be told apart",
                got="data.tokenizer.eos=false, and no BOS token is put",
                fix="leave out data.tokenizer.eos=false, or set data.tokenizer.bos=true",
            )

    @property
    def overhead(self) -> int:
        """Tokens of a document beside those of its text."""
        return len(self.bos_ids) + self.eos

    def record(self) -> dict[str, Any]:
        """Convert to what a store or a checkpoint keeps of it."""
        return {
            "bos_ids": list(self.bos_ids),
            "eos": self.eos,
            "special_tokens_in_text": self.special_tokens_in_text,
        }


def from_record(record: object, vocab_size: int) -> DocumentFormat:
    """Read the format that a store or a checkpoint has kept.

    Args:
        record: as `DocumentFormat.record` gives it.
        vocab_size: tokens of the vocabulary.

    Raises:
        DataError: it is damaged.
    """
    if isinstance(record, Mapping):
        bos_ids, eos, spelt = (record.get(key) for key in ("bos_ids", "eos", "special_tokens_in_text"))
        if isinstance(bos_ids, list) and len(bos_ids) <= _MAX_PREFIX and isinstance(eos, bool):
            whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in bos_ids)
            if whole and spelt in get_args(SpecialTokens) and (eos or bos_ids):
                return DocumentFormat(tuple(bos_ids), eos, spelt)  # type: ignore[arg-type]
    raise DataError("the record of how documents became tokens is damaged", got=str(record)[:200])
