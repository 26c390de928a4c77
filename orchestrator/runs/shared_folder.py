"""Check before the first step that all processes of a job see the directory of the checkpoints."""

from __future__ import annotations

import contextlib
import json
import socket
import time

from orchestrator.checkpoint.storage import AnyPath, is_remote, make_directory, remove_file, there, write_file
from orchestrator.distributed.exchange import Coordinator, exchange, new_topic
from orchestrator.errors import ConfigError, SaveError
from orchestrator.observe.sink import reason

WAIT_SECONDS = 10.0  # a network's file system may show a new file a little later
_POLL_SECONDS = 0.1
_SHOWN = 8


def check_shared(checkpoints: AnyPath, coordinator: Coordinator, here: str | None = None) -> None:
    """Check that all ranks see the directory of the checkpoints: rank 0 leaves a file there. All ranks call it.

    Args:
        checkpoints: the directory.
        coordinator: the processes of the job.
        here: the name of this host, for messages.

    Raises:
        SaveError: rank 0 cannot write there.
        ConfigError: not all of them see it. Each writes its own shards there, and rank 0 commits them.
    """
    if coordinator.size == 1 and is_remote(checkpoints):
        return  # the run has just put its name there
    topic, problem = new_topic(), ""
    if coordinator.rank == 0:
        try:
            make_directory(checkpoints)
            write_file(_probe(checkpoints, topic), [b"all processes of the job look for this file"])
        except OSError as error:
            problem = reason(error)
    topic, problem = json.loads(coordinator.broadcast(json.dumps([topic, problem])))
    if problem:
        raise SaveError(
            f"the directory of the checkpoints cannot be written: {problem}",
            got=checkpoints,
            fix="make room or get permission there, or set checkpoint.dir to another place",
        )
    seen = _seen(_probe(checkpoints, topic))
    mine = "" if seen else f"rank {coordinator.rank} on {here or socket.gethostname()}"
    blind = json.loads(exchange(coordinator, topic, mine, lambda texts: json.dumps([text for text in texts if text])))
    if coordinator.rank == 0:
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
