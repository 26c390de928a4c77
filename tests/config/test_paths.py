"""A run goes on from whatever folder it is resumed: its configuration names places absolutely."""

from __future__ import annotations

from pathlib import Path

from orchestrator.config.compose import compose
from orchestrator.config.paths import absolute
from orchestrator.config.schema import RunConfig

WORDS = [
    "data.sources=[{path: 'docs/*.txt', weight: 1}, {path: builtin, weight: 1}, {path: /abs/store, weight: 1}]",
    "data.tokenizer.path=tok/tokenizer.json",
    "data.validation=held.jsonl",
    "checkpoint.dir=fast",
    "checkpoint.signing_key='~/key.pem'",
    "checkpoint.trusted_keys=[a.pem]",
]


def test_places_are_absolute_and_words_stay_words(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    found = absolute(compose(WORDS).config, tmp_path)
    assert [source.path for source in found.data.sources] == [f"{tmp_path}/docs/*.txt", "builtin", "/abs/store"]
    assert found.data.tokenizer.path == f"{tmp_path}/tok/tokenizer.json"
    assert found.data.validation == f"{tmp_path}/held.jsonl"
    assert (found.checkpoint.dir, found.checkpoint.signing_key) == (f"{tmp_path}/fast", "/home/me/key.pem")
    assert found.checkpoint.trusted_keys == (f"{tmp_path}/a.pem",)
    assert (found.runs_dir, found.data.cache_dir) == (f"{tmp_path}/runs", "auto")


def test_stores_and_what_is_absolute_already_are_left_alone():
    config = absolute(compose(["checkpoint.dir=s3://bucket/place"]).config, Path("/first"))
    assert config.checkpoint.dir == "s3://bucket/place"
    assert absolute(config, Path("/second")) == config
    assert absolute(RunConfig(), Path("/x")).data == RunConfig().data
