"""Documents by the user's own code: a reader and a transform, what they give, and what is said where they fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from orchestrator.cli import data as data_verb
from orchestrator.config import registry
from orchestrator.config.compose import compose
from orchestrator.config.schema import DataConfig, SourceConfig, TokenizerConfig
from orchestrator.data.prepare import prepare
from orchestrator.data.store import TokenStore
from orchestrator.errors import ConfigError, DataError, PartError, UserError

CODE = """
def records(path, separator="|", only=None):
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        for record in file.read_text().split(separator):
            yield record.strip() if only is None else {"body": {only: record.strip()}}

class Shorter:
    def __init__(self, words):
        self.words = words
    def __call__(self, text):
        kept = text.split()[: self.words]
        return " ".join(kept) if "drop" not in kept else None

def numbers(path):
    yield 3
def broken(path):
    yield "first"
    raise RuntimeError("the third sector")
def upper(text):
    return text.upper()
def bytes_of(text):
    return text.encode()
def two(text, more):
    return text
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module `mine_documents` of the user's, all of which may be imported, and two files of records."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine_documents.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.setattr(registry, "_permitted", set())
    names = ("records", "Shorter", "numbers", "broken", "upper", "bytes_of", "two", "record")
    registry.permit([f"mine_documents.{name}" for name in names])
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.rec").write_text("one two three|drop this|four five six")
    (tmp_path / "in" / "b.rec").write_text("seven||eight nine")
    yield tmp_path
    sys.modules.pop("mine_documents", None)


def _prepared(folder, source="in", *, reader=None, transform=None, **more):
    config = DataConfig(
        sources=(SourceConfig(str(folder / source), reader=reader or {}),),
        tokenizer=TokenizerConfig(kind="bytes"),
        transform=transform or {},
        cache_dir=str(folder / "cache"),
        **more,
    )
    return prepare(config, progress=False)


def _documents(data):
    (store,) = data.stores
    found = []
    for name in ("train", "validation"):
        split = store.split(name)
        found += [split.document(number)[:-1].astype("uint8").tobytes().decode() for number in range(split.documents)]
    return sorted(found)


@pytest.mark.parametrize("source", ["in", "in/*.rec"])
def test_a_reader_gives_the_documents_of_every_path(mine, source):
    data = _prepared(mine, source, reader={"_target_": "mine_documents.records"}, validation_fraction=0.0)
    assert _documents(data) == ["drop this", "eight nine", "four five six", "one two three", "seven"]
    facts = data.stores[0].index.source
    assert facts["data reader"] == "mine_documents.records"
    assert facts["left_out"]["empty_documents"] == 1


def test_rows_of_a_reader_have_fields(mine):
    reader = {"_target_": "mine_documents.records", "only": "text", "separator": " "}
    data = _prepared(mine, "in/b.rec", reader=reader, text_field="body.text", validation_fraction=0.0)
    assert _documents(data) == ["nine", "seven||eight"]


