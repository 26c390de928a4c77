"""Data sets as other software writes them: as many documents and tokens as were put in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config.schema import TokenizerConfig
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.prepare import build_store
from orchestrator.errors import DataError

FIXTURES = Path(__file__).parent / "fixtures"
TEXTS = [f'{number}: "quoted", zwei — 日本\n' + "more\ttext, " * (number % 9) for number in range(1, 61)]
ROWS = [{"id": number, "text": text, "meta": {"lang": "de"}} for number, text in enumerate(TEXTS)]
FLAT = [{"id": row["id"], "text": row["text"]} for row in ROWS]


def pandas_writes(how: str, path: Path) -> None:
    import pandas

    frame = pandas.DataFrame(ROWS if how in ("json", "lines", "parquet") else FLAT)
    {
        "csv": lambda: frame.to_csv(path, index=False),
        "json": lambda: frame.to_json(path, orient="records"),
        "lines": lambda: frame.to_json(path, orient="records", lines=True),
        "parquet": lambda: frame.astype({"text": "category"}).to_parquet(path),
        "feather": lambda: frame.to_feather(path),
    }[how]()


def polars_writes(how: str, path: Path) -> None:
    import polars

    frame = polars.DataFrame(FLAT if how == "csv" else ROWS)
    {
        "csv": lambda: frame.write_csv(path, separator="\t"),
        "json": lambda: frame.write_json(path),
        "lines": lambda: frame.write_ndjson(path),
        "parquet": lambda: frame.write_parquet(path),
        "ipc": lambda: frame.write_ipc(path),
        "stream": lambda: frame.write_ipc_stream(path),
    }[how]()


def duckdb_writes(how: str, path: Path) -> None:
    import duckdb
    import pyarrow

    rows = pyarrow.Table.from_pylist(FLAT if how == "csv" else ROWS)  # noqa: F841 (duckdb finds it by its name)
    form = {"csv": "csv, header", "lines": "json", "json": "json, array true", "parquet": "parquet, compression zstd"}
    duckdb.connect().execute(f"copy (select * from rows) to '{path}' (format {form[how]})")


def datasets_writes(how: str, path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    if how == "dict":
        other = datasets.Dataset.from_list([{"id": 0, "text": "of the test split", "meta": {"lang": "en"}}])
        datasets.DatasetDict({"test": other, "train": rows}).save_to_disk(path, num_shards={"test": 1, "train": 2})
        return
    {
        "disk": lambda: rows.save_to_disk(path, num_shards=3),
        "lines": lambda: rows.to_json(path, compression="gzip" if path.suffix == ".gz" else None),
        "csv": lambda: rows.remove_columns("meta").to_csv(path, index=False),
        "parquet": lambda: rows.to_parquet(path),
    }[how]()


def python_writes(how: str, path: Path) -> None:
    import bz2
    import gzip
    import lzma

    lines = "".join(json.dumps(row, ensure_ascii=how == "ascii") + "\n" for row in ROWS).encode()
    pack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(pack.get(path.suffix, bytes)(lines))


WRITTEN: list[tuple[Callable[[str, Path], None], str, str]] = [
    *((pandas_writes, how, name) for how, name in [("csv", "a.csv"), ("json", "a.json"), ("lines", "a.json.gz")]),
    *((pandas_writes, how, name) for how, name in [("parquet", "a.parquet"), ("feather", "a.feather")]),
    *((polars_writes, how, name) for how, name in [("csv", "a.tsv"), ("json", "a.json"), ("lines", "a.ndjson")]),
    *(
        (polars_writes, how, name)
        for how, name in [("parquet", "a.parquet"), ("ipc", "a.arrow"), ("stream", "b.arrow")]
    ),
    *((duckdb_writes, how, name) for how, name in [("csv", "a.csv"), ("lines", "a.json"), ("json", "b.json")]),
    (duckdb_writes, "parquet", "a.parquet"),
    *((datasets_writes, how, name) for how, name in [("disk", "saved"), ("dict", "splits"), ("lines", "a.json.gz")]),
    *((datasets_writes, how, name) for how, name in [("csv", "a.csv"), ("parquet", "a.parquet")]),
    *((python_writes, "ascii", f"a.jsonl{suffix}") for suffix in ("", ".gz", ".bz2", ".xz")),
    (python_writes, "plain", "part-00000"),
]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def prepared(path: Path, output: Path, **spec: Any) -> tuple[int, int]:
    """Documents and tokens of a store of bytes."""
    bytes_ = TokenizerConfig(kind="bytes")
    store = build_store([str(path)], output, bytes_, TextSpec(**spec), validation_fraction=0, workers=1, progress=False)
    return store.index.splits["train"].documents, store.index.splits["train"].tokens


@pytest.mark.parametrize(("writer", "how", "name"), WRITTEN, ids=[f"{w.__name__}-{h}-{n}" for w, h, n in WRITTEN])
def test_every_document_arrives(tmp_path: Path, writer: Callable[[str, Path], None], how: str, name: str) -> None:
    folder = tmp_path / "written"
    folder.mkdir()
    writer(how, folder / name)
    wanted = len(TEXTS), sum(len(text.encode()) + 1 for text in TEXTS)
    assert prepared(folder / name, tmp_path / "store") == wanted
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert prepared(folder, tmp_path / "again") == wanted
    if how in ("json", "lines", "parquet", "disk", "ipc"):
        assert prepared(folder, tmp_path / "nested", field="meta.lang") == (len(TEXTS), 3 * len(TEXTS))


@pytest.mark.parametrize("name", ["mds", "mds-zstd", "litdata", "litdata-text", "litdata-0.2.40"])
def test_every_document_of_a_folder_arrives(tmp_path: Path, name: str) -> None:
    texts = ["one", "zwei — 日本", "vier\nlines"]
    assert prepared(FIXTURES / name, tmp_path / "store") == (3, sum(len(text.encode()) + 1 for text in texts))
    if name != "litdata-text":
        with pytest.raises(DataError, match=r"no text column 'body'[\s\S]*text"):
            prepared(FIXTURES / name, tmp_path / "wrong", field="body")


@pytest.mark.parametrize("name", ["mds", "mds-zstd", "litdata", "litdata-text", "litdata-0.2.40"])
def test_damage_in_a_folder_names_the_file(tmp_path: Path, name: str) -> None:
    import shutil

    folder = tmp_path / name
    for damage in ("cut", "gone", "changed"):
        shutil.copytree(FIXTURES / name, folder, dirs_exist_ok=True)
        last = sorted(path for path in folder.iterdir() if path.name != "index.json")[-1]
        content = last.read_bytes()
        if damage == "gone":
            last.unlink()
        else:
            last.write_bytes(content[:-5] if damage == "cut" else b"\xff" * 8 + content[8:])
        with pytest.raises(DataError, match=last.name):
            prepared(folder, tmp_path / "store")
    for part in sorted(FIXTURES.joinpath(name).iterdir()):
        with pytest.raises(DataError, match="nothing that can be trained on"):
            prepared(part, tmp_path / "part")


def test_a_file_that_leads_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(DataError, match="not in its folder"):
        prepared(tmp_path / "saved", tmp_path / "store")
