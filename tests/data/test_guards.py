"""What is wrong with a store or with the cache is an error that names it, or is mended and said; never trained on."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.cli import data as verb
from orchestrator.config.compose import compose
from orchestrator.config.schema import DataConfig, SourceConfig, TokenizerConfig
from orchestrator.data import holdout
from orchestrator.data import prepare as prepare_module
from orchestrator.data.holdout import Extents, hold_out
from orchestrator.data.plain_files import read_bounded
from orchestrator.data.prepare import prepare
from orchestrator.data.store import TokenStore, hash_file, is_store
from orchestrator.data.store_index import SPLITS, ShardInfo, SplitInfo, store_fingerprint
from orchestrator.errors import ConfigError, ConfigErrors, DamagedDataError, DataError, UserError

from .conftest import MakeStore, numbered_texts

WRONG: list[Any] = [None, True, -1, 0, 1.5, 10**30, 1 << 62, "", "x", "\x1b[31m", [], [None], {}, {"a": 1}]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values are, containers included."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    result = copy.deepcopy(content)
    inner = result
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return result


def with_true_fingerprint(content: Any) -> Any:
    """As somebody would write it who wants the index to be believed."""
    try:
        shards = [ShardInfo(**shard) for shard in content["shards"]]
        splits = {name: SplitInfo(**content["splits"][name]) for name in SPLITS}
        content["fingerprint"] = store_fingerprint(shards, splits, content["tokenizer_fingerprint"])
    except (KeyError, TypeError, IndexError, AttributeError):
        pass
    return content


def test_index_mutants_are_refused_or_harmless(make_store: MakeStore, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(numbered_texts(12), fraction=0.2)
    file = store.path / "index.json"
    whole = json.loads(file.read_text())
    left_out = {"files": {"card": {"count": 1, "names": ["README.md"]}}, "null_rows": 2, "empty_documents": 3}
    facts = {"files": 1, "bytes": 2, "python": "3", "tokens": ["by rows"]}
    whole["source"] = {"inputs": ["a"], "left_out": left_out, **facts}
    mutants = [(path, value) for path in leaves(whole) for value in WRONG if len(path) < 3 or path[1] in (0, "train")]
    assert len(mutants) > 450
    accepted, refusals = [], []
    for path, value in mutants:
        mutant = changed(whole, path, value)
        if mutant == whole:
            continue
        file.write_text(json.dumps(mutant if path == ("fingerprint",) else with_true_fingerprint(mutant)))
        try:
            verb.main(["inspect", f"path={store.path}"])
        except UserError as error:
            refusals.append(str(error))
        else:
            accepted.append((path, value))
    # Facts about the input that nothing is computed from, and other numbers that can be true.
    harmless = (
        "source",
        "skipped_files",
        "text_bytes",
        "unigram_entropy_nats",
        "tokens",
        "eos_id",
        "vocab_size",
        "version",
    )
    # Without a form of its documents a store is of the first kind: a text and the end of it.
    accepted = [one for one in accepted if one != (("documents",), {})]
    assert [(path, value) for path, value in accepted if path and not set(path) & set(harmless)] == []
    assert not [path for path, value in accepted if value is None and "source" not in path]
    assert "\x1b" not in "".join(refusals)


@pytest.mark.parametrize(
    "text", ["", "[", "[]", "null", "{" * 100_000, "[" * 100_000, '{"a": NaN}', "9" * 10_000, "\0"]
)
def test_an_index_that_is_no_index(make_store: MakeStore, text: str) -> None:
    store = make_store(["abc"])
    (store.path / "index.json").write_text(text)
    with pytest.raises(DataError):
        TokenStore.open(store.path)
    assert is_store(store.path)


@pytest.mark.parametrize("depth", [100, 300, 700, 2000])
def test_an_index_that_is_nested_deep(make_store: MakeStore, depth: int) -> None:
    file = make_store(["abc"]).path / "index.json"
    content = json.loads(file.read_text())
    content["documents"] = "deep"
    file.write_text(json.dumps(content).replace('"deep"', "[" * depth + "]" * depth))
    with pytest.raises(DataError, match=r"damaged|not a token store"):
        TokenStore.open(file.parent)


def replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def replace_by_link(file: Path) -> None:
    outside = file.parents[1] / f"outside-{file.name}"
    shutil.move(file, outside)
    file.symlink_to(outside)


def replace_by_loop(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


def replace_by_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    "replace", [replace_by_fifo, replace_by_link, replace_by_loop, replace_by_device, replace_by_directory]
)
@pytest.mark.parametrize(
    "name",
    [
        "index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokens-00000.bin",
        "offsets-00000.bin",
        "checks-00000.bin",
    ],
)
def test_files_that_are_no_regular_files_of_the_store(
    make_store: MakeStore, name: str, replace: Callable[[Path], None]
) -> None:
    store = make_store(numbered_texts(5))
    replace(store.path / name)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        TokenStore.open(store.path)


def test_a_store_may_be_a_link_itself(make_store: MakeStore, tmp_path: Path) -> None:
    store = make_store(["abc"])
    (tmp_path / "link").symlink_to(store.path)
    (store.path / "tokens-00000.bin").rename(store.path / "other.bin")
    (store.path / "tokens-00000.bin").symlink_to("other.bin")
    assert TokenStore.open(tmp_path / "link", verify=True).fingerprint == store.fingerprint


def test_a_huge_tokenizer_file_is_not_read(make_store: MakeStore) -> None:
    store = make_store(["abc"])
    with open(store.path / "tokenizer.json", "r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"tokenizer\.json[\s\S]*1099511627776 bytes"):
        TokenStore.open(store.path)


def test_files_that_grow_are_not_read_for_ever(tmp_path: Path) -> None:
    for source in ("/proc/self/maps", "/dev/zero"):
        with pytest.raises(DataError):
            read_bounded(Path(source), 10)
    (tmp_path / "a").write_text("abc")
    assert read_bounded(tmp_path / "a", 3) == b"abc"


def test_a_flipped_bit_is_met_when_its_block_is_read(make_store: MakeStore) -> None:
    store = make_store(["word " * 40_000], shard_tokens=1 << 30)
    file = store.path / "tokens-00000.bin"
    content = bytearray(file.read_bytes())
    assert len(content) > 3 << 16
    content[2 << 16] ^= 1
    file.write_bytes(content)
    split = TokenStore.open(store.path).split("train")
    split.read(0, (2 << 15) - 1)
    for _ in range(2):
        with pytest.raises(DamagedDataError, match=rf"{file}[\s\S]*bytes 131072 to 196608[\s\S]*checksum"):
            split.read((2 << 15) + 70, (2 << 15) + 80)
    split.read(3 << 15, split.tokens)


def rewrite_shard(store: TokenStore, tokens: np.ndarray) -> None:
    """Tokens, checksums and hashes that agree with each other."""
    content = tokens.astype("<u2").tobytes()
    (store.path / "tokens-00000.bin").write_bytes(content)
    (store.path / "checks-00000.bin").write_bytes(np.array([zlib.crc32(content)], dtype="<u4").tobytes())
    index = json.loads((store.path / "index.json").read_text())
    for key, name in (("sha256", "tokens"), ("checks_sha256", "checks")):
        index["shards"][0][key] = hash_file(store.path / f"{name}-00000.bin")
    (store.path / "index.json").write_text(json.dumps(with_true_fingerprint(index)))


def test_token_ids_outside_the_vocabulary_are_never_given_out(make_store: MakeStore) -> None:
    store = make_store(["abcdef"])
    rewrite_shard(store, np.array([1, 2, 300, 4, 5, 6, 256]))
    split = TokenStore.open(store.path).split("train")
    assert split.read(0, 2).tolist() == [1, 2]
    with pytest.raises(DataError, match=r"tokens-00000\.bin[\s\S]*token id 300 at token 2[\s\S]*0 to 256"):
        split.read(0, 7)
    with pytest.raises(DataError, match="token id 300"):
        TokenStore.open(store.path, verify=True)


def test_a_wrong_offset_is_no_index_error(make_store: MakeStore, capsys: pytest.CaptureFixture[str]) -> None:
    store = make_store(["abc", "def"])
    file = store.path / "offsets-00000.bin"
    for offsets in ([-5, 4], [1 << 60, 4], [3, 3], [5, 4]):
        file.write_bytes(np.array(offsets, dtype="<i8").tobytes())
        with pytest.raises(DataError, match=r"offsets-00000\.bin[\s\S]*document 0 from"):
            verb.main(["inspect", f"path={store.path}"])


def test_a_store_of_version_1_is_opened(make_store: MakeStore) -> None:
    """Written before there were checksums of blocks: as it was, without them."""
    store = make_store(numbered_texts(60))
    tokens = store.split("train").read(0, 100).tolist()
    index = json.loads((store.path / "index.json").read_text())
    index["version"] = 1
    for shard in index["shards"]:
        (store.path / shard.pop("checks_file")).unlink()
        del shard["checks_sha256"]
    (store.path / "index.json").write_text(json.dumps(index))
    old = TokenStore.open(store.path, verify=True)
    assert old.index.version == 1
    assert old.fingerprint == store.fingerprint
    assert old.split("train").read(0, 100).tolist() == tokens
    with open(store.path / "tokens-00000.bin", "r+b") as file:
        file.write(b"\xff")
    with pytest.raises(DataError, match="damaged"):
        prepare(DataConfig(sources=(SourceConfig(str(store.path)),)), progress=False)


@pytest.fixture
def cached(tmp_path: Path) -> DataConfig:
    (tmp_path / "docs.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in numbered_texts(60)))
    return DataConfig(sources=(SourceConfig(str(tmp_path / "docs.jsonl")),), tokenizer=TokenizerConfig(vocab_size=300))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "harm", [flip, replace_by_fifo, replace_by_link, Path.unlink, lambda file: file.write_bytes(b"")]
)
def test_a_damaged_cache_is_made_again_and_that_is_said(
    cached: DataConfig, cache: Path, harm: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fingerprint = prepare(cached, progress=False).fingerprint
    files = sorted(file for file in cache.rglob("*") if file.is_file() and file.suffix in (".json", ".bin", ""))
    # Of the tokenizer's configuration only the end-of-text token counts, which the tokenizer knows too.
    files = [file for file in files if file.name != "tokenizer_config.json"]
    assert len(files) >= 9
    for file in files:
        harm(file)
        assert prepare(cached, progress=True).fingerprint == fingerprint
        said = capsys.readouterr().err
        assert "the cache is damaged, and is prepared again" in said, file
        assert str(file.parent) in said
        assert prepare(cached, progress=False).fingerprint == fingerprint
        assert not capsys.readouterr().err


def test_a_store_that_takes_long_to_read_is_checked_as_it_is_read(
    make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(numbered_texts(60))
    flip(store.path / "tokens-00000.bin")
    config = DataConfig(sources=(SourceConfig(str(store.path)),))
    with pytest.raises(DataError, match="sha256"):
        prepare(config, progress=False)
    monkeypatch.setattr(prepare_module, "WHOLE_CHECK_BYTES", 10)
    split = prepare(config, progress=False).stores[0].split("train")
    with pytest.raises(DataError, match="checksum"):
        split.read(0, split.tokens)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources=[{path: a, weight: 1e308},{path: b, weight: 1e308}]"], "weight"),
        (["data.sources=[{path: a, weight: 1},{path: b, weight: 1e-9}]"], "too far apart"),
        (["data.tokenizer.vocab_size=10000000000000"], r"data\.tokenizer\.vocab_size"),
        (["data.validation_fraction=1.0"], r"data\.validation_fraction"),
    ],
)
def test_settings_without_sense_are_refused_before_anything_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigErrors, match=message):
        compose(["hardware=cpu", *overrides])


def test_an_input_that_cannot_be_read_is_named() -> None:
    with pytest.raises(DataError, match="/proc/self/mem"):
        prepare(DataConfig(sources=(SourceConfig("/proc/self/mem"),)), progress=False)


# How documents are held out.


def extents(lengths: list[int], hashes: list[int] | None = None) -> Extents:
    count = len(lengths)
    array = np.array(lengths, dtype=np.int64)
    digests = np.random.default_rng(7).integers(0, 2**64, count, dtype=np.uint64)
    if hashes is not None:
        digests = np.array(hashes, dtype=np.uint64)
    return Extents(np.cumsum(array) - array, array, digests, array * 4)


def pieces(part: Extents) -> list[tuple[int, int]]:
    return sorted(zip(part.starts.tolist(), (part.starts + part.lengths).tolist(), strict=True))


@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.3, 0.98])
@pytest.mark.parametrize(
    "lengths",
    [[24_000], [9000, 10], [100] * 3 + [460_000], [470_000, 3000, 500, 200], [5] * 4000, list(range(1, 500)), [1] * 30],
)
def test_about_the_wanted_tokens_are_held_out_and_every_token_is_in_one_split(
    lengths: list[int], fraction: float
) -> None:
    every = extents(lengths)
    total = sum(lengths)
    train, validation = hold_out(every, fraction)
    wanted = max(fraction * total, min(holdout.MIN_HELD_OUT_TOKENS, total // 10))
    held = int(validation.lengths.sum())
    assert wanted / 2.01 - 1 <= held <= 2 * wanted + 1
    assert train.lengths.sum() + held == total
    assert held < total
    assert int(train.text_bytes.sum() + validation.text_bytes.sum()) == 4 * total
    cuts = sorted(pieces(train) + pieces(validation))
    assert all(before[1] == after[0] for before, after in itertools.pairwise(cuts))


def test_the_split_is_a_function_of_content() -> None:
    """Whatever order the files come in, and whatever else they hold while the hashes serve."""
    for lengths in ([470_000, 3000, 500, 200], list(range(1, 800))):
        every = extents(lengths)
        order = np.random.default_rng(1).permutation(len(lengths))
        for part, again in zip(hold_out(every, 0.02), hold_out(every.take(order), 0.02), strict=True):
            assert pieces(part) == pieces(again)
    many, more = extents([50] * 4000), extents([50] * 8000)
    held, later = (set(pieces(hold_out(every, 0.1)[1])) for every in (many, more))
    assert held < later, "what was held out stays held out when the data grows"


def test_copies_of_a_document_go_one_way_also_where_it_is_cut() -> None:
    every = extents([9000, 9000, 9000, 40], [5, 5, 5, 1 << 63])
    train, validation = hold_out(every, 0.02)
    assert train.lengths.tolist() == [9000 - 902] * 3 + [40]
    assert validation.lengths.tolist() == [902] * 3
    train, validation = hold_out(extents([1000] * 40, [1] * 10 + [2] * 30), 0.1)
    assert sorted(train.lengths.tolist()) == [600] * 10 + [1000] * 30
    assert validation.lengths.tolist() == [400] * 10


def test_what_leaves_nothing_to_train_on_says_how_to_evaluate_only() -> None:
    with pytest.raises(ConfigError, match=r"nothing to train on[\s\S]*data\.validation="):
        hold_out(extents([1, 1], [3, 4]), 0.999)
    with pytest.raises(ConfigError, match=r"nothing to train on[\s\S]*data\.validation="):
        prepare(DataConfig(validation_fraction=1.0), progress=False)
