"""Compare the planner's estimates with published runs, the fitted and the held-out apart.

Prints errors per vendor and stack, verdicts on memory and the layouts that it would pick from each sheet of the sweep;
with `--write`, renews `docs/planner-accuracy.md` with every held-out row that is off by more than 20%.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from orchestrator.planner.evidence.accuracy import Checked, Errors, check, errors, picks, verdicts
from orchestrator.planner.evidence.published import LeftOutRun, held_out_families, shipped

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "planner" / "data"
PAGE = ROOT / "docs" / "planner-accuracy.md"
FAR = 0.2
VENDORS = ("nvidia", "amd", "google", "aws")
# What is known of the rows that are far off: pattern of the run's key -> why.
WHY = [
    ("gpt-oss", "not known; on every vendor: attention sinks, a window of 128, products of 2880 that fill no tile"),
    ("mbridge-2[56].*qwen3-30b", "neighbouring releases differ up to threefold on one layout: software, not shape"),
    ("nanotron.*-(512|256)$", "few micro-batches on hundreds of GPUs: latencies that are not in the model"),
    ("nanotron-80", "a tensor axis over several hosts, or 16 and 32 stages; which part is too fast is not known"),
    ("axlearn", "remat and kernels are not stated; comments in the code, of releases years apart"),
    ("mosaic-.*s(8192|16384|32768|65536)", "attention of 2023 on long sequences: one rate for all is too simple"),
    ("aa-30B-s2048.*", "256 GPUs: traffic of the data-parallel axis costs more than the fitted sheets show"),
    ("primerl", "not known; whether it is compiled is not stated"),
    ("mcore", "the micro-batch is not stated; 1 is assumed"),
    ("-tpu-v4|-v4-", "no v4 run is fitted: the vendor's mean stands for its achievable rate"),
]  # fmt: skip


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def row(name: str, found: Errors | None) -> str:
    if found is None:
        return f"| {name} | 0 | - | - | - |"
    bias = f"{100 * found.bias:+.1f}%"
    return f"| {name} | {found.rows} | {percent(found.median)} | {percent(found.p90)} | {bias} |"


def table(
    checked: Sequence[Checked], groups: Sequence[tuple[str, Callable[[Checked], bool]]], metric: str
) -> list[str]:
    lines = ["| | rows | median | 90th percentile | bias |", "|---|---|---|---|---|"]
    for name, belongs in groups:
        signed = [getattr(item, metric) for item in checked if belongs(item) and getattr(item, metric) is not None]
        if signed:
            lines.append(row(name, errors(signed)))
    return lines


def by_vendor(part: str, held: bool) -> list[tuple[str, Callable[[Checked], bool]]]:
    def of(vendor: str, stated: bool) -> Callable[[Checked], bool]:
        return lambda c: c.run.vendor == vendor and c.held_out == held and not (stated and c.run.assumed)

    groups = []
    for vendor in VENDORS:
        groups.append((f"{vendor}, {part}", of(vendor, False)))
        groups.append((f"{vendor}, {part}, all stated by the page", of(vendor, True)))
    return groups


def by_stack(checked: Sequence[Checked]) -> list[tuple[str, Callable[[Checked], bool]]]:
    def of(stack: str) -> Callable[[Checked], bool]:
        return lambda c: c.held_out and c.run.job.stack == stack

    return [(stack, of(stack)) for stack in sorted({item.run.job.stack for item in checked})]


def sweep(checked: Sequence[Checked]) -> list[str]:
    lines = ["| part | warned rightly | false alarms | missed | precision | recall |", "|---|---|---|---|---|---|"]
    for name, part in (("fitted", False), ("held out", True)):
        found = verdicts(item for item in checked if item.held_out == part)
        lines.append(
            f"| {name} sheets | {found.right} | {found.false_alarms} | {found.missed} | {found.precision:.3f} "
            f"| {found.recall:.3f} |"
        )
    lines += ["", "| sheet | part | picked | best measured | picked is slower by |", "|---|---|---|---|---|"]
    for pick in picks(checked):
        part = "held out" if pick.held_out else "fitted"
        gap = "ran out of memory" if pick.gap is None else percent(pick.gap)
        lines.append(f"| {pick.sheet.partition(':')[2]} | {part} | {pick.picked} | {pick.best} | {gap} |")
    return lines


def far_off(checked: Sequence[Checked]) -> list[str]:
    lines = ["| run | what | measured | estimated | off by | why |", "|---|---|---|---|---|---|"]
    for item in sorted(checked, key=lambda item: item.run.key):
        why = next((text for pattern, text in WHY if re.search(pattern, item.run.key)), "not known")
        if item.run.assumed:
            why += f"; assumed: {', '.join(item.run.assumed)}"
        time, memory = item.time_error, item.memory_error
        if item.held_out and time is not None and abs(time) > FAR:
            measured, estimated = f"{item.run.seconds:.3g} s", f"{item.seconds:.3g} s"
            lines.append(f"| {item.run.key} | step | {measured} | {estimated} | {100 * time:+.0f}% | {why} |")
        if item.held_out and memory is not None and abs(memory) > FAR and item.run.memory is not None:
            measured, estimated = f"{item.run.memory / 2**30:.1f} GiB", f"{item.memory / 2**30:.1f} GiB"
            lines.append(f"| {item.run.key} | memory | {measured} | {estimated} | {100 * memory:+.0f}% | {why} |")
    return lines


def excluded(left_out: Sequence[LeftOutRun]) -> list[str]:
    counted = Counter(item.reason for item in left_out)
    return [f"- {count} runs: {reason}" for reason, count in counted.most_common()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"renew {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    runs, left_out = shipped(DATA)
    checked = check(runs, held_out_families(runs))
    sections = {
        "step time": [
            *table(checked, by_vendor("held out", True), "time_error"),
            "",
            *table(checked, by_vendor("fitted", False), "time_error"),
        ],
        "held-out step time by software stack": table(checked, by_stack(checked), "time_error"),
        "memory": [
            *table(checked, by_vendor("held out", True), "memory_error"),
            "",
            *table(checked, by_vendor("fitted", False), "memory_error"),
        ],
        "layout sweep": sweep(checked),
        "left out": excluded(left_out),
        "far off": far_off(checked),
    }
    for name, lines in sections.items():
        if name != "far off":
            print(f"\n{name}\n" + "\n".join(lines))
    print(f"\n{len(sections['far off']) - 2} held-out figures are off by more than {100 * FAR:.0f}%")
    if options.write:
        text = PAGE.read_text(encoding="utf-8")
        for name, lines in sections.items():
            mark = re.escape(f"<!-- {name} -->"), re.escape(f"<!-- end of {name} -->")
            pattern = re.compile(rf"({mark[0]}\n).*?({mark[1]})", re.DOTALL)
            assert pattern.search(text), f"{PAGE}: no place for {name}"
            text = pattern.sub(lambda found, body=lines: found[1] + "\n".join(body) + "\n" + found[2], text)
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