def test_a_transform_changes_documents_and_leaves_some_out(mine):
    transform = {"_target_": "mine_documents.Shorter", "words": 2}
    reader = {"_target_": "mine_documents.records"}
    data = _prepared(mine, reader=reader, transform=transform, validation_fraction=0.0)
    assert _documents(data) == ["eight nine", "four five", "one two", "seven"]
    assert data.stores[0].index.source["left_out"]["transformed_away"] == 1
    (mine / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b c", "d drop")))
    data = _prepared(mine, "lines.jsonl", transform=transform, validation_fraction=0.0)
    assert _documents(data) == ["a b"]


def test_what_was_made_by_older_code_is_made_again(mine):
    words = {"reader": {"_target_": "mine_documents.records"}, "validation_fraction": 0.0}
    first = _prepared(mine, **words, transform={"_target_": "mine_documents.upper"})
    again = _prepared(mine, **words, transform={"_target_": "mine_documents.upper"})
    assert again.stores[0].path == first.stores[0].path
    file = mine / "code" / "mine_documents.py"
    file.write_text(CODE.replace("upper()", "swapcase() + ' and more'"))
    del sys.modules["mine_documents"]
    changed = _prepared(mine, **words, transform={"_target_": "mine_documents.upper"})
    assert changed.stores[0].path != first.stores[0].path
    assert "SEVEN and more" in _documents(changed)


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        ({"reader": {"_target_": "mine_documents.numbers"}}, PartError, "gave int"),
        ({"reader": {"_target_": "mine_documents.broken"}}, PartError, "the third sector"),
        ({"reader": {"_target_": "mine_documents.record"}}, ConfigError, "did you mean 'mine_documents.records'?"),
        ({"reader": {"_target_": "mine_documents.records", "separater": 1}}, ConfigError, "did you mean 'separator'?"),
        ({"reader": {"_target_": "not_given.records"}}, ConfigError, "names code"),
        ({"transform": {"_target_": "mine_documents.two"}}, ConfigError, "missing a required argument: 'more'"),
        ({"transform": {"_target_": "mine_documents.bytes_of"}}, PartError, "gave bytes"),
        (
            {"source": "none", "reader": {"_target_": "mine_documents.records"}},
            DataError,
            "nothing for the data reader",
        ),
    ],
)
def test_what_is_wrong_with_a_part_is_one_error(mine, words, kind, said):
    (mine / "text.txt").write_text("words")
    words = {"source": "text.txt", **words}
    with pytest.raises(UserError) as raised:
        _prepared(mine, words.pop("source"), **words)
    assert isinstance(raised.value, kind)
    assert said in str(raised.value)
    assert "Traceback" not in str(raised.value)


def test_tokens_are_not_read_by_ones_own_code(mine):
    from orchestrator.config.schema import TokensConfig

    with pytest.raises(ConfigError, match="work on text"):
        _prepared(mine, reader={"_target_": "mine_documents.records"}, tokens=TokensConfig(column="ids"))


def test_the_example_reads_mail(mine, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "own_optimizer_and_callback"))
    registry.permit(["own_parts.documents.read_mail", "own_parts.documents.drop_short"])
    (mine / "mail").mkdir()
    for name, body in (("a", "A long enough body."), ("b", "Short.")):
        (mine / "mail" / f"{name}.eml").write_text(f"From: a@example.org\nSubject: About {name}\n\n{body}\n")
    transform = {"_target_": "own_parts.documents.drop_short", "characters": 20}
    data = _prepared(
        mine, "mail", reader={"_target_": "own_parts.documents.read_mail"}, transform=transform, validation_fraction=0.0
    )
    assert _documents(data) == ["About a\n\nA long enough body.\n"]
    for name in ("own_parts", "own_parts.documents"):
        sys.modules.pop(name, None)


def test_data_prepare_takes_them_from_the_command_line(mine, capsys):
    words = ["prepare", f"input={mine / 'in'}", f"output={mine / 'store'}", "tokenizer=bytes", "validation_fraction=0"]
    assert data_verb.main([*words, "reader={_target_: mine_documents.records, separator: '|'}", "progress=false"]) == 0
    assert "5" in capsys.readouterr().out
    assert TokenStore.open(mine / "store").split("train").documents == 5
    with pytest.raises(ConfigError, match="reader"):
        data_verb.main([*words, "reader={oops"])


def test_a_run_is_composed_with_them():
    words = ["data.transform={_target_: mine.clean, words: 3}", "data.reader._target_=mine.read", "data.reader.size=4"]
    data = compose(words).config.data
    assert data.transform == {"_target_": "mine.clean", "words": 3}
    assert data.reader == {"_target_": "mine.read", "size": 4}
    found = compose(["data.sources=[{path: a, weight: 1, reader: {_target_: mine.read}}]"]).config.data.sources
    assert found[0].reader == {"_target_": "mine.read"}
