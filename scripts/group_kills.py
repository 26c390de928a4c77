"""Kill replica groups of a run in turn, each when all take part, and print how long the others waited and what it cost.

Each kill is a SIGKILL to one rank, in mid-step. Fails where a group that was not killed was started again, where a step
is recorded twice or not at all, or where what was skipped is not what is counted.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path

from tests.lab.replica_groups import kill_in_turn


def main(kills: int = 20, fsdp: int = 2, steps: int = 800) -> None:
    """Run one training without kills, and one with them."""
    os.environ.setdefault("RUST_LOG", "error")
    with tempfile.TemporaryDirectory(prefix="group-kills-") as folder:
        found = kill_in_turn(Path(folder), kills, steps, 0.05, [f"layout.fsdp={fsdp}"])
    for name, seconds in (("to the next step of the other group", found.waits), ("to being back", found.back)):
        print(f"seconds {name}: median {statistics.median(seconds):.2f}, longest {max(seconds):.2f}")
    print(f"{kills} kills in {steps} steps, {found.tokens} tokens, of which {found.skipped} were skipped")
    print(f"final validation loss {found.loss:.5f}; without kills {found.whole_loss:.5f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
