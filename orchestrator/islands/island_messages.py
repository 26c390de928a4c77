"""What islands and the hub of their run tell each other: requests, answers, and their check when they are read.

A request is one JSON object and any number of frames of bytes; so is its answer. What comes from the network is
believed in nothing: `read` accepts exactly the fields of a message, of their types, and within bounds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from orchestrator.errors import UserError

PROTOCOL = 1
"""Version of the messages: islands of another one are refused."""
MAX_HEADER_BYTES = 8 << 20
"""Of the JSON of a message."""
MAX_FRAME_BYTES = 64 << 20
"""Of one tensor part on the way; larger ones are cut."""
MAX_FRAMES = 4096
"""Of one message."""
_MAX_TEXT = 1 << 16
_MAX_ITEMS = 1 << 20
_MAX_INT = (1 << 64) - 1


class MessageError(UserError):
    """A message is damaged, or not of this protocol."""


@dataclass(frozen=True)
class Peer:
    """A process of an island, as the hub knows it.

    Attributes:
        island: its name.
        incarnation: the same for all ranks of one start of the island, and no other.
        rank: of the process.
    """

    island: str
    incarnation: str
    rank: int


@dataclass(frozen=True)
class PartHeader:
    """A part of a tensor, whose numbers are the frame of the same place in the message.

    Attributes:
        name: of the tensor.
        start: first index, for each dim.
        stop: the one behind the last.
        hash: BLAKE3 of the frame, in hex.
        version: of the outer weights that it makes, where it is part of an update.
    """

    name: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    hash: str
    version: int = 0


@dataclass(frozen=True)
class BoxOf:
    """A part of a tensor that a rank holds; `owned`: it is this rank that sends it."""

    name: str
    start: tuple[int, ...]
    stop: tuple[int, ...]
    owned: bool


@dataclass(frozen=True)
class Hello:
    """A rank of an island comes.

    Attributes:
        protocol: `PROTOCOL`.
        run: uuid of the run; empty where this island does not know it yet.
        island: its name.
        incarnation: the same for all ranks of one start of the island, and no other.
        rank: of this process.
        ranks: processes of the island.
        model: hash over names and shapes of all tensors.
        data: fingerprint of the order of the data.
        sequences: of a global step.
        seq_len: tokens of a sequence.
        max_steps: of the run.
        seed: of the run.
        unit: sequences of a step of this island are a multiple of this.
        names: of the tensors that are exchanged, in the order of the model.
        shapes: of these.
        boxes: what this rank holds of them.
        lease: with which it would go on, from what it has saved; None: it has saved nothing.
        mark: of that save; empty where there is none.
        speed: sequences per second, measured before; 0: not known.
        place: of its devices, for people: `2 x cpu, fsdp=2, host-a`.
    """

    protocol: int
    run: str
    island: str
    incarnation: str
    rank: int
    ranks: int
    model: str
    data: str
    sequences: int
    seq_len: int
    max_steps: int
    seed: int
    unit: int
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    boxes: tuple[BoxOf, ...]
    lease: int | None = None
    mark: str = ""
    speed: float = 0.0
    place: str = ""


@dataclass(frozen=True)
class Terms:
    """How the islands of a run exchange: those of the hub count, not those of an island's own configuration."""

    algorithm: Literal["diloco", "decoupled", "synchronous"] = "diloco"
    inner_steps: int = 64
    fragments: int = 1
    overlap_steps: int = 0
    overlap_mix: float | None = None
    eager: bool = False
    exchange: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    error_feedback: bool = True
    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = True

    @property
    def gradients(self) -> bool:
        """Whether gradients are exchanged at every step, and not weights."""
        return self.algorithm == "synchronous"


@dataclass(frozen=True)
class Welcome:
    """All ranks of the island have come, and it is one of the run's.

    Attributes:
        run: uuid of the run.
        terms: of the exchange.
        start: `replay`: go on from the own save, with the same leases and updates as before; `give`: send the weights,
            the hub has none; `take`: take the outer weights; `keep`: initial weights are those of the hub, as the
            digest shows; `restore`: take weights and optimizer from `path`, where gradients are exchanged.
        lease: with which the island begins.
        versions: of the outer weights, for each fragment, from which it begins.
        leads: whether this island evaluates and speaks for the run.
        path: newest save of an island, where that sees it: a new one may take the optimizer's moments from there.
    """

    run: str
    terms: Terms
    start: Literal["replay", "give", "take", "keep", "restore"]
    lease: int
    versions: tuple[int, ...]
    leads: bool
    path: str = ""


@dataclass(frozen=True)
class LeaseRequest:
    """A rank asks for lease number `lease` of its island; all ranks ask, and all get the same."""

    lease: int


