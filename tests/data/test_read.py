from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from orchestrator.data import read
from orchestrator.data.read import find_inputs, read_documents
from orchestrator.errors import DataError

ROWS = [
    {"text": "one", "id": 1},
    {"text": "zwei — 日本", "id": 2},
    {"text": "", "id": 3},
    {"text": "vier\nlines", "id": 4},
]
WANTED = ["one", "zwei — 日本", "vier\nlines"]


def texts(*inputs: object, text_field: str = "text") -> list[str]:
    files = find_inputs([str(text) for text in inputs])
    return [document.text for file in files for document in read_documents(file, text_field)]


def write_rows(path: Path) -> Path:
    lines = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n\n"
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines))
    elif path.name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    else:
        path.write_bytes(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_rows_of_every_format(tmp_path: Path, name: str) -> None:
    file = write_rows(tmp_path / name)
    assert texts(file) == WANTED
    (source,) = find_inputs([str(file)])
    assert 0 < sum(document.consumed for document in read_documents(source)) <= file.stat().st_size


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}')
    assert texts(tmp_path / "a.jsonl", text_field="body") == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 3}', r"no text in 'text'[\s\S]*a\.jsonl:3[\s\S]*body, id"),
        ('{"text": 5}', r"a\.jsonl:3[\s\S]*text of type int"),
        ("[1]", r"a\.jsonl:3[\s\S]*JSON list"),
        ("{oops", r"not JSON[\s\S]*a\.jsonl:3[\s\S]*oops"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n\n{line}\n')
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.jsonl")


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no text column 'body'[\s\S]*text \(string\), id \(int64\)"):
        texts(file, text_field="body")
    with pytest.raises(DataError, match="no text column 'id'"):
        texts(file, text_field="id")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), file)
    with pytest.raises(DataError, match=r"a\.parquet, row 2"):
        texts(file)
    file.write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"not a Parquet file.*a\.parquet"):
        texts(file)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz"])
def test_a_truncated_archive_is_named(tmp_path: Path, name: str) -> None:
    content = "\n".join(json.dumps({"text": f"{number * 7919}"}) for number in range(5000))
    (tmp_path / name).write_bytes(gzip.compress(content.encode())[:-2000])
    with pytest.raises(DataError, match=rf"ends early.*{name}"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.gz", "a.jsonl.zst"])
def test_what_is_no_archive_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("no archive")
    with pytest.raises(DataError, match=name):
        texts(tmp_path / name)


def test_directories_globs_and_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.py", ".hidden/d.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    names = [file.name for file in find_inputs([str(tmp_path)])]
    assert names == ["a.md", "b.txt", "image.png", "latin.txt", "deep/c.py"]
    assert texts(tmp_path / "*.md") == ["a.md"]
    assert texts(tmp_path / "**/*.py") == ["deep/c.py"]
    twice = find_inputs([str(tmp_path / "b.txt"), str(tmp_path / "b.txt")])
    assert len(twice) == 1


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 \xe9".encode("latin-1"))
    with pytest.raises(DataError, match=r"not text in UTF-8.*latin\.txt[\s\S]*0xe9"):
        texts(tmp_path / "latin.txt")  # the user asked for this very file
    with pytest.raises(read.UnreadableFile):
        texts(tmp_path)  # a search found it


def test_nothing_found_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for text in ("nope.txt", "*.jsonl", "empty"):
        with pytest.raises(DataError) as caught:
            find_inputs([text])
        assert text in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert ".parquet" in str(caught.value)


def test_long_texts_are_divided_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "PIECE_CHARACTERS", 100)
    content = "".join(f"line {number} é\r\n" for number in range(200))
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    pieces = texts(tmp_path / "long.txt")
    assert "".join(pieces) == content
    assert len(pieces) > 10
    assert all(len(piece) <= 200 and piece.endswith("\n") for piece in pieces)


def test_builtin_is_sizeable_and_without_tests() -> None:
    files = find_inputs(["builtin"])
    names = [file.name for file in files]
    assert len(files) > 400
    assert "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert next(read_documents(files[0])).text
    assert names == [file.name for file in find_inputs(["builtin"])]


def test_sources_are_read_in_their_declared_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"))
    (document,) = read_documents(read.InputFile(tmp_path / "a.py", "a.py", "python"))
    assert "é" in document.text
    (tmp_path / "b.py").write_bytes(b"# coding: martian\n")
    with pytest.raises(read.UnreadableFile):
        list(read_documents(read.InputFile(tmp_path / "b.py", "b.py", "python")))
