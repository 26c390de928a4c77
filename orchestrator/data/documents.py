"""Read documents from the inputs of a source, one at a time, and record what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from orchestrator.config.schema import DataConfig, SourceConfig, TokensConfig
from orchestrator.data.builtin_conversations import conversations_about
from orchestrator.data.conversation import ALLOWED, Conversation, columns_of, conversation_of
from orchestrator.data.formats.find import find_inputs
from orchestrator.data.formats.known_formats import FORMATS
from orchestrator.data.formats.reading import Input, LeftOut, SourcePosition
from orchestrator.data.formats.rows import TextSpec
from orchestrator.data.own_documents import OwnDocuments, find_own_inputs
from orchestrator.data.pairs import pair_of
from orchestrator.errors import ConfigError, DataError, UserError

_NAMES_KEPT = 20  # of what was left out, per reason
_NAMES_SHOWN = 3
_COLUMNS = ("parquet", "arrow", "save_to_disk", "mds", "mds-tokens", "litdata", "litdata-tokens")  # may hold ids


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        text: of the document.
        consumed: bytes of the input file that reading it took, for a progress bar.
    """

    text: str
    consumed: int

    @property
    def size(self) -> int:
        """Characters of the text."""
        return len(self.text)


@dataclass
class Tally:
    """Counts of rows that gave no document.

    Attributes:
        null_rows: rows whose field is null or missing.
        empty_documents: rows whose text is empty.
        transformed_away: rows that the document transform has left out.
        unanswered: conversations of which nothing counts in the loss.
    """

    null_rows: int = 0
    empty_documents: int = 0
    transformed_away: int = 0
    unanswered: int = 0


@dataclass(frozen=True)
class Corpus:
    """The files of one source, how their rows become text, and which files are left out.

    Attributes:
        named: the inputs as the user wrote them.
        inputs: the files.
        left_out: files that are not read.
        spec: the fields of a document.
        holds_tokens: they were made by other software; there are no documents of text.
    """

    named: tuple[str, ...]
    inputs: tuple[Input, ...]
    left_out: tuple[LeftOut, ...]
    spec: TextSpec
    holds_tokens: bool = False
    own: OwnDocuments = OwnDocuments()

    @property
    def size_bytes(self) -> int:
        """Bytes of all input files."""
        return sum(item.size_bytes for item in self.inputs)

    @property
    def is_plain(self) -> bool:
        """Whether bytes of the files are bytes of text, nearly."""
        no_text = ("parquet", "arrow", "save_to_disk")
        return self.own.reader is None and not any(item.compression or item.format in no_text for item in self.inputs)

    @property
    def facts(self) -> list[Any]:
        """What the documents depend on beside the files, for a key."""
        return [*self.spec.facts, *self.own.facts]

    def documents(self, tally: Tally | None = None) -> Iterator[Document]:
        """All documents in order; rows without text are counted in `tally`.

        Raises:
            DataError: an input is damaged, or a row is not as it should be; names the file and the row.
            PartError: code of the user's own failed.
        """
        for item in self.inputs:
            yield from read_documents(item, self.spec, tally, self.own)

    def conversations(self, tally: Tally | None = None) -> Iterator[Conversation]:
        """All conversations in order; rows without one are counted in `tally`.

        Raises:
            DataError: as of `documents`.
            PartError: code of the user's own failed.
        """
        for item in self.inputs:
            yield from read_conversations(item, self.spec, tally, self.own)

    def left_out_facts(self, tally: Tally) -> dict[str, Any]:
        """Return what was left out, for the index of a store: counts, and names by reason. Empty if nothing was.

        Args:
            tally: counts what was read and left out.
        """
        reasons: dict[str, dict[str, Any]] = {}
        for entry in self.left_out:
            fact = reasons.setdefault(entry.reason, {"count": 0, "names": []})
            fact["count"] += 1
            if len(fact["names"]) < _NAMES_KEPT:
                fact["names"].append(entry.name)
        facts = {"files": reasons, "null_rows": tally.null_rows, "empty_documents": tally.empty_documents}
        facts |= {name: count for name in ("transformed_away", "unanswered") if (count := getattr(tally, name))}
        return facts if any(facts.values()) else {}


