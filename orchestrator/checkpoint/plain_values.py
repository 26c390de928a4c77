"""Python values as JSON and back, without pickle: what Lightning keeps of a training beside its tensors.

JSON has no tuples, paths, tensors, infinities and keys that are no strings; each of them is an object with one key that
begins with `$`. Nothing else is understood, and nothing that is read is executed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from orchestrator.checkpoint.writer import DTYPE_NAMES
from orchestrator.errors import CheckpointError

_INLINE_ELEMENTS = 64  # of a tensor whose elements are written out
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_SKIPPED = object()


class PlainEncoder:
    """Turns values into what JSON can carry.

    Args:
        store: takes a tensor of more than a few elements and returns the name that it is stored by; None: such tensors
            are left out.

    Attributes:
        left_out: where values were that cannot be carried, and their types: `callbacks.Mine.model: a Linear`.
    """

    def __init__(self, store: Callable[[Tensor], str] | None = None):
        self._store = store
        self.left_out: list[str] = []

    def encode(self, value: Any, where: str = "") -> Any:
        """Return `value` as JSON data; parts that cannot be carried are missing in it and named in `left_out`.

        Args:
            value: any Python value.
            where: dotted place of it, for `left_out`.
        """
        encoded = self._encode(value, where)
        return None if encoded is _SKIPPED else encoded

    def _encode(self, value: Any, where: str) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if isinstance(value, Mapping):
            return self._mapping(value, where)
        if isinstance(value, (list, tuple, set, frozenset)):
            return self._sequence(value, where)
        if isinstance(value, PurePath):
            return {"$path": str(value)}
        if isinstance(value, timedelta):
            return {"$seconds": value.total_seconds()}
        if isinstance(value, Enum):  # of the standard types below, such as Lightning's string enumerations
            return self._encode(value.value, where)
        for kind in (str, bool, int, float):  # and NumPy's float64, which is a float
            if isinstance(value, kind):
                return self._encode(kind(value), where)
        return self._skip(value, where)

    def _tensor(self, value: Tensor, where: str) -> Any:
        if value.dtype not in DTYPE_NAMES:
            return self._skip(value, where)
        if type(value) in (Tensor, torch.nn.Parameter) and value.numel() <= _INLINE_ELEMENTS:
            elements = [self._encode(element, where) for element in value.detach().reshape(-1).tolist()]
            return {"$tensor": [DTYPE_NAMES[value.dtype], list(value.shape), elements]}
        if self._store is None:
            return self._skip(value, where)
        return {"$stored": self._store(value.detach())}

    def _mapping(self, value: Mapping[Any, Any], where: str) -> Any:
        pairs = [(key, self._encode(item, f"{where}.{key}" if where else str(key))) for key, item in value.items()]
        kept = [(key, item) for key, item in pairs if item is not _SKIPPED]
        if type(value) is not Counter and all(type(key) is str and not key.startswith("$") for key, _ in kept):
            return dict(kept)
        keys = [self._encode(key, f"a key of {where}") for key, _ in kept]
        items = [[key, item] for key, (_, item) in zip(keys, kept, strict=True) if key is not _SKIPPED]
        return {"$counter" if type(value) is Counter else "$items": items}

    def _sequence(self, value: Any, where: str) -> Any:
        items = [self._encode(item, f"{where}[{number}]") for number, item in enumerate(value)]
        # A list without one of its elements would be another list.
        if any(item is _SKIPPED for item in items):
            return _SKIPPED
        if isinstance(value, list):
            return items
        return {"$tuple" if isinstance(value, tuple) else "$set": items}

    def _skip(self, value: Any, where: str) -> Any:
        self.left_out.append(f"{where or 'the value'}: a {type(value).__name__}")
        return _SKIPPED


def decode(data: Any, load: Callable[[str], Tensor] | None = None) -> Any:
    """Return the value that `PlainEncoder.encode` has made `data` of.

    Args:
        data: as read from JSON.
        load: returns a tensor by the name that it was stored by.

    Raises:
        CheckpointError: an object is none that an encoder writes.
    """
    if isinstance(data, list):
        return [decode(item, load) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1 or not next(iter(data)).startswith("$"):
        return {key: decode(item, load) for key, item in data.items()}
    ((kind, content),) = data.items()
    try:
        if kind == "$stored" and load is not None:
            return load(content)
        return _DECODERS[kind]([decode(item, load) for item in content] if isinstance(content, list) else content)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError("a value of the checkpoint cannot be read", got=ascii(data)[:200]) from error


def _tensor(content: Any) -> Tensor:
    dtype, shape, elements = content
    return torch.tensor(elements, dtype=_DTYPES[dtype]).reshape(shape)


_DECODERS: Mapping[str, Callable[[Any], Any]] = {
    "$float": lambda text: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[text],
    "$tensor": _tensor,
    "$items": dict,
    "$counter": lambda items: Counter(dict(items)),
    "$tuple": tuple,
    "$set": set,
    "$path": Path,
    "$seconds": lambda seconds: timedelta(seconds=seconds),
}
