"""What `watch` shows of a run: lines of labelled text, computed from its rows and facts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.report.run_data import number
from orchestrator.report.run_islands import islands_of, waited_share
from orchestrator.report.run_text import duration, gib, layout, short, step_time, value

_BLOCKS = "▁▂▃▄▅▆▇█"
_RECENT = 20  # steps whose median time tells how long the rest takes


def spark(values: Sequence[float], width: int) -> str:
    """Draw a curve in one line of characters: each is the mean of its stretch, between the lowest and the highest.

    Args:
        values: finite numbers.
        width: characters at most.
    """
    if not values:
        return ""
    count = min(width, len(values))
    stretches = [values[at * len(values) // count : (at + 1) * len(values) // count] for at in range(count)]
    means = [statistics.fmean(stretch) for stretch in stretches]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def seconds_to_go(rows: Sequence[Mapping[str, Any]], step: int | None, steps: int | None) -> float | None:
    """Estimate how long the remaining steps take, at the median time of the last ones; None where that is unknown.

    Args:
        rows: training rows, the last one last.
        step: steps completed.
        steps: of the whole run.
    """
    times = [time for row in rows[-_RECENT:] if (time := number(row.get("step_seconds"))) is not None]
    if not times or step is None or steps is None:
        return None
    return max(0, steps - step) * statistics.median(times)


def frame(facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], width: int) -> list[tuple[str, str]]:
    """Return the lines of a run: hardware, losses, figures of the last step, what it keeps and how it was stopped.

    Args:
        facts: of run.json.
        rows: the last ones of metrics.jsonl.
        width: of the terminal.
    """
    legs = [leg for leg in facts.get("legs") or () if isinstance(leg, Mapping)]
    leg: Mapping[str, Any] = legs[-1] if legs else {}
    trained = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "val_loss" in row]
    lines = [("hardware", _hardware(leg))] if leg else []
    losses = [loss for row in trained if (loss := number(row.get("loss"))) is not None]
    if trained:
        last = number(trained[-1].get("loss"))
        shown = "not finite" if last is None else f"{last:.4f}"
        room = max(10, width - 32)
        lines.append(("loss", f"{shown}  {spark(losses[-10 * room :], room)}"))
    if evaluated:
        loss = number(evaluated[-1].get("val_loss"))
        shown = "not finite" if loss is None else f"{loss:.4f}, perplexity {math.exp(min(loss, 700.0)):.2f}"
        lines.append(("val loss", f"{shown} at step {value(evaluated[-1].get('step'))}"))
    if trained:
        lines.append(("step", _figures(trained[-1])))
    lines += [*_islands(legs), *_events(leg, len(legs))]
    return lines


def _islands(legs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    lines = []
    for name, one in islands_of(legs).items():
        share, waited = number(one.get("share")), waited_share(one)
        parts = [value(one.get("state")), value(one.get("place"))]
        parts += [] if share is None else [f"{share:.0%} of the sequences"]
        parts += [] if waited is None else [f"waited {waited:.1%}"]
        moved = f"{gib(one['sent_bytes'])} sent, {gib(one['received_bytes'])} received"
        lines.append((f"island {name}", ", ".join([*parts, moved])))
    return lines


def _hardware(leg: Mapping[str, Any]) -> str:
    if leg.get("exchange"):
        return f"{value(leg.get('target'))}, {leg['exchange']}"
    names = leg.get("device_names") or []
    hosts = leg.get("hosts")
    devices = f"{value(leg.get('devices'))} x {names[0] if names else value(leg.get('target'))}"
    on = f" on {hosts} hosts" if isinstance(hosts, int) and hosts > 1 else ""
    return f"{devices}{on}, {layout(leg.get('layout'))}, {value(leg.get('precision'))}"


def _figures(row: Mapping[str, Any]) -> str:
    rate, used, memory = number(row.get("tokens_per_second")), number(row.get("mfu")), number(row.get("memory_bytes"))
    parts = [
        f"gradient norm {short(number(row.get('grad_norm'))) or 'not finite'}",
        f"lr {short(number(row.get('lr')))}",
        step_time(number(row.get("step_seconds"))),
        "" if rate is None else f"{rate:,.0f} tokens/s",
        "" if used is None else f"MFU {used:.1%}",
        "" if memory is None else gib(memory),
    ]
    return ", ".join(part for part in parts if part)


def _events(leg: Mapping[str, Any], legs: int) -> list[tuple[str, str]]:
    lines = [("restarts", f"{legs - 1}, the last at step {value(leg.get('start_step'))}")] if legs > 1 else []
    if isinstance(diverged := leg.get("diverged"), Mapping):
        lines.append(("diverged", f"step {value(diverged.get('step'))}: {value(diverged.get('what'))}"))
    if leg.get("notice"):
        lines.append(("notice", str(leg["notice"])))
    handover = leg.get("handover")
    if isinstance(handover, Mapping) and handover.get("verdict"):
        lines.append(("handover", str(handover["verdict"])))
    return lines


def time_line(seconds: Mapping[str, float], width: int) -> list[tuple[str, str]]:
    """Return the states that a run's time went into, as a bar of characters for each and its words.

    Args:
        seconds: by state.
        width: characters of the bar.
    """
    total = sum(seconds.values())
    if total <= 0:
        return []
    shares = sorted(seconds.items(), key=lambda item: -item[1])
    return [
        (state, f"{'█' * max(1, round(width * spent / total))} {spent / total:.1%}, {duration(spent)}")
        for state, spent in shares
        if spent / total >= 0.001
    ]
