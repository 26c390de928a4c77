from __future__ import annotations

import collections
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data import document_tokens, write
from orchestrator.data.store import TokenStore, is_store
from orchestrator.errors import DataError

from .conftest import MakeStore, numbered_texts, store_of

EOS = 256


def documents(store: TokenStore, split: str) -> list[str]:
    part = store.split(split)
    tokens = part.read(0, part.tokens)
    assert part.tokens == 0 or tokens[-1] == EOS
    parts = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)[:-1]
    assert [part.document(i).tolist() for i in range(part.documents)] == [part.tolist() for part in parts]
    return [store.tokenizer.decode(part[:-1]) for part in parts]


@pytest.mark.parametrize("shard_tokens", [1, 100, 1 << 20])
def test_every_document_is_in_one_split_once(make_store: MakeStore, shard_tokens: int) -> None:
    texts = numbered_texts(120)
    store = make_store(texts, fraction=0.2, shard_tokens=shard_tokens)
    train, validation = documents(store, "train"), documents(store, "validation")
    assert sorted(train + validation) == sorted(texts)
    assert 8 <= len(validation) <= 45
    assert train != sorted(train, key=texts.index), "the order is shuffled"
    splits = store.index.splits
    assert splits["train"].text_bytes + splits["validation"].text_bytes == sum(map(len, texts))
    assert not set(splits["train"].shards) & set(splits["validation"].shards)
    if shard_tokens == 100:
        assert len(splits["train"].shards) > 10


def test_shards_change_neither_tokens_nor_splits(make_store: MakeStore) -> None:
    texts = numbered_texts(50)
    small, large = make_store(texts, "a", 0.1, shard_tokens=64), make_store(texts, "b", 0.1)
    for split in ("train", "validation"):
        assert documents(small, split) == documents(large, split)
    assert small.unigram_entropy_nats == large.unigram_entropy_nats


def test_writing_twice_gives_the_same_store(make_store: MakeStore) -> None:
    texts = numbered_texts(50)
    assert make_store(texts, "a", 0.1).fingerprint == make_store(texts, "b", 0.1).fingerprint
    texts[3] += "!"
    assert make_store(texts, "c", 0.1).fingerprint != make_store(numbered_texts(50), "d", 0.1).fingerprint


def test_the_documents_stay_in_their_order(make_store: MakeStore) -> None:
    """Positions in checkpoints rely on it: a change of this order needs a new FORMAT_VERSION."""
    fingerprint = make_store(numbered_texts(60)).fingerprint
    assert fingerprint == "306097ee010c3d266e42a305ba5de3dda9312127e023342f8fc9e72c63eadc5a"


def test_copies_stay_on_one_side(make_store: MakeStore) -> None:
    store = make_store([text for text in numbered_texts(60) for _ in range(2)], fraction=0.3)
    assert not set(documents(store, "train")) & set(documents(store, "validation"))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_documents_have_a_validation_split_too(make_store: MakeStore, count: int) -> None:
    texts = [f"{number}" * 5000 for number in range(count)]
    store = make_store(texts, fraction=0.02)
    train, validation = documents(store, "train"), documents(store, "validation")
    held = sum(map(len, validation))
    assert held == 500 * count, "a tenth, where that is less than MIN_HELD_OUT_TOKENS"
    assert sum(map(len, train)) + held == count * 5000
    assert any((text + validation[0]) in texts for text in train)


def test_no_fraction_holds_out_nothing(make_store: MakeStore) -> None:
    store = make_store(numbered_texts(5), fraction=0.0)
    assert store.split("validation").tokens == 0
    assert documents(store, "validation") == []


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return store_of(tmp_path_factory.mktemp("shared"), numbered_texts(40), shard_tokens=70)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reads_cross_shards(shared: TokenStore, data: st.DataObject) -> None:
    split = shared.split("train")
    whole = np.concatenate([np.fromfile(shared.path / shard.file, "<u2") for shard in shared.index.shards])
    start = data.draw(st.integers(0, split.tokens))
    stop = data.draw(st.integers(start, split.tokens))
    tokens = split.read(start, stop)
    assert tokens.dtype == np.int64
    assert tokens.tolist() == whole[start:stop].tolist()


def test_reads_beyond_the_end_are_errors(make_store: MakeStore) -> None:
    split = make_store(["abc"]).split("train")
    for start, stop in ((0, 5), (-1, 2), (3, 2)):
        with pytest.raises(IndexError):
            split.read(start, stop)


def test_entropy_is_that_of_the_training_tokens(make_store: MakeStore) -> None:
    store = make_store(numbered_texts(80), fraction=0.2)
    split = store.split("train")
    counts = collections.Counter(split.read(0, split.tokens).tolist())
    shares = np.array(list(counts.values())) / split.tokens
    assert store.unigram_entropy_nats == pytest.approx(-(shares * np.log(shares)).sum())
    assert write.entropy_nats(np.array([5, 5, 0])) == pytest.approx(np.log(2))


