"""Tokens that other software has made are read as what they are: the same documents, and no id that is not there."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from orchestrator.cli import data as verb
from orchestrator.config.schema import DataConfig, SourceConfig, TokenizerConfig, TokensConfig
from orchestrator.data.prepare import build_store, prepare
from orchestrator.data.store import TokenStore
from orchestrator.data.tokenize import byte_tokenizer
from orchestrator.data.tokens import token_reader
from orchestrator.errors import ConfigError, DataError, UserError

FILES = Path(__file__).parent / "tokens"
WRITTEN = json.loads((FILES / "documents.json").read_text())
DOCUMENTS: list[list[int]] = WRITTEN["documents"]
EOS: int = WRITTEN["eos"]
NONE = TokenizerConfig(kind="none")
IDS = TokensConfig(vocab_size=257, eos_id=EOS)


def flat(dtype: str, first: bool = False) -> bytes:
    """One sequence; the end-of-text token after each document, or in front of it."""
    ids = [id for ids in DOCUMENTS for id in ([EOS, *ids] if first else [*ids, EOS])]
    return np.array(ids, dtype).tobytes()


def nanogpt(folder: Path) -> Path:
    """As data/openwebtext/prepare.py does."""
    array = np.memmap(folder / "train.bin", dtype=np.uint16, mode="w+", shape=(len(flat("u2")) // 2,))
    array[:] = np.frombuffer(flat("u2"), np.uint16)
    array.flush()
    return folder / "train.bin"


def llmc(magic: int, version: int, dtype: str) -> Callable[[Path], Path]:
    """As write_datafile of dev/data/data_common.py does."""

    def write(folder: Path) -> Path:
        header = np.zeros(256, dtype=np.int32)
        tokens = np.frombuffer(flat(dtype, first=True), dtype)
        header[:3] = magic, version, len(tokens)
        with open(folder / "train.bin", "wb") as file:
            file.write(header.tobytes())
            file.write(tokens.tobytes())
        return folder / "train.bin"

    return write


def olmo(folder: Path) -> Path:
    (folder / "part-0-00000.npy").write_bytes(flat("u2"))
    return folder / "part-0-00000.npy"


def numpy_file(folder: Path) -> Path:
    np.save(folder / "ids.npy", np.frombuffer(flat("i4"), np.int32))
    return folder / "ids.npy"


def older_megatron(folder: Path) -> Path:
    """As the builder of IndexedDataset in Megatron-LM before the mapped kind, and in fairseq."""
    (folder / "old.bin").write_bytes(flat("i4"))
    sizes = [len(ids) + 1 for ids in DOCUMENTS]
    with open(folder / "old.idx", "wb") as file:
        file.write(b"TNTIDX\x00\x00" + struct.pack("<QQQ", 1, 4, 4))
        file.write(struct.pack("<QQQ", len(sizes), len(sizes), len(sizes) + 1))
        starts = np.cumsum([0, *sizes])
        for values in (range(len(sizes) + 1), starts, sizes, range(len(sizes) + 1)):
            file.write(np.array(values, np.int64).tobytes())
    return folder / "old.bin"


def table() -> pa.Table:
    kind = pa.list_(pa.int32())
    return pa.table({"input_ids": pa.array(DOCUMENTS, kind), "mask": pa.array([[1] * len(i) for i in DOCUMENTS], kind)})


def parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(table(), folder / "ids.parquet", row_group_size=3)
    return folder / "ids.parquet"


def arrow_stream(folder: Path) -> Path:
    with pa.OSFile(str(folder / "ids.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=4)
    return folder / "ids.arrow"


def fixture(name: str) -> Callable[[Path], Path]:
    return lambda folder: FILES / name


COLUMN = TokensConfig(vocab_size=257, eos_id=EOS, column="input_ids")
CASES: dict[str, tuple[Callable[[Path], Path], TokensConfig, str]] = {
    "megatron, uint16": (fixture("megatron-u16.bin"), IDS, "by Megatron's index"),
    "megatron, by its index": (fixture("megatron-i32.idx"), IDS, "by Megatron's index"),
    "megatron, older": (older_megatron, IDS, "by Megatron's index"),
    "nanogpt": (nanogpt, IDS, "by the end-of-text token"),
    "llm.c, gpt-2": (llmc(20240520, 1, "u2"), IDS, "by the end-of-text token"),
    "llm.c, llama-3": (llmc(20240801, 7, "u4"), IDS, "by the end-of-text token"),
    "olmo": (olmo, IDS, "by the end-of-text token"),
    "numpy": (numpy_file, IDS, "by the end-of-text token"),
    "mds": (fixture("mds"), IDS, "by rows"),
    "mds, bytes": (fixture("mds-bytes"), TokensConfig(vocab_size=257, eos_id=EOS, dtype="int64"), "by rows"),
    "mds, any array": (fixture("mds-any"), COLUMN, "by rows"),
    "litdata": (fixture("litdata"), IDS, "by rows"),
    "litdata, TokensLoader": (fixture("litdata-tokens"), IDS, "by rows"),
    "parquet": (parquet, COLUMN, "by rows"),
    "arrow stream": (arrow_stream, COLUMN, "by rows"),
}


def built(source: Path, output: Path, tokens: TokensConfig = IDS, tokenizer: TokenizerConfig = NONE) -> TokenStore:
    return build_store([str(source)], output, tokenizer, validation_fraction=0.0, progress=False, tokens=tokens)


def stored(store: TokenStore) -> list[list[int]]:
    split = store.split("train")
    return [split.document(number).tolist() for number in range(split.documents)]


@pytest.mark.parametrize("case", CASES)
def test_documents_and_counts_are_those_of_the_writer(tmp_path: Path, case: str) -> None:
    write, tokens, delimited = CASES[case]
    store = built(write(tmp_path), tmp_path / "store", tokens)
    assert sorted(stored(store)) == sorted([*ids, EOS] for ids in DOCUMENTS)
    assert store.index.splits["train"].tokens == sum(len(ids) + 1 for ids in DOCUMENTS)
    assert store.index.source["tokens"][0] == f"documents are delimited {delimited}"
    TokenStore.open(store.path, verify=True)


def test_all_formats_give_the_same_store(tmp_path: Path) -> None:
    names = ("nanogpt", "megatron, uint16", "mds", "litdata", "parquet")
    stores = []
    for number, name in enumerate(names):
        write, tokens, _ = CASES[name]
        (tmp_path / str(number)).mkdir()
        stores.append(built(write(tmp_path / str(number)), tmp_path / f"store-{number}", tokens).fingerprint)
    assert len(set(stores)) == 1


def test_a_named_tokenizer_gives_vocabulary_end_and_text(tmp_path: Path) -> None:
    store = built(FILES / "megatron-u16.bin", tmp_path / "store", TokensConfig(), TokenizerConfig(kind="bytes"))
    assert (store.vocab_size, store.eos_id) == (257, 256)
    assert store.tokenizer.fingerprint == byte_tokenizer().fingerprint


def test_tokens_are_a_source_of_a_run_and_lie_in_the_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DataConfig(sources=(SourceConfig(str(FILES / "litdata")),), tokenizer=NONE, tokens=IDS)
    data = prepare(config, progress=True)
    assert "documents are delimited by rows" in capsys.readouterr().err
    assert data.stores[0].path.is_relative_to(cache)
    assert data.tokenizer.is_nameless
    assert prepare(config, progress=False).stores[0].path == data.stores[0].path


def test_packed_rows_are_one_sequence(tmp_path: Path) -> None:
    """As packing for training does: rows of equal length, cut anywhere."""
    ids = np.frombuffer(flat("i4"), np.int32)
    rows = [ids[low : low + 16].tolist() for low in range(0, ids.size, 16)]
    file = tmp_path / "packed.parquet"
    pyarrow.parquet.write_table(pa.table({"input_ids": pa.array(rows, pa.list_(pa.int32()))}), file)
    packed = TokensConfig(vocab_size=257, eos_id=EOS, column="input_ids", packed=True)
    assert sorted(stored(built(file, tmp_path / "a", packed))) == sorted([*ids, EOS] for ids in DOCUMENTS)
    lines = built(file, tmp_path / "b", COLUMN).index.source["tokens"]
    assert any("have token 256 inside" in line and "data.tokens.packed=true" in line for line in lines)
    assert any("documents had no token 256 at their end: one was added" in line for line in lines)


def test_long_documents_are_divided_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_reader, "PIECE_TOKENS", 20)
    store = built(nanogpt(tmp_path), tmp_path / "store")
    assert max(map(len, stored(store))) == 21
    assert "3 documents of more than 20 tokens are divided" in store.index.source["tokens"]


def test_ids_beyond_the_vocabulary_are_named_before_they_are_trained_on(tmp_path: Path) -> None:
    small = TokensConfig(vocab_size=200, eos_id=5)
    with pytest.raises(DataError, match=r"not in the vocabulary: .*megatron-i32\.bin, document \d[\s\S]*0 to 199"):
        built(FILES / "megatron-i32.bin", tmp_path / "store", small)
    np.save(tmp_path / "negative.npy", np.array([1, -1, 256], np.int32))
    with pytest.raises(DataError, match=r"negative\.npy, token 0[\s\S]*id -1"):
        built(tmp_path / "negative.npy", tmp_path / "store")


def test_tokens_without_a_tokenizer_say_how_to_name_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"which tokenizer made them is not known[\s\S]*Megatron[\s\S]*tokenizer=none"):
        built(FILES / "megatron-u16.bin", tmp_path / "store", tokenizer=TokenizerConfig())
    with pytest.raises(ConfigError, match=r"vocab_size=null data\.tokens\.eos_id=null"):
        built(FILES / "megatron-u16.bin", tmp_path / "store", TokensConfig())
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="text cannot become tokens without a tokenizer"):
        built(tmp_path / "a.txt", tmp_path / "store")
    with pytest.raises(DataError, match=r"holds no tokens that are read[\s\S]*column=input_ids"):
        built(tmp_path / "a.txt", tmp_path / "store", COLUMN)


def test_no_text_can_be_given_to_a_vocabulary_of_ids(tmp_path: Path) -> None:
    tokenizer = built(FILES / "mds", tmp_path / "store").tokenizer
    assert tokenizer.decode([1, EOS]).split() == ["<id", "1>", "<id", "256>"]
    with pytest.raises(DataError, match="tokens whose tokenizer was not named"):
        tokenizer.encode("x")


def test_the_verb_takes_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tokenizer=none", "vocab_size=257", "eos_id=256", "progress=false", "column=tokens"]
    assert verb.main(["prepare", f"input={FILES / 'mds'}", f"output={tmp_path / 'store'}", *words]) == 0
    printed = capsys.readouterr().out
    assert "documents are delimited by rows" in printed
    assert "bytes per token  unknown" in printed


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def garbled(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[8 : len(content) // 2] = bytes(0xFF for _ in content[8 : len(content) // 2])
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, emptied, garbled])
@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_error(tmp_path: Path, case: str, harm: Callable[[Path], None]) -> None:
    """Of every file of the input, one at a time; what cannot be told apart from tokens is out of the vocabulary."""
    (tmp_path / "made").mkdir()
    source, tokens = CASES[case][0](tmp_path / "made"), CASES[case][1]
    if source.is_relative_to(FILES):
        shutil.copytree(FILES, tmp_path / "copy")
        source = tmp_path / "copy" / source.relative_to(FILES)
    files = [*source.glob("*")] if source.is_dir() else [*source.parent.glob(f"{source.stem}.*")]
    for number, file in enumerate(sorted(files)):
        whole = file.read_bytes()
        harm(file)
        with pytest.raises(UserError):
            built(source, tmp_path / f"store-{number}", tokens)
        file.write_bytes(whole)
    built(source, tmp_path / "store", tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column_encodings": ["pkl", "pkl"]}, "which column holds the token ids"),
        ({"compression": "zstd"}, "compressed"),
        ({"raw_data": {"basename": "../x.mds", "bytes": 1}}, "names a file that is not in its folder"),
        ({"samples": 10**9}, "damaged"),
        ({"samples": None}, "damaged"),
    ],
)
def test_an_mds_index_that_is_wrong(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    shutil.copytree(FILES / "mds", tmp_path / "mds")
    index = json.loads((FILES / "mds" / "index.json").read_text())
    index["shards"][0].update(change)
    (tmp_path / "mds" / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=message):
        built(tmp_path / "mds", tmp_path / "store")


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1], None], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="does not hold token ids"):
        built(tmp_path / "a.npy", tmp_path / "store")


def test_megatrons_other_modalities_are_refused(tmp_path: Path) -> None:
    for suffix in ("bin", "idx"):
        shutil.copy(FILES / f"megatron-u16.{suffix}", tmp_path)
    with open(tmp_path / "megatron-u16.idx", "ab") as file:
        file.write(bytes([1] * 11))
    with pytest.raises(DataError, match="several modalities"):
        built(tmp_path / "megatron-u16.bin", tmp_path / "store")
