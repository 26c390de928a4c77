"""A resumed run on other data is refused by the keys that differ, and by no others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.training.restore import _other_data

FACTS = {"version": 1, "stores": ["ab"], "weights": [1.0], "seq_len": 64, "seed": 0, "document_mask": True}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"document_mask": False}, "data.document_mask (saved True, now False)"),
        ({"seq_len": 32}, "train.seq_len (saved 64, now 32)"),
        ({"seed": 7}, "seed (saved 0, now 7)"),
        ({"stores": ["cd"]}, "the content of data.sources"),
        ({"weights": [0.5, 0.5]}, "data.sources[...].weight"),
    ],
)
def test_the_key_that_differs_is_named(change: dict[str, Any], named: str) -> None:
    stream: Any = SimpleNamespace(facts={**FACTS, **change})
    text = _other_data(FACTS, stream)
    assert named in text
    keys = {"document_mask", "seq_len", "content of data.sources", "].weight"}
    assert {key for key in keys if key in text} == {key for key in keys if key in named}


@pytest.mark.parametrize("saved", [None, [], "x", {"seed": "\x1b[31m"}])
def test_older_and_strange_checkpoints_name_every_key(saved: Any) -> None:
    stream: Any = SimpleNamespace(facts=FACTS)
    text = _other_data(saved, stream)
    assert "data.document_mask" in text
    assert "\x1b" not in text