def test_a_split_travels_without_its_maps(make_store: MakeStore) -> None:
    split = make_store(["abc", "def"]).split("train")
    before = split.read(0, split.tokens)
    dumped = pickle.dumps(split)
    assert len(dumped) < 2000
    assert pickle.loads(dumped).read(0, split.tokens).tolist() == before.tolist()


def test_damage_is_named(make_store: MakeStore) -> None:
    store = make_store(numbered_texts(20), fraction=0.2)
    TokenStore.open(store.path, verify=True)
    for name in ("tokens-00000.bin", "offsets-00001.bin"):
        file = store.path / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-2])
        with pytest.raises(DataError, match=rf"damaged.*{name}[\s\S]*{len(whole) - 2} bytes[\s\S]*{len(whole)} bytes"):
            TokenStore.open(store.path)
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        opened = TokenStore.open(store.path)
        if name.startswith("tokens"):
            with pytest.raises(DataError, match=rf"damaged.*{name}[\s\S]*checksum"):
                opened.split("train").read(5, 6)
        with pytest.raises(DataError, match=rf"damaged.*{name}[\s\S]*sha256"):
            TokenStore.open(store.path, verify=True)
        file.unlink()
        with pytest.raises(DataError, match=rf"damaged.*{name}[\s\S]*No such file"):
            TokenStore.open(store.path)
        file.write_bytes(whole)
    TokenStore.open(store.path, verify=True)


def test_another_tokenizer_is_noticed(make_store: MakeStore) -> None:
    store = make_store(["abc"])
    file = store.path / "tokenizer.json"
    file.write_text(file.read_text().replace('"use_regex": false', '"use_regex": true'))
    opened = TokenStore.open(store.path)
    with pytest.raises(DataError, match=r"tokenizer\.json[\s\S]*fingerprint"):
        _ = opened.tokenizer
    file.unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        TokenStore.open(store.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, r"another version[\s\S]*99"),
        ({"format": "other"}, "not a token store"),
        ({"dtype": "<f8"}, "dtype"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
        ({"splits": {}}, "damaged"),
        ({"shards": [{}]}, "damaged"),
        ({"extra": 1}, "extra"),
    ],
)
def test_a_wrong_index_is_refused(make_store: MakeStore, change: dict[str, object], message: str) -> None:
    store = make_store(["abc"])
    file = store.path / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(DataError, match=message):
        TokenStore.open(store.path)


def test_an_index_does_not_reach_outside_its_directory(make_store: MakeStore) -> None:
    file = make_store(["abc"]).path / "index.json"
    content = json.loads(file.read_text())
    content["shards"][0]["file"] = "../../etc/passwd"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="shards/0/file"):
        TokenStore.open(file.parent)


def test_what_is_no_store_says_how_to_make_one(tmp_path: Path, make_store: MakeStore) -> None:
    with pytest.raises(DataError, match=r"not a token store[\s\S]*data prepare"):
        TokenStore.open(tmp_path)
    assert not is_store(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    assert not is_store(tmp_path)
    store = make_store(["abc"])
    assert is_store(store.path)
    (store.path / "index.json").unlink()
    assert is_store(store.path), "an incomplete store is not taken for text"
    with pytest.raises(DataError, match="not a token store"):
        TokenStore.open(store.path)


def test_large_vocabularies_take_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.data.documents import find_corpus
    from orchestrator.data.formats.rows import TextSpec
    from orchestrator.data.tokenize import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.vocab_size = 70_000
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [np.array([69_999, EOS, 65_536]) for _ in texts])
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "store").mkdir()
    options: dict[str, Any] = {"validation_fraction": 0.0, "workers": 1, "source": {}}
    corpus = find_corpus([str(tmp_path / "a.txt")], TextSpec())
    store = write.write_store(tmp_path / "store", corpus, tokenizer, **options)
    assert store.index.dtype == "<u4"
    # An end-of-text token inside of a document would divide it.
    assert store.split("train").read(0, 3).tolist() == [69_999, 65_536, EOS]


def test_long_texts_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from orchestrator.data.tokenize import byte_tokenizer

    monkeypatch.setattr(document_tokens, "_PART_CHARACTERS", 10)
    for text in ("x" * 35, "a word\nand another line\nthen more words", "ü " * 20, "12345678\n", ""):
        parts = list(document_tokens._parts(text))
        assert "".join(parts) == text
        assert all(len(part) <= 10 for part in parts)
    assert list(document_tokens._parts("one\ntwo three four"))[:2] == ["one\n", "two three"]
    texts = ["short", "long " * 10]
    tokens = document_tokens._encode_texts(texts, byte_tokenizer(), np.dtype("<u2"))
    assert [bytes(ids.astype("u1")).decode() for ids in tokens] == texts
