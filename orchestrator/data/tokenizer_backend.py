"""The library of Hugging Face that splits text, and what it raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from orchestrator.data.tokenizer_files import ALLOWED
from orchestrator.errors import DataError


def load_backend(text: str) -> Any:
    """Load a vocabulary into the library, which neither cuts nor fills up.

    Args:
        text: the content of a `tokenizer.json`.

    Raises:
        DataError: it is none.
    """
    from tokenizers import Tokenizer as Backend

    try:
        backend: Any = Backend.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and where it panics not even that
        raise DataError("this is not a tokenizer that can be read", got=str(error)[:200], allowed=ALLOWED) from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def encode_all(backend: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Encode texts, each into int64 of shape [tokens], without what a post-processor puts around them.

    Args:
        backend: a vocabulary in the library.
        texts: the texts.

    Raises:
        DataError: it has no tokens for one of them.
    """
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings(backend, texts, offsets=False)]


def encodings(backend: Any, texts: Sequence[str], offsets: bool = True) -> list[Any]:
    """Encode texts as `encode_all` does, into the library's own records.

    Args:
        backend: a vocabulary in the library.
        texts: the texts.
        offsets: with where in the text each token is.
    """
    try:
        encode = backend.encode_batch if offsets else backend.encode_batch_fast
        return list(encode(texts, add_special_tokens=False))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as above
        raise DataError(
            "the tokenizer cannot turn a text into tokens",
            got=str(error)[:200],
            allowed="a vocabulary that covers the text, or has a token for what it does not know",
        ) from None
