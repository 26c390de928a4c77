"""Batches of sequences: what each layout asks of their shapes, and how many shapes there are where each is compiled."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.constants import IGNORE_INDEX
from orchestrator.evaluation.batching import Shapes
from orchestrator.evaluation.scoring import ScoredText, arrange, pack_texts, unpack_texts

LENGTHS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 377, 377, 500, 512]


@pytest.mark.parametrize("static", [False, True])
def test_every_sequence_is_in_one_batch_that_it_fits(static):
    shapes = Shapes(512, split=4, multiple=3, tokens=1024, static=static)
    batches = shapes.batches(LENGTHS)
    assert sorted(number for batch in batches for number in batch.members) == list(range(len(LENGTHS)))
    for batch in batches:
        assert max(LENGTHS[number] for number in batch.members) <= batch.length
        assert len(batch.members) <= batch.rows
        assert (batch.length % 4, batch.rows % 3) == (0, 0)
        assert batch.rows * batch.length <= max(3 * 1024, 3 * batch.length)


def test_compiled_shapes_are_one_for_each_doubling():
    shapes = Shapes(4096, multiple=4, tokens=4096, static=True)
    found = {(one.rows, one.length) for length in range(1, 4097) for one in shapes.batches([length])}
    assert sorted(length for _, length in found) == [64, 128, 256, 512, 1024, 2048, 4096]
    assert len({one.length for one in Shapes(4096).batches(range(1, 4097))}) > 100, "or nothing is gained by it"


def test_a_text_that_is_too_long_loses_its_beginning_and_keeps_what_is_scored():
    arrays = arrange([ScoredText(list(range(10)), 7), ScoredText([1, 2], 1)], 3, 4, 4)
    assert arrays["tokens"].tolist() == [[5, 6, 7, 8], [1, 0, 0, 0], [0, 0, 0, 0]]
    none = IGNORE_INDEX
    assert arrays["targets"].tolist() == [[none, 7, 8, 9], [2, none, none, none], [none] * 4]


def test_texts_travel_as_they_are():
    texts = [ScoredText(np.array([3, 70000, 1]), 2), ScoredText([5, 6], 1)]
    found = unpack_texts(pack_texts(texts))
    assert [(list(one.tokens), one.first) for one in found] == [([3, 70000, 1], 2), ([5, 6], 1)]
    assert unpack_texts(pack_texts([])) == []
