"""Each source has figures of its own: what was taken of it, exactly, and what it is called."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.source_figures import SourceBook, labels_of
from orchestrator.data.stream import Position, StepLoader, TokenStream

from .conftest import MakeStore, numbered_texts

SEQ = 16


@pytest.mark.parametrize("weights", [(1.0,), (0.665, 0.335), (0.5, 0.3, 0.2), (1.0, 0.01, 0.1, 3.7)])
def test_what_was_taken_is_what_the_order_gives(make_store: MakeStore, weights: tuple[float, ...]) -> None:
    stores = [make_store(numbered_texts(9 + 5 * number), f"s{number}") for number in range(len(weights))]
    stream = TokenStream(stores, weights, "train", SEQ, 3)
    seen: Counter[int] = Counter()
    for index in range(3000):
        assert stream.counts(index) == tuple(seen[number] for number in range(len(weights))), index
        seen[stream.locate(index)[0]] += 1


def test_what_is_left_out_does_not_count_nor_what_comes_behind(make_store: MakeStore) -> None:
    stores = [make_store(numbered_texts(9 + 5 * number), f"s{number}") for number in range(3)]
    stream = TokenStream(stores, (0.5, 0.3, 0.2), "train", SEQ, 3)
    skipped = ((3, 9), (20, 50), (1000, 2000))
    loader = StepLoader(stream, 4, 0, 1, Position(2, 8, 8 * SEQ), 40, skipped=skipped)
    for step in (2, 3, 7, 30):
        before = [index for index in range(loader.first(step)) if not any(low <= index < high for low, high in skipped)]
        real = Counter(stream.locate(index)[0] for index in before)
        book = SourceBook(loader, ["web", "/data/code/*.jsonl", "/data/math.parquet"])
        figures = book.at(step)
        assert [one.sequences for one in figures] == [real[0], real[1], real[2]], step
        assert [one.tokens for one in figures] == [real[number] * SEQ for number in range(3)]
        assert figures[1].epochs == real[1] / stream.windows[1]
        assert book.row(step)["epochs/code"] == figures[1].epochs
        assert book.record(step)[2]["source"] == "/data/math.parquet"


def test_of_one_source_the_epochs_are_said(make_store: MakeStore) -> None:
    stream = TokenStream([make_store(numbered_texts(9))], (1.0,), "train", SEQ, 3)
    loader = StepLoader(stream, 4, 0, 1, Position(), 40)
    assert SourceBook(loader, ["builtin"]).row(7) == {"epochs": 28 / stream.windows[0]}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("builtin", "web"), ("builtin", "web")),
        (("/data/web.jsonl", "/data/web/*.parquet", "/data/web/[ab]?.txt"), ("web", "web-2", "web-3")),
        (("/a/web.jsonl", "web"), ("web-2", "web")),
        (("web", "web"), ("web", "web-2")),
        (("*.txt", "/a/\u00e9t\u00e9 x/"), ("data", "_t_x")),
        (("./docs/.hidden",), (".hidden",)),
    ],
)
def test_labels_are_short_and_unlike(names: tuple[str, ...], labels: tuple[str, ...]) -> None:
    assert labels_of(names) == labels


@given(st.lists(st.text(min_size=1), min_size=1, max_size=6))
def test_labels_never_clash(names: list[str]) -> None:
    labels = labels_of(names)
    assert len(set(labels)) == len(names)
    assert all(label and "/" not in label for label in labels)
