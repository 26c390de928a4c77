"""Seconds from the command to the answer of `plan`, each in a fresh process: 8 chips in one, a million in five.

Prints the median and the worst of five, and exits with 1 where a median is over its limit.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 5
CASES = [
    ("8 chips", 1.0, ["model=llama3_8b", "fleet=h100x8", "tokens=1T"]),
    ("one million chips, dense", 5.0, ["model=llama3_405b", "fleet=tpu_v7xx1M", "tokens=15T"]),
    ("one million chips, experts", 5.0, ["model=deepseek_v3", "fleet=tpu_v5px1M", "tokens=15T"]),
    ("a million in GPUs", 5.0, ["model=llama3_70b", "fleet=h100x1M", "tokens=15T"]),
]


def main() -> int:
    over = False
    for name, limit, words in CASES:
        seconds = []
        for _ in range(RUNS):
            begin = time.perf_counter()
            argv = [sys.executable, "-m", "orchestrator", "plan", *words, "json=true"]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - begin)
        median = statistics.median(seconds)
        over |= median > limit
        print(f"{name:<28} median {median:.2f} s, worst {max(seconds):.2f} s, limit {limit:.0f} s")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
