"""Documents by code of the user's own: a reader of what the product does not read, and a transform of each document."""

from __future__ import annotations

import glob
import hashlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from orchestrator.config.registry import OwnPart, trace
from orchestrator.config.schema import DataConfig, SourceConfig
from orchestrator.data.formats.find import BUILTIN
from orchestrator.data.formats.reading import Input
from orchestrator.errors import ConfigError, DataError, PartError

FORMAT = "own"  # of an `Input` that a reader of the user's reads

Row = Mapping[str, Any] | str


@dataclass(frozen=True)
class OwnDocuments:
    """What a user's configuration puts in place of the reading of files, or behind it.

    Attributes:
        reader: called with the `pathlib.Path` of a file or folder, gives rows: texts, or mappings with fields. None:
            files are read by their format.
        transform: called with the text of each document, gives the text in its place, or None to leave it out.
    """

    reader: OwnPart | None = None
    transform: OwnPart | None = None

    @cached_property
    def facts(self) -> list[Any]:
        """What the documents depend on, for the key of the cache: names, arguments, and the files of the code."""
        parts = [part for part in (self.reader, self.transform) if part]
        return [[part.kind, part.named, dict(part.arguments), _code_digest(part)] for part in parts]

    @property
    def names(self) -> dict[str, str]:
        """Kind and name of each part, for the record."""
        return {part.kind: part.named for part in (self.reader, self.transform) if part}

    def check(self) -> None:
        """Import what is named and hold it against how it is called.

        Raises:
            ConfigError: it cannot be found, or does not take its arguments.
        """
        for part in (self.reader, self.transform):
            if part is not None:
                _called(part)

    def rows(self, path: Path) -> Iterator[Row]:
        """Call the reader on a file or folder.

        Args:
            path: of one of the inputs of `find_own_inputs`.

        Yields:
            Rows: texts, or mappings with fields.

        Raises:
            PartError: the reader raised, or gave something that is no row.
        """
        assert self.reader is not None
        reader = self.reader
        with_errors = _Blame(reader, path)
        for row in with_errors.iterate(with_errors.call(_called(reader), path)):
            if not isinstance(row, (str, Mapping)):
                raise PartError(
                    f"the data reader gave something that is no document: {path}",
                    got=f"{reader.key}._target_={reader.named} gave {type(row).__name__}",
                    allowed="an iterable of texts (str), or of mappings with the field data.text_field",
                )
            yield row

    def transformed(self, text: str, place: object) -> str | None:
        """Call the transform on the text of a document; None: the document is left out.

        Args:
            text: of one document.
            place: where it was read, for messages.

        Raises:
            PartError: the transform raised, or gave neither text nor None.
        """
        if self.transform is None:
            return text
        result = _Blame(self.transform, place).call(self._transform, text)
        if result is None or isinstance(result, str):
            return result
        raise PartError(
            f"the document transform gave something that is no text: {place}",
            got=f"{self.transform.key}._target_={self.transform.named} gave {type(result).__name__}",
            allowed="text (str), or None to leave the document out",
        )

    @cached_property
    def _transform(self) -> Callable[[Any], Any]:
        assert self.transform is not None
        return _called(self.transform)


def own_documents(config: DataConfig, source: SourceConfig) -> OwnDocuments:
    """Return the user's own parts for a source: those of the source, else those of the data.

    Args:
        config: the `data` group of a run.
        source: a source of the mixture.

    Raises:
        ConfigError: one is not named by `_target_`.
    """
    key = f"data.sources[{config.sources.index(source)}].reader" if source.reader else "data.reader"
    reader = source.reader or ({} if source.path == BUILTIN else config.reader)
    return OwnDocuments(
        OwnPart.of("data reader", reader, key) if reader else None,
        OwnPart.of("document transform", config.transform, "data.transform") if config.transform else None,
    )


def find_own_inputs(named: str) -> tuple[Input, ...]:
    """Return what a reader is called with: the path that a source names, or each that its pattern matches.

    Args:
        named: path or glob pattern of files or folders. A folder is one input, whatever it holds.

    Raises:
        DataError: there is nothing.
    """
    path = Path(named).expanduser()
    found = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    if not found:
        raise DataError(
            "there is nothing for the data reader to read",
            got=named,
            allowed="the path of a file or folder, or a pattern that matches some",
            fix="check the path of the source",
        )
    return tuple(Input(item, item.name, FORMAT, parts=tuple(_files(item)) if item.is_dir() else ()) for item in found)


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder in a fixed order: what the reader's documents may depend on."""
    for here, folders, names in os.walk(folder):
        folders.sort()
        yield from (path for name in sorted(names) if (path := Path(here) / name).is_file())


def _called(part: OwnPart) -> Callable[[Any], Any]:
    """Return the function that is named, with its arguments; or an object of the class that is, made with them."""
    found = part.find()
    if inspect.isclass(found):
        made = part.make()
        if not callable(made):
            raise ConfigError(
                f"the {part.kind} cannot be called",
                got=f"{part.key}._target_={part.named}, a class without __call__",
                allowed="a function, or a class whose objects can be called",
            )
        return made
    part.check(None)
    return partial(found, **part.arguments)


def _code_digest(part: OwnPart) -> str:
    """sha256 of the file that holds the code, so that what was made by an older one is made again."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(part.find()))
    except TypeError:  # a builtin, or an object of a class
        file = None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


class _Blame:
    """Says whose error it is what the user's code raises, with its traceback."""

    def __init__(self, part: OwnPart, place: object):
        self._part, self._place = part, place

    def call(self, function: Callable[[Any], Any], argument: Any) -> Any:
        try:
            return function(argument)
        except Exception as error:
            raise self._error(error) from error

    def iterate(self, rows: Iterable[Any]) -> Iterator[Any]:
        iterator = self.call(iter, rows)
        end = object()
        while (row := self.call(lambda it: next(it, end), iterator)) is not end:
            yield row

    def _error(self, error: Exception) -> PartError:
        part = self._part
        return PartError(
            f"the {part.kind} failed: {self._place}",
            got=f"{part.key}._target_={part.named}\n{trace(error, __file__)}",
            fix=f"mend it, or leave out {part.key}",
        )