def find_corpus(
    inputs: Sequence[str], spec: TextSpec, tokens: TokensConfig | None = None, own: OwnDocuments | None = None
) -> Corpus:
    """Find the documents that inputs stand for.

    Args:
        inputs: paths, globs, folders or `builtin`.
        spec: the fields of a document.
        own: code of the user's own that reads or changes documents.
        tokens: with a column, tables and data sets are read as tokens.

    Raises:
        ConfigError: `spec` has a template that is none.
        DataError: an input matches nothing, or is nothing that can be trained on.
    """
    if not spec.fields:
        raise AssertionError("a template names a field")
    own, column = own or OwnDocuments(), tokens.column if tokens else None
    own.check()
    if own.names and column is not None:
        raise ConfigError(
            "a data reader and a document transform of one's own work on text",
            got=f"data.tokens.column={column}",
            fix="leave out one of them",
        )
    if own.reader is not None:
        return Corpus(
            tuple(inputs), tuple(item for name in inputs for item in find_own_inputs(name)), (), spec, own=own
        )
    if spec.holds_conversations and own.transform is not None:
        raise ConfigError(
            "a document transform works on text, and conversations are no text",
            got="data.transform with data.messages=chat",
            fix="leave out one of them",
        )
    found = find_inputs(inputs, spec)
    kinds = {_holds_tokens(item, column): item for item in found.inputs}
    if len(kinds) > 1:
        raise DataError(
            "the input holds documents of text and tokens of other software",
            got=" and ".join(f"{item.path} ({FORMATS[item.format].title})" for item in kinds.values()),
            allowed="one of the two in one source",
            fix="name them as two sources",
        )
    if True in kinds and own.transform is not None:
        raise ConfigError(
            "a document transform works on text, and the source holds tokens",
            got=f"data.transform for {', '.join(map(str, inputs))}",
            fix="leave out data.transform, or give the text",
        )
    return Corpus(tuple(inputs), found.inputs, found.left_out, spec, True in kinds, own)


def _holds_tokens(item: Input, column: str | None) -> bool:
    """Whether an input is read as tokens.

    Raises:
        DataError: it is not read at all.
    """
    entry = FORMATS[item.format]
    if entry.holds == "tokens" or (column is not None and item.format in _COLUMNS):
        return True
    if column is not None or entry.read is None:
        raise DataError(
            f"the input holds no tokens that are read: {item.path}",
            got=entry.title + (f", with data.tokens.column={column}" if column is not None else ""),
            allowed=f"a column of ids in one of {', '.join(FORMATS[name].title for name in _COLUMNS)}",
            fix="leave out data.tokens.column to read text",
        )
    return False


def spec_of(config: DataConfig, source: SourceConfig) -> TextSpec:
    """Return where the text of a source's rows is: as the source says, else as the data says.

    Args:
        config: the `data` group of a run.
        source: a source of the mixture.

    Raises:
        ConfigError: a field and a template are given together.
    """
    for what, field, template in (
        ("data", None if config.text_field == "text" else config.text_field, config.text_template),
        (f"the source {source.path}", source.text_field, source.text_template),
    ):
        if field is not None and template is not None:
            raise ConfigError(
                f"{what} has a text_field and a text_template",
                got=f"text_field={field} text_template={template!r}",
                allowed="one of them",
            )
    if source.text_template is not None:
        field, template = config.text_field, source.text_template
    elif source.text_field is not None:
        field, template = source.text_field, None
    else:
        field, template = config.text_field, config.text_template
    return TextSpec(field, template, config.messages or "refuse", config.on_null)


def read_documents(
    item: Input, spec: TextSpec, tally: Tally | None = None, own: OwnDocuments | None = None
) -> Iterator[Document]:
    """Yield the documents of an input in order; empty ones are left out and counted.

    Args:
        item: the file, or the files that are one data set.
        spec: where the text of a row is.
        tally: counts what gives no document.
        own: code of the user's own that reads or changes documents.

    Raises:
        DataError: the input is damaged, or a row is not as it should be; names the file and the row.
        PartError: code of the user's own failed.
    """
    if spec.holds_conversations:
        for conversation in read_conversations(item, spec, tally, own):
            yield Document("\n\n".join(conversation.texts()), conversation.consumed)
        return
    tally, own = tally if tally is not None else Tally(), own or OwnDocuments()
    place, rows, nulls = SourcePosition(item.path), 0, 0
    for row, consumed in _guarded(_rows(item, spec, place, own), place):
        rows += 1
        text = row if isinstance(row, str) else spec.text_of(row, place)
        if text and own.transform is not None and (text := own.transformed(text, place)) is None:
            tally.transformed_away += 1
            continue
        if text is None or (spec.on_null == "skip" and not _is_unicode(text)):
            nulls += 1
        elif not text:
            tally.empty_documents += 1
        else:
            yield Document(text if _is_unicode(text) else _no_unicode(text, place), consumed)
    tally.null_rows += nulls
    if rows and nulls == rows:
        raise DataError(
            f"no row has text in {', '.join(map(repr, spec.fields))}: {item.path}",
            got=f"{rows:,} rows, null or without the field",
            fix="name the field: text_field=... (data.text_field, or text_field of the source, in a run)",
        )


