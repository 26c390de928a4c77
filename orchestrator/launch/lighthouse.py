"""The lighthouse of a run of replica groups: a process of the launcher's in which torchft's server runs."""

from __future__ import annotations

import sys
import time

from orchestrator.atomic_files import write_atomically
from orchestrator.distributed.process_guard import GRACE_SECONDS

HEARTBEAT_TIMEOUT_SECONDS = 2.0  # a group that gives no sign of life for so long is left out
_JOIN_SECONDS = 60.0  # a group that lives is waited for so long


def lighthouse_worker(words: list[str]) -> int:
    """Serve until a while after standard input ends: `lighthouse FILE`, into which the address is written.

    Args:
        words: the file.
    """
    from pathlib import Path

    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind="0.0.0.0:0",
        min_replicas=1,
        join_timeout_ms=int(_JOIN_SECONDS * 1000),
        heartbeat_timeout_ms=int(HEARTBEAT_TIMEOUT_SECONDS * 1000),
    )
    # It names itself by the host's name, which need not resolve; the groups of this launcher are on this machine.
    port = server.address().rpartition(":")[2]
    write_atomically(Path(words[0]), f"http://127.0.0.1:{port}")
    while sys.stdin.buffer.read(4096):
        pass
    time.sleep(GRACE_SECONDS)  # the launcher was killed: the groups stop at one step, and save
    server.shutdown()
    return 0
