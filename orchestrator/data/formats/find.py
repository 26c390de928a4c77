"""Expand paths, globs and folders to input files, and record what is left out."""

from __future__ import annotations

import glob
import os
import re
import sysconfig
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.data.formats.detect import Detected, detect
from orchestrator.data.formats.folders import detect_folder
from orchestrator.data.formats.known_formats import FORMATS
from orchestrator.data.formats.reading import Input, LeftOut, SourcePosition
from orchestrator.data.formats.rows import TextSpec, has_fields
from orchestrator.errors import DataError

BUILTIN = "builtin"
_ALLOWED = (
    "'builtin', a prepared store, or files and folders by path or glob: text, JSON Lines and JSON arrays (also .gz, "
    ".zst, .bz2, .xz), CSV, TSV, .parquet, .arrow, folders of save_to_disk"
)
_TEST_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SPLIT = re.compile(r"(train|training|test|testing|validation|valid|val|dev|eval|evaluation)(?:$|[-_.])")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w-]*(/[A-Za-z0-9][\w.-]*)?")
_ADDRESS = re.compile(r"[a-z][a-z0-9+]*://")


@dataclass(frozen=True)
class FoundFiles:
    """The files that inputs expand to, in a fixed order, and those left out.

    Attributes:
        inputs: what is read.
        left_out: what is not.
    """

    inputs: tuple[Input, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def find_inputs(inputs: Sequence[str], spec: TextSpec | None = None) -> FoundFiles:
    """List the files that paths, globs (`**` crosses folders), folders and `builtin` stand for, each once.

    Args:
        inputs: paths, globs, folders or `builtin`.
        spec: the fields of a document; tells a JSON object that is a document from other JSON.

    Raises:
        DataError: an input matches nothing, or one that was named is nothing that can be trained on.
    """
    spec = spec or TextSpec()
    found: list[Input] = []
    left_out: list[LeftOut] = []
    for text in inputs:
        part = FoundFiles(tuple(_builtin_files())) if text == BUILTIN else _search(text, spec)
        if not part.inputs:
            raise _nothing(text, part.left_out)
        found.extend(part.inputs)
        left_out.extend(part.left_out)
    unique = {item.path.resolve(): item for item in reversed(found)}
    kept = [item for item in found if unique[item.path.resolve()] is item]
    return FoundFiles(tuple(kept), tuple(dict.fromkeys(left_out)))


def _builtin_files() -> list[Input]:
    """List the sources of the Python standard library, without its tests: text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Input] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _TEST_DIRS and not name.startswith("config-"))
        # _sysconfigdata describes the build, not the language.
        paths = [Path(folder, n) for n in sorted(names) if n.endswith(".py") and not n.startswith("_sysconfigdata")]
        files.extend(Input(path, path.relative_to(root).as_posix(), "python") for path in paths if _has_encoding(path))
    return files


def _has_encoding(path: Path) -> bool:
    try:
        with open(path, "rb") as raw:
            tokenize.detect_encoding(raw.readline)
    except SyntaxError:
        return False
    return True


def _search(text: str, spec: TextSpec) -> FoundFiles:
    path = Path(text).expanduser()
    if "\0" in text:
        return FoundFiles()
    if path.is_dir():
        return _Search(spec).folder(path, path.name or str(path), top=True).result(text)
    if path.exists():
        return FoundFiles((_named(path, spec),))
    search = _Search(spec)
    for match in sorted(glob.glob(str(path), recursive=True)):
        found = Path(match)
        if not found.is_dir():
            search.file(found, match)
        elif not text.endswith("**"):
            search.folder(found, match)
    return search.result(text)


def _named(path: Path, spec: TextSpec) -> Input:
    """Return the input of a path that the user named.

    Raises:
        DataError: it is nothing that can be trained on.
    """
    detected = _look_at(path, spec)
    kind = detected.beside_data if detected.beside_data in ("metadata", "json-object") else detected.format
    if kind == "nanogpt" and path.with_suffix(".idx").is_file():
        return _megatron(path, path.name)
    if kind == "part" and path.suffix == ".idx" and path.with_suffix(".bin").is_file():
        return _megatron(path.with_suffix(".bin"), path.with_suffix(".bin").name)
    if kind == "nanogpt" and (whole := detect_folder(path.parent, "")) and path in whole[0].files:
        kind = "part"
    entry = FORMATS[kind]
    if entry.holds == "nothing" or detected.beside_data == kind:
        raise DataError(
            f"the file is nothing that can be trained on: {path}",
            got=entry.title + (f": {detected.detail}" if detected.detail else ""),
            allowed=_ALLOWED,
            fix=entry.advice,
        )
    return Input(path, path.name, kind, detected.compression)


def _look_at(path: Path, spec: TextSpec) -> Detected:
    """Detect what a file is; a JSON object is a document if it has the fields of one.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        detected = detect(path)
    except OSError as error:
        raise DataError(
            f"the input cannot be read: {path}", got=error.strerror or str(error), fix="check that it may be read"
        ) from error
    if detected.format != "json-object":
        return detected
    item = Input(path, path.name, "json-object", detected.compression)
    try:
        read = FORMATS["json-object"].read
        assert read is not None
        if all(has_fields(row, spec) for row, _ in read(item, spec, SourcePosition(path))):
            return detected
    except Exception:  # not JSON, or damaged: it is what its text is
        pass
    return Detected("text", detected.compression, beside_data="json-object")


def _megatron(path: Path, name: str) -> Input:
    return Input(path, name, "megatron", parts=(path, path.with_suffix(".idx")))


@dataclass
class _Search:
    """What a search in folders comes across: documents that are files, texts that may be about them, the rest."""

    spec: TextSpec
    inputs: list[Input] = field(default_factory=list)
    beside: dict[Path, str] = field(default_factory=dict)  # of a text: what it is where there are data files
    left_out: list[LeftOut] = field(default_factory=list)

    def folder(self, root: Path, shown: str, top: bool = False) -> _Search:
        """Everything below a folder, without hidden files and folders."""
        for folder, folders, names in os.walk(root):
            here = Path(folder)
            inside = here.relative_to(root)
            name = inside.as_posix() if inside.parts else shown
            if whole := detect_folder(here, name):
                folders[:] = []
                self._whole(*whole)
                continue
            links = [entry for entry in folders if (here / entry).is_symlink()]
            self.left_out += [LeftOut((inside / entry).as_posix(), "link to a folder") for entry in sorted(links)]
            folders[:] = sorted(entry for entry in folders if not entry.startswith((".", "__pycache__")))
            for entry in sorted(names):
                if not entry.startswith("."):
                    self.file(here / entry, (inside / entry).as_posix())
        return self

    def file(self, path: Path, name: str) -> None:
        if not path.exists():
            self.left_out.append(LeftOut(name, "broken link"))
            return
        detected = _look_at(path, self.spec)
        if detected.format == "nanogpt" and path.with_suffix(".idx").is_file():
            self.inputs.append(_megatron(path, name))
        elif detected.format == "part" and path.suffix == ".idx" and path.with_suffix(".bin").is_file():
            pass  # read with its .bin
        elif FORMATS[detected.format].holds == "nothing":
            self.left_out.append(LeftOut(name, FORMATS[detected.format].title, detected.detail))
        else:
            self.inputs.append(Input(path, name, detected.format, detected.compression))
            if detected.beside_data:
                self.beside[path] = detected.beside_data

    def result(self, text: str) -> FoundFiles:
        """Return what is read: beside data files texts about them are left out, and of several splits all but train."""
        data = [item for item in self.inputs if item.format != "text"]
        kept: list[Input] = []
        splits = {item.path: _split_of(item.name) for item in data}
        several = "train" in splits.values() and len({split for split in splits.values() if split}) > 1
        for item in self.inputs:
            if data and item.path in self.beside:
                self.left_out.append(LeftOut(item.name, FORMATS[self.beside[item.path]].title))
            elif several and splits.get(item.path) not in (None, "train"):
                self.left_out.append(LeftOut(item.name, "another split than train"))
            else:
                kept.append(item)
        return FoundFiles(tuple(_without_strays(text, kept, self.left_out)), tuple(self.left_out))

    def _whole(self, item: Input, left_out: list[LeftOut]) -> None:
        self.left_out += left_out
        if FORMATS[item.format].holds == "nothing":
            self.left_out.append(LeftOut(item.name, FORMATS[item.format].title))
        else:
            self.inputs.append(item)


def _split_of(name: str) -> str | None:
    """Return the split that a name speaks of, train, test or validation; None if it speaks of none."""
    for part in reversed(Path(name).parts):
        if match := _SPLIT.match(part.lower()):
            return "train" if match[1].startswith("train") else match[1]
    return None


def _without_strays(text: str, items: list[Input], left_out: list[LeftOut]) -> list[Input]:
    """Leave out binary files that only their suffix makes tokens, where there are documents.

    Raises:
        DataError: the search found documents and tokens.
    """
    documents = [item for item in items if FORMATS[item.format].holds == "documents"]
    tokens = [item for item in items if FORMATS[item.format].holds == "tokens"]
    if not documents or not tokens:
        return items
    strays = [item for item in tokens if item.format in ("nanogpt", "numpy") and not _split_of(item.name)]
    left_out += [LeftOut(item.name, FORMATS["binary"].title) for item in strays]
    if tokens := [item for item in tokens if item not in strays]:
        raise DataError(
            f"the input holds documents and tokens of other software: {text}",
            got=f"{tokens[0].name} ({FORMATS[tokens[0].format].title}) and {documents[0].name}"
            f" ({FORMATS[documents[0].format].title})",
            allowed="one of the two",
            fix="name the files that are meant, or a glob of them",
        )
    return documents


def _nothing(text: str, left_out: Sequence[LeftOut]) -> DataError:
    if left_out:
        shown = "; ".join(map(str, left_out[:5]))
        more = f"; and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        got = f"{text}: {len(left_out)} left out: {shown}{more}"
        return DataError("there is nothing to train on in the input", got=got, allowed=_ALLOWED)
    fix = "check the path; quote a glob so that the shell leaves it alone"
    text = text.removeprefix(f"{Path.cwd()}{os.sep}")
    if _ADDRESS.match(text):
        fix = "fetch the files first; data is read from files of this machine"
    elif _HUB_NAME.fullmatch(text) and not re.search(r"\.[a-z]\w{1,6}$", text):
        fix += (
            "; a data set of the Hugging Face Hub has to be fetched first: "
            f"hf download {text} --repo-type dataset --local-dir data/{text.rpartition('/')[2]}"
        )
    return DataError("no data is found", got=f"{text} (looked for in {Path.cwd()})", allowed=_ALLOWED, fix=fix)