def read_conversations(
    item: Input, spec: TextSpec, tally: Tally | None = None, own: OwnDocuments | None = None
) -> Iterator[Conversation]:
    """Yield the conversations of an input in order; empty ones are left out and counted.

    Args:
        item: the file, or the files that are one data set.
        spec: which column has the messages.
        tally: counts what gives no conversation.
        own: code of the user's own that reads rows.

    Raises:
        DataError: the input is damaged, or a row is not as it should be; names the file and the row.
        PartError: code of the user's own failed.
    """
    tally, own = tally if tally is not None else Tally(), own or OwnDocuments()
    if item.format == "python":
        yield from conversations_about(item)
        return
    place = SourcePosition(item.path)
    for row, consumed in _guarded(_rows(item, spec, place, own), place):
        if isinstance(row, str):
            raise DataError(
                f"the input holds text, and no conversations: {item.path}",
                got=FORMATS[item.format].title if item.format in FORMATS else "a text",
                allowed=f"JSON Lines, JSON arrays, Parquet, Arrow or CSV with {ALLOWED}",
                fix="leave out data.messages to train on the text",
            )
        pairs = spec.messages == "preference"
        if spec.on_null == "skip" and not columns_of(tuple(row), spec.named_field, pairs):
            tally.null_rows += 1
            continue
        found = pair_of(row, place, consumed) if pairs else conversation_of(row, spec.named_field, place, consumed)
        if found is None and spec.on_null == "error":
            raise DataError(
                f"the row has no conversation: {place}",
                got="null",
                fix="skip and count such rows: on_null=skip (data.on_null=skip in a run)",
            )
        if found is None:
            tally.null_rows += 1
        elif not found.messages:
            tally.empty_documents += 1
        else:
            yield found


def _rows(item: Input, spec: TextSpec, place: SourcePosition, own: OwnDocuments) -> Iterator[tuple[Any, int]]:
    if own.reader is not None:
        for row in own.rows(item.path):
            place.row += 1
            yield row, 0  # how many bytes that took, the reader alone knows
        return
    read = FORMATS[item.format].read
    if read is None:
        raise AssertionError(f"{item.format} is not read as documents")
    yield from read(item, spec, place)


def describe_left_out(facts: Mapping[str, Any]) -> list[str]:
    """Format what was left out as lines for users, from `Corpus.left_out_facts`.

    Args:
        facts: as `Corpus.left_out_facts` gives them.
    """
    lines = []
    files = facts.get("files") or {}
    for reason, fact in files.items():
        count, names = int(fact["count"]), [_printable(name) for name in fact["names"]]
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if count > _NAMES_SHOWN else "")
        lines.append(f"{count:,} {'file' if count == 1 else 'files'}: {_printable(reason)} ({shown})")
    for key, what in (
        ("null_rows", "without text (null, or without the field)"),
        ("empty_documents", "with empty text"),
        ("transformed_away", "left out by the document transform"),
        ("unanswered", "without anything that the loss counts: nothing that the assistant says"),
    ):
        if count := int(facts.get(key) or 0):
            lines.append(f"{count:,} {'row' if count == 1 else 'rows'} {what}")
    return lines


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)[:200]


def _guarded(rows: Iterator[Any], place: SourcePosition) -> Iterator[Any]:
    """Whatever a decoder raises names the file and how far the reading had come."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:
            raise _damaged(place, error) from error
        yield row


def _damaged(place: SourcePosition, error: Exception) -> DataError:
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0][:300]
    where = f"after {place}" if place.row or place.byte else str(place)
    if isinstance(error, EOFError):
        return DataError(f"the compressed file ends early: {where}", got=text, fix="fetch or write it again")
    return DataError(
        f"the input cannot be read: {where}",
        got=f"{type(error).__name__}: {text}",
        fix="check that the file is complete and may be read; fetch or write it again",
    )


def _is_unicode(text: str) -> bool:
    """JSON can spell half of a surrogate pair, which no encoding of text has."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _no_unicode(text: str, place: SourcePosition) -> NoReturn:
    at = next(index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    raise DataError(
        f"the text has half of a surrogate pair: {place}",
        got=f"U+{ord(text[at]):04X} at character {at:,}",
        allowed="Unicode text",
        fix="mend the row, or skip and count such rows: on_null=skip (data.on_null=skip in a run)",
    )
