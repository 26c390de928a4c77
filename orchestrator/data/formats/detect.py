"""Detect the format of a file by its content and name."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from orchestrator.data.formats.streams import SUFFIXES, compression_of, open_stream

HEAD_BYTES = 1 << 16
# name of a format -> (offset, bytes) that only such files have
_MAGIC: tuple[tuple[str, int, bytes], ...] = (
    ("parquet", 0, b"PAR1"),
    ("arrow", 0, b"ARROW1\x00\x00"),
    ("part", 0, b"MMIDIDX\x00\x00"),
    ("numpy", 0, b"\x93NUMPY"),
    ("llmc", 0, (20240520).to_bytes(4, "little")),
    ("llmc", 0, (20240801).to_bytes(4, "little")),
    ("tar", 257, b"ustar"),
    ("zip", 0, b"PK\x03\x04"),
    ("zip", 0, b"PK\x05\x06"),
    ("warc", 0, b"WARC/"),
    ("pickle", 0, b"\x80\x02"),
    ("pickle", 0, b"\x80\x03"),
    ("pickle", 0, b"\x80\x04"),
    ("pickle", 0, b"\x80\x05"),
    ("lfs-pointer", 0, b"version https://git-lfs.github.com/spec/"),
    ("utf-16", 0, codecs.BOM_UTF16_LE),
    ("utf-16", 0, codecs.BOM_UTF16_BE),
    ("utf-16", 0, codecs.BOM_UTF32_BE),
    ("binary", 0, b"%PDF-"),
)
_BY_SUFFIX = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".npy": "numpy",
    ".bin": "nanogpt",
    ".mds": "part",
    ".idx": "part",
}
_TABLES = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow"}
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "index.json"}
_METADATA_ALWAYS = {"_success", "_metadata", "_common_metadata", "_committed", "_started", "sha256sums", "md5sums"}
_CARD = re.compile(r"readme(\.(md|markdown|rst|txt))?|datacard\.md", re.IGNORECASE)
_LICENCE = re.compile(r"(licen[cs]e|copying|notice)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Detected:
    """The detected format of a file.

    Attributes:
        format: name of a row of `registry.FORMATS`.
        compression: around the file; None: none.
        detail: what is wrong or special about this file, if anything.
        beside_data: the format that a text turns out to be where data files are beside it: a card, a licence.
    """

    format: str
    compression: str | None = None
    detail: str = ""
    beside_data: str | None = None


def detect(path: Path) -> Detected:
    """Detect the format of a file by its name and its first bytes.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be opened.
    """
    special = _special(path)
    if special:
        return Detected("special", detail=special)
    raw = _head(path, None)
    if not path.stat().st_size and raw:
        return Detected("special", detail="it has no size (a file of /proc?)")
    compression = compression_of(raw)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    named = SUFFIXES.get(suffixes[-1]) if suffixes else None
    if named:
        stem = ".tar" if suffixes[-1] == ".tgz" else ""
        suffixes = [*suffixes[:-1], *([stem] if stem else [])]
    if named and named != compression and raw:
        return Detected("binary", detail=f"its name says {named}, its content does not")
    suffix = suffixes[-1] if suffixes else ""
    try:
        head = _head(path, compression) if compression else raw
    except Exception:  # damaged: reading it will say where
        return Detected(_BY_SUFFIX.get(suffix, "text"), compression)
    return _by_content(path, head, suffix, compression)


def _by_content(path: Path, head: bytes, suffix: str, compression: str | None) -> Detected:
    if path.name.lower() in _METADATA_ALWAYS:
        return Detected("metadata", compression)
    found = next((name for name, at, magic in _MAGIC if head.startswith(magic, at)), None)
    if (found is None and suffix == ".arrow") or _is_arrow_stream(head):
        found = "arrow"
    if found in ("parquet", "arrow") and compression:
        return Detected("binary", compression, detail=f"a {found} file within {compression}: unpack it first")
    if found:
        return Detected(found, compression)
    if suffix in _TABLES and head:
        return Detected("binary", compression, detail=f"its name says {_TABLES[suffix]}, its content does not")
    if _BY_SUFFIX.get(suffix) in ("numpy", "nanogpt", "part"):
        return Detected(_BY_SUFFIX[suffix], compression)
    if reason := _not_text(head, whole=len(head) < HEAD_BYTES):
        return Detected("binary", compression, detail=reason)
    return _text_kind(path, head.removeprefix(codecs.BOM_UTF8), suffix, compression)


def _text_kind(path: Path, head: bytes, suffix: str, compression: str | None) -> Detected:
    rows = _json_kind(head, whole=len(head) < HEAD_BYTES - 3)
    if rows == "json-object" and path.name.lower() in _METADATA:
        return Detected("text", compression, beside_data="metadata")
    by_suffix = _BY_SUFFIX.get(suffix)
    if by_suffix == "jsonl" and rows != "json-array":
        return Detected("jsonl", compression)
    if rows:
        return Detected(rows, compression)
    if by_suffix:
        return Detected(by_suffix, compression)
    if suffix == ".json":
        return Detected("json-object" if head.strip() else "jsonl", compression)
    beside = "licence" if _LICENCE.fullmatch(path.name) else None
    if _CARD.fullmatch(path.name) or (suffix == ".md" and head.startswith((b"---\n", b"---\r\n"))):
        beside = "card"
    return Detected("text", compression, beside_data=beside)


def _json_kind(head: bytes, whole: bool) -> str | None:
    """jsonl, json-array or json-object if a text evidently is."""
    start = head.lstrip()
    if re.match(rb"\[\s*\{", start):
        return "json-array"
    if not re.match(rb'\{\s*("|\})', start):
        return None
    lines = [line for line in start.split(b"\n") if line.strip()]
    if not whole and len(lines) > 1:
        lines.pop()  # it may be cut
    elif not whole:
        return "jsonl"  # a long first row; an object over several lines would have shown a line end by now
    rows = [_is_object(line) for line in lines[:2]]
    if all(rows):
        return "jsonl" if len(rows) > 1 else "json-object"
    if rows[0]:
        return "jsonl"  # reading it will name the row that is none
    return "json-object" if not whole or _is_object(start) else None


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _not_text(head: bytes, whole: bool) -> str:
    if b"\0" in head:
        return f"it holds NUL bytes (the first at byte {head.index(0):,})"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, whole)
    except UnicodeDecodeError as error:
        return f"byte 0x{head[error.start]:02x} at {error.start:,} ({error.reason})"
    return ""


def _is_arrow_stream(head: bytes) -> bool:
    """Recognise a message of Arrow's IPC: a marker, the length of the metadata, and a flatbuffer."""
    if len(head) < 16 or not head.startswith(b"\xff\xff\xff\xff"):
        return False
    length = int.from_bytes(head[4:8], "little", signed=True)
    root = int.from_bytes(head[8:12], "little")
    return 0 < length < 1 << 24 and length % 8 == 0 and root < length


def _special(path: Path) -> str:
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return ""
    kinds = ((stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"))
    return next((name for test, name in kinds if test(mode)), "a device")


def _head(path: Path, compression: str | None) -> bytes:
    content, raw = open_stream(path, compression)
    with raw, content:
        head = b""
        while len(head) < HEAD_BYTES and (more := content.read(HEAD_BYTES - len(head))):
            head += more
        return head
