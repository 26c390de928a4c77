from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from orchestrator.config.schema import DataConfig, SourceConfig
from orchestrator.data import documents
from orchestrator.data.documents import Tally, find_corpus, read_documents, spec_of
from orchestrator.data.formats import reading, text
from orchestrator.data.formats.find import find_inputs
from orchestrator.data.formats.known_formats import FORMATS
from orchestrator.data.formats.reading import Input
from orchestrator.data.formats.rows import TextSpec
from orchestrator.errors import ConfigError, DataError

ROWS = [
    {"text": "one", "id": 1},
    {"text": "zwei — 日本", "id": 2},
    {"text": "", "id": 3},
    {"text": "vier\nlines", "id": 4},
]
WANTED = ["one", "zwei — 日本", "vier\nlines"]


def texts(*inputs: object, **spec: Any) -> list[str]:
    corpus = find_corpus([str(text) for text in inputs], TextSpec(**spec))
    return [document.text for document in corpus.documents()]


def left_out(*inputs: object, **spec: Any) -> dict[str, str]:
    return {
        entry.name: entry.reason for entry in find_inputs([str(text) for text in inputs], TextSpec(**spec)).left_out
    }


def compressed(name: str, data: bytes) -> bytes:
    if name.endswith((".zst", ".zstd", ".lz4")):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, "lz4" if name.endswith(".lz4") else "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    return pack(data)


def json_lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode() + b"\n\n"


def write_rows(path: Path) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    else:
        path.write_bytes(compressed(path.name, json_lines(ROWS)))
    return path


JSON_LINES = [
    *("a.jsonl", "a.ndjson", "a.json", "a.txt", "a", "a.JSONL", "part-00000"),
    *("a.jsonl.gz", "a.json.gz", "c4-train.00000-of-01024.json.gz", "a.jsonl.bz2", "a.ndjson.xz", "a.jsonl.zst"),
    *("a.json.lz4", "a.jsonl.zstd"),
]


@pytest.mark.parametrize("name", [*JSON_LINES, "a.parquet"])
def test_rows_of_every_format(tmp_path: Path, name: str) -> None:
    file = write_rows(tmp_path / name)
    assert texts(file) == texts(tmp_path) == WANTED
    (source,) = find_inputs([str(file)]).inputs
    assert source.format == ("parquet" if name == "a.parquet" else "jsonl")
    assert 0 < sum(document.consumed for document in read_documents(source, TextSpec())) <= file.stat().st_size


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a"])
def test_arrays_of_objects(tmp_path: Path, name: str, indent: int | None) -> None:
    (tmp_path / name).write_bytes(compressed(name, b"\xef\xbb\xbf" + json.dumps(ROWS, indent=indent).encode()))
    assert texts(tmp_path / name) == WANTED


