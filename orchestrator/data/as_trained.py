"""Rewrite tokenizer files so that they describe the documents that a model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.config.schema import TokenizerConfig
from orchestrator.data.model_files import (
    GENERATION_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from orchestrator.data.tokenize import Tokenizer, from_files
from orchestrator.data.tokenizer_files import Beside, parse_json, set_template_prefix, stop_ids


def as_trained(files: Mapping[str, bytes], tokenizer: Tokenizer) -> tuple[dict[str, bytes], list[str]]:
    """Return the files with which other software begins and ends a text as the model was trained.

    Args:
        files: that travelled with the model, by name.
        tokenizer: from them, with the documents that the model was trained on.

    Returns:
        The same files where they say so already, byte by byte; and a sentence for each change that was made.
    """
    result, notes = dict(files), []
    said = from_files(files, TokenizerConfig())
    bos_ids = tokenizer.documents.bos_ids
    if bos_ids != said.documents.bos_ids:
        content = parse_json(files[TOKENIZER_FILE], TOKENIZER_FILE)
        names = {tokenizer.token_of(number): number for number in bos_ids}
        set_template_prefix(content, names)
        result[TOKENIZER_FILE] = _json(content, indent=1)
        _change(result, TOKENIZER_CONFIG_FILE, add_bos_token=bool(bos_ids))
        if bos_ids:
            _set_token(result, "bos_token", tokenizer.token_of(bos_ids[0]))
        notes.append(f"the tokenizer puts {' '.join(names) or 'no BOS'} in front of a text, as the model was trained")
    if tokenizer.eos_token != said.eos_token:
        _set_token(result, "eos_token", tokenizer.eos_token)
        if GENERATION_FILE in result:
            ids = stop_ids(parse_json(result[GENERATION_FILE], GENERATION_FILE))
            _change(
                result, GENERATION_FILE, eos_token_id=[tokenizer.eos_id, *(i for i in ids if i != tokenizer.eos_id)]
            )
        notes.append(f"the tokenizer's EOS is {tokenizer.eos_token}, with which the model's documents ended")
    return result, notes


def _set_token(files: dict[str, bytes], key: str, token: str) -> None:
    _change(files, TOKENIZER_CONFIG_FILE, **{key: token})
    if Beside(files).token(key) != token or SPECIAL_TOKENS_FILE in files:
        _change(files, SPECIAL_TOKENS_FILE, **{key: token})


def _change(files: dict[str, bytes], name: str, **values: Any) -> None:
    files[name] = _json({**parse_json(files.get(name, b"{}"), name), **values}, indent=2)


def _json(content: Mapping[str, Any], indent: int) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode("utf-8", "surrogatepass")
