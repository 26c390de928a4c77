"""Check before the first step that all processes of a job see the directory of the checkpoints."""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time

from orchestrator.checkpoint.storage import AnyPath, is_remote, make_directory, remove_file, there, write_file
from orchestrator.distributed.exchange import Coordinator, exchange, new_topic
from orchestrator.errors import ConfigError, SaveError
from orchestrator.observe.sink import reason
from orchestrator.runs.messages import warn

WAIT_SECONDS = 10.0  # a network's file system may show a new file a little later
_POLL_SECONDS = 0.1
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SHOWN = 8


def check_shared(
    checkpoints: AnyPath, coordinator: Coordinator, here: str | None = None, known: AnyPath | None = None
) -> None:
    """Check that all ranks see the directory of the checkpoints: rank 0 leaves a file there. All ranks call it.

    Args:
        checkpoints: the directory.
        coordinator: the processes of the job.
        here: the name of this host, for messages.
        known: a file of an earlier save there. With it a directory that has no room now is a warning alone, as it is
            in the middle of a run: training is worth more than the next checkpoint.

    Raises:
        SaveError: rank 0 cannot write there.
        ConfigError: not all of them see it. Each writes its own shards there, and rank 0 commits them.
    """
    if coordinator.size == 1 and is_remote(checkpoints):
        return  # the run has just put its name there
    topic, problem, full = new_topic(), "", False
    if coordinator.rank == 0:
        try:
            make_directory(checkpoints)
            write_file(_probe(checkpoints, topic), [b"all processes of the job look for this file"])
        except OSError as error:
            problem = reason(error)
            if known is not None and error.errno in _NO_ROOM:
                warn(f"the directory of the checkpoints has no room ({problem}); the run goes on: {checkpoints}")
                problem, full = "", True
    topic, problem, full = json.loads(coordinator.broadcast(json.dumps([topic, problem, full])))
    probe = known if full and known is not None else _probe(checkpoints, topic)
    if problem:
        raise SaveError(
            f"the directory of the checkpoints cannot be written: {problem}",
            got=checkpoints,
            fix="make room or get permission there, or set checkpoint.dir to another place",
        )
    seen = _seen(probe)
    mine = "" if seen else f"rank {coordinator.rank} on {here or socket.gethostname()}"
    blind = json.loads(exchange(coordinator, topic, mine, lambda texts: json.dumps([text for text in texts if text])))
    if coordinator.rank == 0 and not full:
        with contextlib.suppress(OSError):  # left behind it does no harm
            remove_file(_probe(checkpoints, topic))
    if blind:
        more = f" and {len(blind) - _SHOWN} more" if len(blind) > _SHOWN else ""
        raise ConfigError(
            "not all processes of the job see the directory of the checkpoints",
            got=f"{checkpoints}, not seen by {', '.join(blind[:_SHOWN])}{more}",
            allowed="a directory that every host sees: each writes its own part of a checkpoint",
            fix="set runs_dir or checkpoint.dir to a folder that the hosts share, or checkpoint.dir=s3://BUCKET/PREFIX",
        )


def _probe(checkpoints: AnyPath, topic: str) -> AnyPath:
    return checkpoints / f".seen-{topic.rpartition('/')[2]}"


def _seen(probe: AnyPath) -> bool:
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        with contextlib.suppress(OSError):  # a store that this host cannot reach is one that it does not see
            if there(probe):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