def test_large_arrays_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.formats.jsonrows._CHUNK_CHARACTERS", 7)
    rows = [
        {"text": f'{number} ü\\" ]}}, ' * (number % 5 + 1), "n": number, "more": [1, {"a": []}]} for number in range(50)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert texts(tmp_path / "a.json") == [row["text"] for row in rows]
    (tmp_path / "a.json").write_text("[{}]")
    with pytest.raises(DataError, match="row 1"):
        texts(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "x"}, {"text": oops}]', r"not a JSON array that is whole: .*a\.json, row 2[\s\S]*oops"),
        ('[{"text": "x"} {"text": "y"}]', "a comma or ]"),
        ('[{"text": "x"},]', "a value after the comma"),
        ('[{"text": "x"}, {"te', r"row 2"),
        ('[{"text": "x"}', r"row 1"),
        ('[{"text": "x"}] 5', "nothing after"),
        ('[{"text": "x"}, 5]', r"no JSON object: .*row 2"),
    ],
)
def test_broken_arrays_are_named_by_element(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.json")


def test_a_file_that_is_one_object(tmp_path: Path) -> None:
    for number in range(3):
        content = json.dumps({"text": f"document {number}", "n": 1}, indent=2 if number else None)
        (tmp_path / f"{number}.json").write_text(content)
    (tmp_path / "stats.json").write_text('{\n "rows": 3\n}')
    assert texts(tmp_path) == ["document 0", "document 1", "document 2"]
    assert left_out(tmp_path) == {"stats.json": "JSON object"}
    with pytest.raises(DataError, match=r"nothing that can be trained on.*stats\.json[\s\S]*jq"):
        texts(tmp_path / "stats.json")


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_tables_of_delimited_text(tmp_path: Path, name: str, separator: str) -> None:
    lines = [["id", "text"], ["1", "one"], ["2", '"a, ""b""\r\nand\tc"'], ["3", ""], ["4", "é"]]
    content = "\r\n".join(separator.join(cells) for cells in lines).encode()
    (tmp_path / name).write_bytes(compressed(name, b"\xef\xbb\xbf" + content))
    assert texts(tmp_path / name) == ["one", 'a, "b"\r\nand\tc', "é"]
    assert texts(tmp_path / name, field="id") == ["1", "2", "3", "4"]
    with pytest.raises(DataError, match=r"no text column 'body'[\s\S]*columns id, text"):
        texts(tmp_path / name, field="body")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (b"1,x\n2\n", r"a\.csv:3[\s\S]*1 cells[\s\S]*2: id, text"),
        (b'1,x\n2,"a" b\n', r"not CSV: .*a\.csv:3"),
        (b'1,x\n2,"never\nclosed\n', r"not CSV: .*a\.csv:3"),
        (b"1,x\n2,caf\xe9\n", r"not text in UTF-8: .*a\.csv:3[\s\S]*0xe9"),
    ],
)
def test_bad_delimited_rows_are_named_by_line(tmp_path: Path, rows: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text\n" + b'0,"' + b"y\n" * 40_000 + b'"\n' + rows)
    with pytest.raises(DataError, match=message.replace(":3", ":40004")):
        texts(tmp_path / "a.csv")


def test_fields(tmp_path: Path) -> None:
    row = {"body": "x", "text": {"content": "y", "n": 3}, "a.b": "literal", "a": {"b": "nested"}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for file in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        assert texts(file, field="body") == ["x"]
        assert texts(file, field="text.content") == ["y"]
        assert texts(file, field="a.b") == ["literal"]
        assert texts(file, template=r"# {body}\n\n{text.content} {{{text.n}}}") == ["# x\n\ny {3}"]
        with pytest.raises(DataError, match="text"):
            texts(file)
        with pytest.raises(DataError, match=r"text\.nope"):
            texts(file, field="text.nope")


@pytest.mark.parametrize("template", ["no field", "{a!r}", "{a:>3}", "{a[0]}", "{}", "{a", "}"])
def test_what_is_no_template_is_refused(tmp_path: Path, template: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "x"}')
    with pytest.raises(ConfigError, match="template"):
        texts(tmp_path / "a.jsonl", template=template)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_become_text_only_by_choice(tmp_path: Path, suffix: str) -> None:
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), file)
    else:
        file.write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=r"list of messages[\s\S]*row 1|list of messages[\s\S]*:1[\s\S]*messages=plain"):
        texts(file, field="messages")
    assert texts(file, field="messages", messages="plain") == ["user: Hi?\n\nassistant: Yes."]


