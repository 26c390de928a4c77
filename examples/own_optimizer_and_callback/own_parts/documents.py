"""A data reader and a document transform: mail as documents, and none that are short."""

from __future__ import annotations

import email
import email.policy
from collections.abc import Iterator
from pathlib import Path


def read_mail(path: Path) -> Iterator[dict[str, str]]:
    """Read a message, or those of a folder: subject and plain text as one document each.

    Args:
        path: an .eml file, or a folder of them.

    Yields:
        Rows with the field `text`, which is what `data.text_field` names by default.
    """
    for file in sorted(path.rglob("*.eml")) if path.is_dir() else [path]:
        message = email.message_from_bytes(file.read_bytes(), policy=email.policy.default)
        body = message.get_body(("plain",))
        if body is not None:
            yield {"text": f"{message['subject']}\n\n{body.get_content()}"}


def drop_short(text: str, characters: int = 200) -> str | None:
    """Leave out a document that is shorter than so many characters.

    Args:
        text: of the document.
        characters: the least length that is kept.

    Returns:
        The text, or None to leave the document out.
    """
    return text if len(text) >= characters else None
