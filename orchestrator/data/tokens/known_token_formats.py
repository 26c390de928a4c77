"""The table of formats that hold tokens: how each is read, and what ends a document."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.data.formats.reading import Input
from orchestrator.data.tokens import columns, flat, litdata_tokens, mds_tokens, megatron
from orchestrator.data.tokens.token_reader import TokenRow, TokenSpec

_BY_ROW, _BY_TOKEN = "by rows", "by the end-of-text token"


@dataclass(frozen=True)
class TokenFormat:
    """A format of tokens.

    Attributes:
        read: the documents or rows of an input.
        delimited: what makes a document, for people.
    """

    read: Callable[[Input, TokenSpec], Iterator[TokenRow]]
    delimited: str


TOKEN_FORMATS: dict[str, TokenFormat] = {
    "megatron": TokenFormat(lambda item, spec: megatron.read(item.files), "by Megatron's index"),
    "nanogpt": TokenFormat(lambda item, spec: flat.read_nanogpt(item.files, spec), _BY_TOKEN),
    "llmc": TokenFormat(lambda item, spec: flat.read_llmc(item.files, spec), _BY_TOKEN),
    "numpy": TokenFormat(lambda item, spec: flat.read_numpy(item.files, spec), _BY_TOKEN),
    "mds": TokenFormat(lambda item, spec: mds_tokens.read(item.path, spec), _BY_ROW),
    "mds-tokens": TokenFormat(lambda item, spec: mds_tokens.read(item.path, spec), _BY_ROW),
    "litdata": TokenFormat(lambda item, spec: litdata_tokens.read(item.path), _BY_ROW),
    "litdata-tokens": TokenFormat(lambda item, spec: litdata_tokens.read(item.path), _BY_ROW),
    "parquet": TokenFormat(lambda item, spec: columns.read_parquet(item.files, spec), _BY_ROW),
    "arrow": TokenFormat(lambda item, spec: columns.read_arrow(item.files, spec), _BY_ROW),
    "save_to_disk": TokenFormat(lambda item, spec: columns.read_arrow(item.files, spec), _BY_ROW),
}
