"""The table of known files and folders: those of documents, those of tokens, and those of neither."""

from __future__ import annotations

from orchestrator.data.formats import arrow, delimited, jsonrows, litdata, mds, text
from orchestrator.data.formats.reading import Format

_SPLITTABLE = "name the folder of the data set instead; it knows what the file holds"
_TABLE = (
    Format("text", "plain text, Markdown, code", "UTF-8 text that is none of the others", read=text.read),
    Format("python", "Python sources", "builtin", read=text.read_python),
    Format(
        "jsonl",
        "JSON Lines",
        ".jsonl .ndjson .json or any other name, by content: an object per line",
        read=jsonrows.read_json_lines,
    ),
    Format(
        "json-array", "JSON array", ".json or any other name, by content: [{...}, ...]", read=jsonrows.read_json_array
    ),
    Format(
        "json-object",
        "JSON object",
        "a file that is one object with the wanted fields",
        read=jsonrows.read_json_object,
        advice="data is an object per line, or an array of objects; jq -c '.FIELD[]' takes an array out of an object",
    ),
    Format("csv", "CSV", ".csv; the first line names the columns (RFC 4180)", read=delimited.read_csv),
    Format("tsv", "TSV", ".tsv; as CSV, with tabs", read=delimited.read_tsv),
    Format("parquet", "Parquet", "content", read=arrow.read_parquet),
    Format("arrow", "Arrow file or stream, Feather", "content", read=arrow.read_arrow),
    Format(
        "save_to_disk",
        "folder of datasets.save_to_disk",
        "state.json, dataset_info.json; of several splits: train",
        read=arrow.read_arrow,
    ),
    Format(
        "mds",
        "MosaicML streaming (MDS) folder",
        "index.json that lists .mds shards with a column of text",
        read=mds.read_mds,
    ),
    Format("litdata", "LitData folder", "index.json that lists chunks of text", read=litdata.read_litdata),
    Format("megatron", "Megatron tokens", "NAME.idx by content, with NAME.bin beside it", holds="tokens"),
    Format("nanogpt", "nanoGPT tokens", ".bin that is none of the others", holds="tokens"),
    Format("llmc", "llm.c tokens", ".bin, by content", holds="tokens"),
    Format("numpy", "NumPy tokens (OLMo)", ".npy, with or without NumPy's header", holds="tokens"),
    Format("mds-tokens", "MDS folder of tokens", "the same, without columns of text", holds="tokens"),
    Format("litdata-tokens", "LitData folder of tokens", "the same, without items of text", holds="tokens"),
    Format(
        "store",
        "prepared token store",
        "index.json",
        holds="nothing",
        advice="a store is a source by itself: data.sources='[{path: STORE, weight: 1}]'",
    ),
    Format(
        "lfs-pointer",
        "Git LFS pointer, not the file itself",
        "content",
        holds="nothing",
        advice="fetch the content: git lfs pull",
    ),
    Format("card", "dataset card", "a README or front matter beside data files", holds="nothing"),
    Format("licence", "licence", "LICENSE, COPYING beside data files", holds="nothing"),
    Format(
        "metadata",
        "metadata",
        "dataset_info.json, state.json, index.json, _SUCCESS, _metadata beside data",
        holds="nothing",
        advice="name the data files, or their folder",
    ),
    Format(
        "part",
        "a part of a folder that is one data set",
        ".mds, a chunk of LitData, an .idx",
        holds="nothing",
        advice=_SPLITTABLE,
    ),
    Format(
        "tar",
        "tar archive (WebDataset among them)",
        "content",
        holds="nothing",
        advice="unpack it (tar -xf) and name the folder or the files",
    ),
    Format(
        "zip", "zip archive", "content", holds="nothing", advice="unpack it (unzip) and name the folder or the files"
    ),
    Format(
        "warc",
        "WARC or WET archive of web pages",
        "content",
        holds="nothing",
        advice="take the texts out first (for example with warcio or datatrove) and write JSON Lines",
    ),
    Format("pickle", "pickle or PyTorch file", "content", holds="nothing", advice="leave it out: it is never opened"),
    Format(
        "utf-16",
        "text in UTF-16 or UTF-32",
        "byte order mark",
        holds="nothing",
        advice="convert it: iconv -f utf-16 -t utf-8 FILE (or utf-32)",
    ),
    Format(
        "binary",
        "not text in UTF-8",
        "content",
        holds="nothing",
        advice="leave it out, or convert it (text: iconv -f <its encoding> -t utf-8; tables: to Parquet)",
    ),
    Format("special", "not a regular file", "its kind", holds="nothing", advice="write its content to a file first"),
)
FORMATS: dict[str, Format] = {entry.name: entry for entry in _TABLE}


def describe_formats() -> str:
    """Return the formats as aligned lines for `--help`."""
    shown = [entry for entry in _TABLE if entry.holds != "nothing"]
    width = max(len(entry.title) for entry in shown)
    lines = [f"  {entry.title:<{width}}  {entry.known_by}" for entry in shown]
    refused = ", ".join(entry.title for entry in _TABLE if entry.holds == "nothing" and entry.name != "special")
    return "\n".join([*lines, f"  not read: {refused}"])
