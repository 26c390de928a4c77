"""The long fault campaign; see tests/lab/faults.py for what is done and what must hold."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.lab.faults import KINDS, RANKS, Tally, campaign

STEPS = 60


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    kind = sys.argv[3] if len(sys.argv) > 3 else "dense"
    if kind not in KINDS:
        sys.exit(f"no kind of run is called {kind}; there are {', '.join(KINDS)}")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder, tqdm(total=kills, unit="kill") as bar:

        def report(tally: Tally) -> None:
            bar.update(tally.kills - bar.n)
            bar.set_postfix(in_saves=tally.within_saves, checked=tally.checked, finished=tally.finished)

        tally = campaign(Path(folder), kills, STEPS, seed, report, kind)
    print(f"{tally.kills} kills of {RANKS} processes in {time.monotonic() - begin:.0f} s, {kind}, seed {seed}")
    print(f"  {tally.within_saves} left a save half done; {tally.restarts_from_zero} starts found no checkpoint yet")
    print(f"  {tally.checked} checkpoints hashed, all valid; no commit was lost")
    print(f"  {tally.finished} runs came to their end with the weights of an uninterrupted one, bit for bit")


if __name__ == "__main__":
    main()
