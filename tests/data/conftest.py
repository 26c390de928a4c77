"""Small stores that are quick to make; nothing touches the user's cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from orchestrator.data.documents import find_corpus
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenize import byte_tokenizer
from orchestrator.data.write import write_store

MakeStore = Callable[..., TokenStore]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """`store_of` in the directory of the test."""
    return functools.partial(store_of, tmp_path)


def store_of(
    root: Path, texts: Sequence[str], name: str = "store", fraction: float = 0.0, shard_tokens: int = 1 << 20
) -> TokenStore:
    """Texts to a store of bytes, in shards of `shard_tokens`."""
    inputs = root / f"{name}-inputs"
    inputs.mkdir()
    for number, text in enumerate(texts):
        (inputs / f"{number:04d}.txt").write_text(text, encoding="utf-8")
    (root / name).mkdir()
    return write_store(
        root / name,
        find_corpus([str(inputs)], TextSpec()),
        byte_tokenizer(),
        validation_fraction=fraction,
        workers=2,
        source={},
        shard_tokens=shard_tokens,
    )


def numbered_texts(count: int, length: int = 40) -> list[str]:
    """Texts that all differ, of different lengths."""
    return [f"{number} " * (1 + (number * 7) % length) for number in range(count)]