@dataclass(frozen=True)
class LeaseStep:
    """One inner step.

    Attributes:
        at: step of the run that the schedule of the learning rate is asked for.
        rows: ranges of sequences, the one behind the last: of the training stream.
    """

    at: int
    rows: tuple[tuple[int, int], ...]

    @property
    def sequences(self) -> int:
        """Sequences of this step."""
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True)
class Lease:
    """What an island is to train on next, between two exchanges.

    Attributes:
        lease: its number, for this island, from 0 on.
        round: of the run, where islands go in rounds.
        rows: sequences of each step; a step that has fewer is filled with rows without targets.
        steps: empty: there is nothing left and the run ends, if there are `versions`; else do what the flags say, and
            ask for the next lease.
        versions: of the outer weights at the end of the run, where there is nothing left; empty before.
        save: save the island's state before the first step, under this mark; empty: no.
        evaluate: measure the validation loss before the first step.
        probe: measure the reference batch with the outer weights before the first step, for an island that joins.
    """

    lease: int
    round: int
    rows: int
    steps: tuple[LeaseStep, ...]
    versions: tuple[int, ...] = ()
    save: str = ""
    evaluate: bool = False
    probe: bool = False


@dataclass(frozen=True)
class Offer:
    """A rank brings its part of what its island has to exchange of one fragment, in one message or several.

    The update that followed the offer of this fragment before has been applied.

    Attributes:
        lease: in which the island is.
        fragment: number of it.
        version: of the outer weights that it is relative to.
        targets: tokens that the island has learned from since the last offer of this fragment.
        digest: sum over the bits of this rank's owned parts of the outer weights of the fragment, at `version`.
        step: inner steps of the lease that are in it.
        parts: what the frames are; together the ranks bring each element once.
        loss: of the step, where gradients are exchanged.
    """

    lease: int
    fragment: int
    version: int
    targets: int
    digest: int
    step: int
    parts: tuple[PartHeader, ...]
    loss: float | None = None


@dataclass(frozen=True)
class UpdateRequest:
    """A rank asks for the update that follows its island's offer. It is answered when there is one.

    Attributes:
        lease: of the offer.
        fragment: of the offer.
        step: of the offer.
        have: version that the rank has.
        piece: from 0 on, as long as the answer has more.
    """

    lease: int
    fragment: int
    step: int
    have: int
    piece: int = 0


@dataclass(frozen=True)
class Update:
    """Updates of one fragment, one version after the other, of the parts that the rank holds.

    Attributes:
        fragment: of the update.
        version: that the rank has when all pieces are applied.
        pieces: of the answer.
        parts: in the order in which they are applied; `version` of each says which one it makes.
        whole: the frames are outer weights of `version` in fp32, and no updates.
    """

    fragment: int
    version: int
    pieces: int
    parts: tuple[PartHeader, ...]
    whole: bool = False


@dataclass(frozen=True)
class OuterRequest:
    """A rank asks for the outer weights of one fragment, of the parts that it holds; answered by a whole `Update`."""

    fragment: int
    piece: int = 0


@dataclass(frozen=True)
class OuterGift:
    """A rank brings its owned parts of the initial weights, in fp32; `last`: all of them have been sent."""

    parts: tuple[PartHeader, ...]
    last: bool


@dataclass(frozen=True)
class Report:
    """What an island has done in a lease, by its first rank.

    Attributes:
        lease: number of the lease.
        losses: of its steps; None where not finite.
        targets: of its steps.
        norms: of the gradients of its steps.
        rates: learning rates of its steps.
        seconds: that the lease took, with waiting.
        waited: of these, that the island waited for the exchange.
        compiled: of these, in which programs were compiled.
    """

    lease: int
    losses: tuple[float | None, ...]
    targets: tuple[int, ...]
    norms: tuple[float | None, ...] = ()
    rates: tuple[float, ...] = ()
    seconds: float = 0.0
    waited: float = 0.0
    compiled: float = 0.0


@dataclass(frozen=True)
class Saved:
    """An island's state is kept.

    Attributes:
        mark: of the save, as the lease said.
        lease: with which the island goes on from there.
        path: of the checkpoint, where the island sees it.
        step: inner steps of the island.
        problem: why it is not kept; empty where it is.
    """

    mark: str
    lease: int
    path: str
    step: int
    problem: str = ""


@dataclass(frozen=True)
class Score:
    """A figure that an island has measured with the outer weights.

    Attributes:
        what: `validation`, or `probe`: losses of the reference batch.
        at: step of the run.
        lease: before which it was measured.
        values: by place: validation losses, or those of the probe.
        names: of the values.
        versions: of the outer weights that were measured, for each fragment.
    """

    what: Literal["validation", "probe"]
    at: int
    lease: int
    values: tuple[float, ...]
    names: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()