def test_messages_that_are_more_than_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"conversations": [{"from": "human", "value": "Hi", "weight": null}]}')
    assert texts(file, field="conversations", messages="plain") == ["human: Hi"]
    for more in ('"content": [{"type": "image"}]', '"content": null', '"content": "x", "tool_calls": [{"id": 1}]'):
        file.write_text(f'{{"conversations": [{{"role": "user", {more}}}]}}')
        with pytest.raises(DataError, match=r"more than a role and a text: .*a\.jsonl:1"):
            texts(file, field="conversations", messages="plain")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_nulls_are_errors_or_counted(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "x"}, {"text": None}, {"text": "y"}]
    file = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes(json_lines([*rows, {"id": 3}]))
    with pytest.raises(DataError, match=r"a\.(jsonl:2|parquet, row 2)\n[\s\S]*null[\s\S]*on_null=skip"):
        texts(file)
    corpus, tally = find_corpus([str(file)], TextSpec(on_null="skip")), Tally()
    assert [document.text for document in corpus.documents(tally)] == ["x", "y"]
    assert tally.null_rows == (1 if suffix == "parquet" else 2)
    if suffix == "jsonl":
        file.write_text('{"text": "x"}\n{"text": "\\ud800"}')
        assert texts(file, on_null="skip") == ["x"], "half of a surrogate pair is no text"
    with pytest.raises(DataError, match=r"no row has text in 'nope'|no text column"):
        texts(file, field="nope", on_null="skip")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x", "id": 3}', r"no text in 'text'[\s\S]*a\.jsonl:3[\s\S]*body, id"),
        ('{"text": 5}', r"a\.jsonl:3[\s\S]*text of type int"),
        ("[1]", r"a\.jsonl:3[\s\S]*JSON list"),
        ("{oops", r"not JSON[\s\S]*a\.jsonl:3[\s\S]*oops"),
        ('{"text": "\\ud800"}', r"surrogate pair: .*a\.jsonl:3[\s\S]*U\+D800"),
        ('{"text": ' + "[" * 100_000, r"not JSON: .*a\.jsonl:3[\s\S]*deep"),
        ('{"text": 1' + "0" * 5000 + "}", r"not JSON: .*a\.jsonl:3"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "x"}}\n\n{line}\n')
    with pytest.raises(DataError, match=message):
        texts(tmp_path / "a.jsonl")


def test_bad_tables_are_refused(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no text column 'body'[\s\S]*text \(string\), id \(int64\)"):
        texts(file, field="body")
    with pytest.raises(DataError, match="no text column 'id'"):
        texts(file, field="id")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([b"x"])}), file)
    with pytest.raises(DataError, match=r"text \(binary\)"):
        texts(file)
    invalid = pyarrow.array([b"x"] * 1500 + [b"caf\xe9"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), file)
    with pytest.raises(DataError, match=r"not text in UTF-8: .*a\.parquet, row 1501"):
        texts(file)
    content = file.read_bytes()
    file.write_bytes(content[:40] + b"\xff" * 20 + content[60:])
    with pytest.raises(DataError, match=r"a\.parquet"):
        texts(file)
    for damaged in (b"PAR1 nonsense", b"nonsense"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet"):
            texts(file)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "all null"])
@pytest.mark.parametrize("layout", ["parquet", "file", "stream"])
def test_every_kind_of_text_column(tmp_path: Path, kind: str, layout: str) -> None:
    column = pyarrow.array(["one", None, "three"] if kind != "all null" else [None] * 3)
    if kind == "dictionary":
        column = column.dictionary_encode()
    elif kind != "all null":
        column = column.cast(getattr(pyarrow, kind)())
    table = pyarrow.table({"id": [1, 2, 3], "text": column})
    if layout == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    else:
        writer = pyarrow.ipc.new_file if layout == "file" else pyarrow.ipc.new_stream
        with writer(str(tmp_path / "a.arrow"), table.schema) as sink:
            sink.write_table(table, max_chunksize=2)
    if kind == "all null":
        with pytest.raises(DataError, match=r"no row has text"):
            texts(tmp_path, on_null="skip")
    else:
        assert texts(tmp_path, on_null="skip") == ["one", "three"]


PACKED = ["gz", "bz2", "xz", "zst", "lz4"]


@pytest.mark.parametrize("kind", ["jsonl", "txt", "csv", "json"])
@pytest.mark.parametrize("suffix", PACKED)
def test_damage_of_compressed_files_names_file_and_place(tmp_path: Path, kind: str, suffix: str) -> None:
    rows = [{"text": f"{number * 7919} {number**7}"} for number in range(20_000)]
    content = {
        "jsonl": json_lines(rows),
        "txt": "\n".join(row["text"] for row in rows).encode(),
        "csv": "\n".join(["text", *(row["text"] for row in rows)]).encode(),
        "json": json.dumps(rows).encode(),
    }[kind]
    file = tmp_path / f"a.{kind}.{suffix}"
    packed = compressed(file.name, content)
    middle = len(packed) * 3 // 4
    changed = [packed[:middle] + b"\xff\x00" * 50 + packed[middle + 100 :]]
    if suffix == "zst":  # pyarrow writes no checksum; what it decodes then may be text
        changed = [packed[:-3], packed + packed[:7], packed + b"rest"]
    for damaged in (packed[:-2000], *changed, b"no archive"):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.{kind}\.{suffix}"):
            texts(file)


