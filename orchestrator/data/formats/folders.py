"""Folders that are one data set, recognised by their metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from orchestrator.data.formats.reading import Input, LeftOut
from orchestrator.data.store import is_store
from orchestrator.errors import DataError

_MAX_METADATA_BYTES = 64 << 20


def detect_folder(path: Path, name: str) -> tuple[Input, list[LeftOut]] | None:
    """Return the data set that a folder is, and what of it is left out; None for a folder of files.

    Args:
        path: the file.
        name: of the folder, as the user gave it.

    Raises:
        DataError: the folder is a data set that cannot be read, or has several splits and none is to train on.
    """
    if (splits := _json(path / "dataset_dict.json")) and isinstance(splits.get("splits"), list):
        return _dataset_dict(path, name, [str(split) for split in splits["splits"]])
    if (state := _json(path / "state.json")) and isinstance(state.get("_data_files"), list):
        return _saved(path, name, state), []
    index = _json(path / "index.json")
    if is_store(path):
        return Input(path, name, "store"), []
    if index is None:
        return None
    found = None
    if isinstance(index.get("shards"), list) and index["shards"]:
        found = _mds(path, name, index["shards"])
    elif isinstance(index.get("chunks"), list) and isinstance(index.get("config"), dict):
        found = _litdata(path, name, index)
    return (found, []) if found else None


def member(folder: Path, name: object, where: str) -> Path:
    """Return the file of a data set that its metadata names, which has to lie in its folder.

    Args:
        folder: the folder.
        name: as in the metadata.
        where: the metadata, for messages.

    Raises:
        DataError: the name leads out of the folder, or there is no such file.
    """
    file = folder / str(name)
    if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"the data set names a file that is not in its folder: {folder / where}", got=repr(name)[:200])
    if not file.is_file():
        raise DataError(
            f"a file of the data set is missing: {file}", got=f"it is listed in {where}", fix="fetch the folder again"
        )
    return file


def _json(path: Path) -> dict[str, Any] | None:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_METADATA_BYTES:
            return None
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _dataset_dict(path: Path, name: str, splits: list[str]) -> tuple[Input, list[LeftOut]]:
    if "train" not in splits:
        raise DataError(
            f"the data set has no split 'train': {path}",
            got=f"splits {', '.join(splits)}",
            allowed="a split 'train', or the folder of one split",
            fix=f"name the folder of the split: {path / splits[0] if splits else path}",
        )
    state = _json(member(path, "train/state.json", "dataset_dict.json"))
    if state is None or not isinstance(state.get("_data_files"), list):
        raise DataError(f"the data set's metadata is damaged: {path / 'train' / 'state.json'}", fix="save it again")
    others = [LeftOut(f"{name}/{split}", "another split than train") for split in splits if split != "train"]
    return _saved(path / "train", f"{name}/train", state), others


def _saved(path: Path, name: str, state: dict[str, Any]) -> Input:
    if state.get("_indices_data_files"):
        raise DataError(
            f"the data set is saved with a selection of its rows: {path}",
            got="_indices_data_files in state.json",
            fix="save it without: dataset.flatten_indices().save_to_disk(...)",
        )
    files = [entry.get("filename") if isinstance(entry, dict) else None for entry in state["_data_files"]]
    if not files:
        raise DataError(f"the data set has no rows: {path}", got="no _data_files in state.json")
    return Input(path, name, "save_to_disk", parts=tuple(member(path, file, "state.json") for file in files))


def _mds(path: Path, name: str, shards: list[Any]) -> Input | None:
    try:
        encodings = {encoding for shard in shards for encoding in shard["column_encodings"]}
        names = [(shard["zip_data"] or shard["raw_data"])["basename"] for shard in shards]
    except (TypeError, KeyError):
        return None
    parts = tuple(member(path, file, "index.json") for file in names)
    kind = "mds" if encodings & {"str", "json"} else "mds-tokens"
    return Input(path, name, kind, parts=(*parts, path / "index.json"))


def _litdata(path: Path, name: str, index: dict[str, Any]) -> Input | None:
    try:
        formats = index["config"]["data_format"]
        names = [chunk["filename"] for chunk in index["chunks"]]
    except (TypeError, KeyError):
        return None
    parts = tuple(member(path, file, "index.json") for file in names)
    is_text = isinstance(formats, list) and any(str(entry) in ("str", "string") for entry in formats)
    return Input(path, name, "litdata" if is_text else "litdata-tokens", parts=(*parts, path / "index.json"))
