"""The long campaign of mutants; see tests/lab/mutants.py for what is changed and what must hold."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.lab.mutants import Tally, campaign


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    first = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, tqdm(total=count, unit="mutant") as bar:

        def report(tally: Tally) -> None:
            for use in tally.wrong[int(bar.postfix or 0) :]:
                bar.write(f"\n--- {use.wrong}: {use.verb} on {use.kind} (exit code {use.code})\n{use.text}")
            bar.set_postfix_str(str(len(tally.wrong)), refresh=False)
            bar.update(tally.mutants - bar.n)

        tally = campaign(Path(folder), count, seed, report, first)
    uses = sum(tally.outcomes.values())
    print(f"{tally.mutants} mutants, {uses} uses in {time.monotonic() - begin:.0f} s, seed {seed}, from {first}")
    for (verb, outcome), times in sorted(tally.outcomes.items()):
        print(f"  {verb:14} {outcome:28} {times}")
    print(f"  at most {tally.most_seconds:.1f} s of processor time and {tally.most_bytes / 1e9:.2f} GB in one use")
    print(f"  {len(tally.wrong)} wrong")
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