def test_zstd_with_a_large_window_says_what_to_do(tmp_path: Path) -> None:
    # A frame header that asks for a window of 1 GiB, and one raw block.
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, (30 - 10) << 3]) + (1 | 5 << 3).to_bytes(3, "little") + b'{"a":'
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    with pytest.raises(DataError, match=r"window[\s\S]*zstd -d --long=31"):
        texts(tmp_path / "a.jsonl.zst")


def test_long_rows_are_refused_before_they_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("reading", "streams", "jsonrows", "delimited"):
        monkeypatch.setattr(f"orchestrator.data.formats.{module}.MAX_ROW_BYTES", 3 << 20)
    long = "x" * (5 << 20)
    contents = {
        "a.jsonl.gz": json_lines([{"text": "x"}, {"text": long}]),
        "a.json": json.dumps([{"text": "x"}, {"text": long}]).encode(),
        "a.csv": b"id,text\n1,x\n2," + long.encode(),
        "b.csv": b'id,text\n1,x\n2,"' + b"y" * 40 + b"\n" * (5 << 20),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(compressed(name, content))
        with pytest.raises(DataError, match=rf"longer than 3 MiB: .*{name}(:|, row )[23]"):
            texts(tmp_path / name)


def test_folders_globs_and_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.py", ".hidden/d.txt", ".e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked").symlink_to(tmp_path / "deep")
    assert [item.name for item in find_inputs([str(tmp_path)]).inputs] == ["a.md", "b.txt", "deep/c.py"]
    reasons = left_out(tmp_path)
    assert reasons.keys() == {"image.png", "latin.txt", "gone.txt", "linked"}
    assert "not text" in reasons["image.png"]
    assert "UTF-8" in reasons["latin.txt"]
    assert texts(tmp_path / "*.md") == ["a.md"]
    assert texts(tmp_path / "**/*.py") == ["deep/c.py"]
    twice = find_inputs([str(tmp_path / "b.txt"), str(tmp_path / "b.txt")])
    assert len(twice.inputs) == 1


ABOUT_DATA = {
    "README.md": "---\nlicense: mit\n---\n# a data set\n",
    "LICENSE": "Permission is granted",
    "dataset_info.json": '{"features": {"text": "string"}}',
    "dataset_infos.json": '{\n "default": {}\n}',
    "state.json": '{"_fingerprint": "x"}',
    "_SUCCESS": "",
    "_metadata": "PAR1",
    "notes/card.md": "---\ntags: []\n---\n",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.csv"])
def test_texts_about_the_data_are_no_documents(tmp_path: Path, name: str) -> None:
    for about, content in ABOUT_DATA.items():
        (tmp_path / about).parent.mkdir(exist_ok=True)
        (tmp_path / about).write_text(content)
    if name == "a.csv":
        (tmp_path / name).write_text("text\n" + "\n".join(f'"{text}"' for text in WANTED))
    else:
        write_rows(tmp_path / name)
    assert texts(tmp_path) == texts(tmp_path / "*") == WANTED
    assert left_out(tmp_path).keys() == ABOUT_DATA.keys()
    for about in ("dataset_info.json", "state.json", "_metadata"):
        with pytest.raises(DataError, match="nothing that can be trained on"):
            texts(tmp_path / about)
    assert "a data set" in texts(tmp_path / "README.md")[0], "the user asked for this very file"


def test_a_folder_of_text_stays_one(tmp_path: Path) -> None:
    files = {**ABOUT_DATA, "a.md": "# a", "b.py": "b", "package.json": '{"name": "x"}', "tsconfig.json": "{\n // x\n}"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert sorted(texts(tmp_path)) == sorted(text for name, text in files.items() if text and name != "_metadata")
    assert left_out(tmp_path).keys() == {"_SUCCESS", "_metadata"}


def test_of_several_splits_only_the_one_to_train_on_is_read(tmp_path: Path) -> None:
    for name in ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", "validation/0.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    assert texts(tmp_path) == ["data/train-00000-of-00001.jsonl"]
    assert set(left_out(tmp_path).values()) == {"another split than train"}
    assert texts(tmp_path / "data/test*") == ["data/test-00000-of-00001.jsonl"]


NOT_READ: dict[str, tuple[bytes, str]] = {
    "a.tar": (b"a.txt" + bytes(252) + b"ustar\x0000" + bytes(300), "tar archive.*|unpack"),
    "a.tar.gz": (b"a.txt" + bytes(252) + b"ustar\x0000" + bytes(300), "tar archive.*|unpack"),
    "a.zip": (b"PK\x03\x04rest", "unzip"),
    "a.pt": (b"PK\x03\x04rest", "zip"),
    "a.pkl": (b"\x80\x04\x95", "pickle"),
    "a.warc.wet.gz": (b"WARC/1.0\r\nWARC-Type: warcinfo\r\n", "WARC"),
    "a.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    "a.txt": ("\ufeffzwei".encode("utf-16-le"), "iconv -f utf-16"),
    "b.txt": ("zwei".encode("utf-16-le"), "NUL"),
    "c.txt": ("caf\xe9 \xe9".encode("latin-1"), "0xe9 at 3"),
    "d.txt": (b"text\0more", "NUL bytes"),
    "a.pdf": (b"%PDF-1.7", "not text"),
    "shard.00000.mds": (b"\x01\0\0\0", "folder"),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read_is_named(tmp_path: Path, name: str) -> None:
    content, message = NOT_READ[name]
    (tmp_path / name).write_bytes(compressed(name, content))
    with pytest.raises(DataError, match=rf"nothing that can be trained on: .*{name}[\s\S]*({message})"):
        texts(tmp_path / name)
    with pytest.raises(DataError, match=rf"nothing to train on[\s\S]*1 left out: {name}"):
        texts(tmp_path)
    (tmp_path / "good.jsonl").write_text('{"text": "good"}')
    assert texts(tmp_path) == ["good"]
    assert left_out(tmp_path).keys() == {name}


TOKENS: dict[str, dict[str, bytes]] = {
    "Megatron": {"a_text_document.bin": bytes(80), "a_text_document.idx": b"MMIDIDX\x00\x00" + bytes(30)},
    "nanoGPT": {"train.bin": b"\x2e\x00" * 40, "val.bin": b"\x2e\x00" * 40},
    "llm.c": {"fineweb_train_000001.bin": (20240520).to_bytes(4, "little") + bytes(1100)},
    "NumPy": {"part-0-00000.npy": b"\x2e\x00" * 40},
}


@pytest.mark.parametrize("kind", TOKENS)
def test_tokens_of_other_software_are_known_and_no_text(tmp_path: Path, kind: str) -> None:
    for name, content in TOKENS[kind].items():
        (tmp_path / name).write_bytes(content)
    for path in (tmp_path, *(tmp_path / name for name in TOKENS[kind])):
        corpus = find_corpus([str(path)], TextSpec())
        assert corpus.holds_tokens
        assert FORMATS[corpus.inputs[0].format].title.startswith(f"{kind} tokens")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    if kind != "NumPy":
        with pytest.raises(DataError, match="documents and tokens"):
            texts(tmp_path)


def test_binary_files_beside_code_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "firmware.bin").write_bytes(b"\1\2\0")
    (tmp_path / "weights.npy").write_bytes(b"\x93NUMPY\1")
    (tmp_path / "a.py").write_text("pass")
    assert texts(tmp_path) == ["pass"]
    assert left_out(tmp_path).keys() == {"firmware.bin", "weights.npy"}


def test_damaged_text_is_named_by_byte(tmp_path: Path) -> None:
    content = ("é" * 700_000).encode() + b"\xe9 " + b"more" * 1000
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"not text in UTF-8: .*a\.txt[\s\S]*0xe9 at 1,400,000"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes(b"x" * 100_000 + b"\0")
    with pytest.raises(DataError, match=r"a\.txt[\s\S]*NUL character at character 100,000"):
        texts(tmp_path)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), Path("/proc/self/status"), Path("/proc/self/mem")):
        with pytest.raises(DataError):
            texts(path)
    with pytest.raises(DataError, match=r"fifo .*a FIFO"):
        texts(tmp_path)


def test_whatever_a_decoder_raises_names_file_and_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(item: Input, spec: TextSpec, place: reading.SourcePosition) -> reading.Rows:
        yield {"text": "x"}, 1
        place.row = 7
        raise RecursionError("too deep\nfor words")

    entry = reading.Format("jsonl", "", "", read=broken)
    monkeypatch.setitem(documents.FORMATS, "jsonl", entry)
    with pytest.raises(DataError, match=r"after .*a\.jsonl, row 7\n.*RecursionError: too deep\n"):
        list(read_documents(Input(tmp_path / "a.jsonl", "a.jsonl", "jsonl"), TextSpec()))


def test_nothing_found_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("nope.txt", "*.jsonl", "empty"):
        with pytest.raises(DataError) as caught:
            find_inputs([name])
        assert name in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert ".parquet" in str(caught.value)
        assert "Hub" not in str(caught.value) or name == "empty"


@pytest.mark.parametrize("name", ["wikitext", "HuggingFaceFW/fineweb"])
def test_names_of_the_hub_say_how_to_fetch_the_files(name: str) -> None:
    with pytest.raises(DataError, match=rf"hf download {name} --repo-type dataset"):
        find_inputs([name])
    with pytest.raises(DataError, match="fetch the files first"):
        find_inputs([f"hf://datasets/{name}"])


def test_long_texts_are_divided_at_line_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE_CHARACTERS", 100)
    content = "".join(f"line {number} é\r\n" for number in range(200))
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    pieces = texts(tmp_path / "long.txt")
    assert "".join(pieces) == content
    assert len(pieces) > 10
    assert all(len(piece) <= 200 and piece.endswith("\n") for piece in pieces)


def test_builtin_is_sizeable_and_without_tests() -> None:
    files = find_inputs(["builtin"]).inputs
    names = [file.name for file in files]
    assert len(files) > 400
    assert "json/decoder.py" in names
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert next(read_documents(files[0], TextSpec())).text
    assert names == [file.name for file in find_inputs(["builtin"]).inputs]


def test_sources_are_read_in_their_declared_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes("# -*- coding: latin-1 -*-\ns = 'é'\n".encode("latin-1"))
    (document,) = read_documents(Input(tmp_path / "a.py", "a.py", "python"), TextSpec())
    assert "é" in document.text


def test_what_was_left_out_is_grouped_and_printable(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.png").write_bytes(bytes(number + 1))
    (tmp_path / "\x1b[31m.zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"text": ""}')
    corpus, tally = find_corpus([str(tmp_path)], TextSpec(on_null="skip")), Tally()
    list(corpus.documents(tally))
    facts = json.loads(json.dumps(corpus.left_out_facts(tally)))
    assert len(facts["files"]["not text in UTF-8"]["names"]) == 20
    assert documents.describe_left_out(facts) == [
        "1 file: zip archive (?[31m.zip)",
        "30 files: not text in UTF-8 (00.png, 01.png, 02.png, ...)",
        "1 row without text (null, or without the field)",
        "1 row with empty text",
    ]


def test_a_source_may_say_where_its_text_is() -> None:
    own = DataConfig(text_field="body", on_null="skip", messages="plain")
    assert spec_of(own, SourceConfig()) == TextSpec("body", None, "plain", "skip")
    assert spec_of(own, SourceConfig(text_field="x")).field == "x"
    assert spec_of(own, SourceConfig(text_template="{x}")).fields == ("x",)
    shared = DataConfig(text_template="{a}{b}")
    assert spec_of(shared, SourceConfig()).fields == ("a", "b")
    assert spec_of(shared, SourceConfig(text_field="x")).fields == ("x",)
    for data, source in (
        (DataConfig(text_field="a", text_template="{b}"), SourceConfig()),
        (DataConfig(), SourceConfig("s", text_field="a", text_template="{b}")),
    ):
        with pytest.raises(ConfigError, match="one of them"):
            spec_of(data, source)