@dataclass(frozen=True)
class Beating:
    """A sign of life."""

    step: int
    phase: str


@dataclass(frozen=True)
class Bye:
    """An island leaves.

    Attributes:
        status: `finished`, `stopped` (it comes back), or `failed`.
        why: in a sentence.
    """

    status: Literal["finished", "stopped", "failed"]
    why: str = ""


@dataclass(frozen=True)
class Taken:
    """The request was understood; `stop`: the run is asked to save and stop."""

    stop: int = 0


@dataclass(frozen=True)
class Refused:
    """The request was not accepted.

    Attributes:
        what: is wrong.
        got: value.
        allowed: values.
        fix: what to do.
        final: asking again does not help. Else the message was damaged on the way.
        again: starting the island again does: it goes on from its newest save.
    """

    what: str
    got: str = ""
    allowed: str = ""
    fix: str = ""
    final: bool = True
    again: bool = False


Request = (
    Hello | LeaseRequest | Offer | UpdateRequest | OuterRequest | OuterGift | Report | Saved | Score | Beating | Bye
)
Answer = Welcome | Lease | Update | Taken | Refused
REQUESTS: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Request)}
ANSWERS: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Answer)}
M = TypeVar("M")


def write(message: Request | Answer) -> bytes:
    """Return the JSON of a message.

    Args:
        message: of this protocol, with finite numbers.
    """
    body = {"kind": type(message).__name__, **dataclasses.asdict(message)}
    return json.dumps(body, separators=(",", ":"), allow_nan=False).encode()


def read(text: bytes, kinds: dict[str, type[Any]]) -> Any:
    """Read a message, strictly.

    Args:
        text: its JSON.
        kinds: of messages that are expected, by name: `REQUESTS` or `ANSWERS`.

    Returns:
        The message.

    Raises:
        MessageError: it is too long, no JSON, or not exactly one of these messages.
    """
    if len(text) > MAX_HEADER_BYTES:
        raise MessageError("a message is too long", got=f"{len(text)} bytes", allowed=f"{MAX_HEADER_BYTES}")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError("a message is no JSON", got=ascii(text[:40])) from error
    kind = kinds.get(body.pop("kind", None)) if isinstance(body, dict) and _is_text(body.get("kind")) else None
    if kind is None:
        raise MessageError("a message is of no known kind", got=ascii(text[:60]), allowed=", ".join(kinds))
    return _value(kind, body, kind.__name__)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _can_be_written(text: str) -> bool:
    """Whether a text is more than halves of characters, which JSON allows and no file or terminal takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _value(hint: Any, value: Any, where: str) -> Any:
    """Return `value` as the type `hint` says, or raise."""
    if dataclasses.is_dataclass(hint):
        return _object(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        good = isinstance(value, str) and value in arguments
    elif origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _value(next(one for one in arguments if one is not type(None)), value, where)
    elif origin is tuple:
        return _items(arguments, value, where)
    elif hint is bool:
        good = isinstance(value, bool)
    elif hint is int:
        good = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INT
    elif hint is float:
        good = isinstance(value, float) and math.isfinite(value)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MAX_INT:  # larger ones may not fit
            good, value = True, float(value)
    else:
        good = hint is str and isinstance(value, str) and len(value) <= _MAX_TEXT and _can_be_written(value)
    if not good:
        raise MessageError("a message has a field of another kind", got=f"{where}: {ascii(value)[:60]}")
    return value


def _items(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or len(value) > _MAX_ITEMS:
        raise MessageError("a message has a field of another kind", got=f"{where}: {ascii(value)[:60]}")
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_value(arguments[0], one, where) for one in value)
    if len(value) != len(arguments):
        raise MessageError("a message has a field of another length", got=f"{where}: {len(value)}")
    return tuple(_value(hint, one, where) for hint, one in zip(arguments, value, strict=True))


def _object(kind: type[M], value: Any, where: str) -> M:
    fields = {one.name: one for one in dataclasses.fields(typing.cast(Any, kind))}
    if not isinstance(value, dict) or value.keys() - fields.keys():
        unknown = sorted(map(str, value.keys() - fields.keys()))[:3] if isinstance(value, dict) else value
        raise MessageError("a message has fields that are none of it", got=f"{where}: {ascii(unknown)[:60]}")
    lacking = [
        name
        for name, one in fields.items()
        if name not in value and one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
    ]
    if lacking:
        raise MessageError("a message lacks fields", got=f"{where}: {', '.join(lacking)}")
    hints = _hints(typing.cast(Any, kind))
    return kind(**{name: _value(hints[name], one, f"{where}.{name}") for name, one in value.items()})
