"""`python -m orchestrator VERB …` and the console script `orchestrator`."""

from __future__ import annotations

import sys

from orchestrator import cli, stopping


def main() -> int:
    """Run one verb as a process. Returns the exit code, or ends the process with it."""
    code = cli.main()
    if "torch" in sys.modules:
        stopping.end_process(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
