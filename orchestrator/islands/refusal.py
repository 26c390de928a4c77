"""Requests that the hub does not accept."""

from __future__ import annotations

from orchestrator.islands.island_messages import Refused


class RefusedError(Exception):
    """A request that is not accepted.

    Args:
        refused: the answer.
    """

    def __init__(self, refused: Refused):
        super().__init__(refused.what)
        self.refused = refused


def refuse(what: str, got: object = "", allowed: object = "", fix: str = "", again: bool = False) -> RefusedError:
    """Return what is raised where asking again does not help.

    Args:
        what: is wrong.
        got: value.
        allowed: values.
        fix: what to do.
        again: starting the island again helps.
    """
    return RefusedError(Refused(what, str(got)[:1000], str(allowed)[:1000], fix, again=again))
