"""The table of faults as one command; see tests/lab/fault_table.py for its rows and how each fault is made."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.lab.fault_table import main


def report(name: str, outcome: str, seconds: float) -> None:
    print(f"{name:<42}  {seconds:5.0f} s  {outcome}", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        sys.exit(1 if main(sys.argv[1:], Path(folder), report) else 0)
