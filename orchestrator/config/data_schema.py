"""The configuration of training and validation data; `config.schema` hands it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.config.model_schema import Auto


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer of sources that are not prepared stores, and the document format of all."""

    kind: Literal["auto", "bpe", "file", "bytes", "none"] = "auto"  # auto: file where a path is given, else bpe
    vocab_size: int = 4096  # of a trained BPE, special tokens included
    path: str | None = None  # tokenizer.json for kind=file
    bos: bool | Auto = "auto"  # BOS in front of every document and prompt; auto: as the tokenizer's own files say
    bos_token: str | None = None  # another token to put there
    eos: bool | Auto = "auto"  # the end-of-text token after every document; auto: yes
    eos_token: str | None = None  # another token to put there; null: the one that the tokenizer's files name
    special_tokens_in_text: Literal["text", "token", "error"] = "text"  # what a text that spells one means

    @property
    def made_from(self) -> str:
        """`kind`, with `auto` filled in."""
        return self.kind if self.kind != "auto" else "bpe" if self.path is None else "file"


@dataclass(frozen=True)
class TokensConfig:
    """How sources that are tokenized already are read."""

    vocab_size: int | None = None  # ids are below it; null: the tokenizer's
    eos_id: int | None = None  # the token that ends a document; null: the tokenizer's
    dtype: Literal["uint16", "uint32", "int32", "int64"] | None = None  # of files without it; null: as small as fits
    column: str | None = None  # of tables and data sets, which are read as tokens then
    packed: bool = False  # rows are cut from one sequence: documents end at eos_id alone


@dataclass(frozen=True)
class ChatConfig:
    """Conversations (`data.messages=chat`): how they become tokens, which of these the loss counts, and sequences."""

    template: str | None = None  # null: the model's own; simple, chatml, or a file in Jinja
    loss_on: Literal["assistant", "last", "all"] = "assistant"  # what the assistant says, its last message alone, all
    packing: bool = True  # several whole conversations in one sequence
    too_long: Literal["truncate", "drop", "error"] = "truncate"  # conversations longer than train.seq_len
    date: str | None = None  # for templates that write today's: YYYY-MM-DD, so that tokens do not depend on the day
    variables: dict[str, Any] = field(default_factory=dict)  # of the template, such as enable_thinking: false


@dataclass(frozen=True)
class SourceConfig:
    """One source of the training mixture."""

    path: str = "builtin"  # "builtin", a prepared store, or files and folders (glob)
    weight: float = 1.0
    name: str | None = None  # in metrics and reports; None: made of the path
    text_field: str | None = None  # of this source's rows; None: as in data.text_field and data.text_template
    text_template: str | None = None
    reader: dict[str, Any] = field(default_factory=dict)  # of one's own, for this source; {}: data.reader


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data."""

    name: str = "builtin"
    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    tokenizer: TokenizerConfig = TokenizerConfig()
    tokens: TokensConfig = TokensConfig()
    validation_fraction: float = 0.02  # of the tokens, held out
    # Files or a store to evaluate on, or several sets by name; then nothing is held out of the sources.
    validation: str | dict[str, str] | None = None
    document_mask: bool = True  # attention does not cross documents packed into one sequence
    text_field: str = "text"  # field of rows (JSON, CSV, Parquet, Arrow); text.content: of a nested object
    text_template: str | None = None  # several fields instead: "{title}\\n\\n{body}"
    messages: Literal["plain", "chat", "preference"] | None = None  # what rows of messages become; preference: pairs
    chat: ChatConfig = ChatConfig()
    on_null: Literal["error", "skip"] = "error"  # rows whose field is null or missing
    reader: dict[str, Any] = field(default_factory=dict)  # of one's own, by _target_; {}: files are read by format
    transform: dict[str, Any] = field(default_factory=dict)  # of every document, by _target_; {}: none
    skip: tuple[tuple[int, int], ...] = ()  # ranges of training sequences to leave out: first, and behind the last
    cache_dir: str | Auto = "auto"
    workers: int | Auto = "auto"  # threads that tokenise
    prefetch: int = 2  # steps read ahead by the training process
