"""Every message is read as it was written, whatever its fields are called."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from orchestrator.islands.island_messages import ANSWERS, REQUESTS, read, write


def _example(hint):
    if dataclasses.is_dataclass(hint):
        return hint(**{name: _example(kind) for name, kind in typing.get_type_hints(hint).items()})
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return arguments[-1]
    if origin is tuple:
        return (_example(arguments[0]),) * 2 if Ellipsis in arguments else tuple(map(_example, arguments))
    if arguments:
        return _example(next(one for one in arguments if one is not type(None)))
    return {int: 7, float: 0.5, str: "text", bool: True}[hint]


@pytest.mark.parametrize(("kinds", "name"), [(kinds, name) for kinds in (REQUESTS, ANSWERS) for name in kinds])
def test_a_message_is_read_as_it_was_written(kinds, name):
    message = _example(kinds[name])
    assert read(write(message), kinds) == message
