"""The long fault campaigns: tests/lab/self_healing.py and tests/lab/faults.py say what is done and what must hold."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.lab import faults, self_healing

STEPS = 60
BOOKS, GOODPUT = 0.01, 0.1  # parts by which books may differ from the clock, and goodput from what is planned


def main() -> int:
    """Run the campaign that the command line names."""
    words = sys.argv[1:]
    if words[:1] == ["saves"]:
        return _kill_in_saves(*words[1:])
    return _heal(*words)


def _heal(faults_wanted: str = "300", seed: str = "0", result: str = "fault_campaign.json") -> int:
    """Hurt runs that heal themselves; write the result as JSON. Returns the exit code."""
    begin, wanted = time.monotonic(), int(faults_wanted)
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder, tqdm(total=wanted, unit="fault") as bar:

        def report(tally: self_healing.Tally) -> None:
            bar.update(len(tally.faults) - bar.n)
            bar.set_postfix(runs=len(tally.runs), person=len(tally.needs_person), lost=len(tally.lost))

        tally = self_healing.campaign(Path(folder), wanted, int(seed), report)
    seconds = time.monotonic() - begin
    Path(result).write_text(json.dumps({"seed": int(seed), "took_seconds": seconds, **tally.to_dict()}, indent=1))
    print(
        f"{len(tally.faults)} faults to {len(tally.runs)} runs in {seconds:.0f} s, seed {seed}; all of it in {result}"
    )
    starts = ", ".join(f"{name} {tally.start(name):.1f} s" for name in tally.starts)
    print(f"  a start takes (median): {starts}; 'beyond' is without it and without the declared time-out")
    print("\n".join(f"  {line}" for line in tally.lines()))
    for kind, reason in tally.left_out.items():
        print(f"  not done here: {kind}: {reason}")
    bad = [("need a person", tally.needs_person), ("lost something", tally.lost), ("differ", tally.different)]
    for what, found in bad:
        print(f"  {len(found)} runs {what}" + "".join(f"\n    {text}" for text in found))
    return 1 if any(found for _, found in bad) + _promises_broken(tally) else 0


def _promises_broken(tally: self_healing.Tally) -> int:
    """Say what was promised of times and books, and return how much of it does not hold."""
    late, off, goodput = tally.beyond_bound(), tally.books_off(), tally.goodput()
    print(f"  {len(late)} kinds whose median is beyond its bound" + "".join(f"\n    {text}" for text in late))
    print(f"  the books of {len(tally.books)} runs are within {off:.2%} of the clock; at most {BOOKS:.0%} is promised")
    broken = len(late) + (off > BOOKS)
    if goodput is None:
        print("  goodput: no run with local checkpoints was stopped, so there is nothing to compare")
        return broken
    measured, expected = goodput
    apart = abs(measured - expected) / expected
    print(f"  goodput {measured:.3f}, planner {expected:.3f}: {apart:.1%} apart; at most {GOODPUT:.0%} is promised")
    return broken + (apart > GOODPUT)


def _kill_in_saves(kills: str = "200", seed: str = "0", kind: str = "dense") -> int:
    """Kill forked ranks within saves. Returns the exit code."""
    if kind not in faults.KINDS:
        sys.exit(f"no kind of run is called {kind}; there are {', '.join(faults.KINDS)}")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder, tqdm(total=int(kills), unit="kill") as bar:

        def report(tally: faults.Tally) -> None:
            bar.update(tally.kills - bar.n)
            bar.set_postfix(in_saves=tally.within_saves, checked=tally.checked, finished=tally.finished)

        tally = faults.campaign(Path(folder), int(kills), STEPS, int(seed), report, kind)
    print(f"{tally.kills} kills of {faults.RANKS} processes in {time.monotonic() - begin:.0f} s, {kind}, seed {seed}")
    print(f"  {tally.within_saves} left a save half done; {tally.restarts_from_zero} starts found no checkpoint yet")
    print(f"  {tally.checked} checkpoints hashed, all valid; no commit was lost")
    print(f"  {tally.finished} runs came to their end with the weights of an uninterrupted one, bit for bit")
    return 0


if __name__ == "__main__":
    sys.exit(main())
