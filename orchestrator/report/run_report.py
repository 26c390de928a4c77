"""`report.html`: one file that shows a run, without network, library or server."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from orchestrator.atomic_files import write_atomically
from orchestrator.report.page import frame
from orchestrator.report.run_data import MEAN_STEPS, Point, RunData, headline, number, read_run_data, smooth, summarise
from orchestrator.report.run_islands import islands_section
from orchestrator.report.run_legs import handovers_section, legs_section, marks, rewinds_section
from orchestrator.report.run_sources import source_charts, sources_section
from orchestrator.report.run_tasks import task_charts
from orchestrator.report.run_text import (
    clock_time,
    duration,
    fixed,
    flat,
    flops,
    gib,
    grouped,
    known,
    short,
    step_time,
    table,
    whole,
)
from orchestrator.report.run_time import time_section
from orchestrator.report.svg import Chart, Series, format_number

__all__ = ["summarise", "write_report"]

_SAMPLES_SHOWN = 12
_SMOOTH_FROM = 200  # training rows from which the loss is smoothed
# Beside the loss: the head's penalty; and of the routers of a mixture of experts (`models.moe.router_figures`).
_FURTHER_CHARTS = {
    "z_loss": "z-loss (per token)",
    "router_loss": "Router loss (per token)",
    "expert_load_max": "Largest expert load (over the mean)",
    "router_entropy": "Router entropy (nats)",
    "dropped": "Dropped choices (share)",
}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from whatever files are there.

    Args:
        run_dir: the run's directory.

    Raises:
        OSError: the file cannot be written.
    """
    path = run_dir / "report.html"
    write_atomically(path, render(read_run_data(run_dir)))
    return path


def render(data: RunData) -> str:
    """Return the page as HTML.

    Args:
        data: of the run.
    """
    facts = headline(data)
    name, status = escape(str(facts["name"])), escape(str(facts["status"]))
    shown = f"{status} at step {facts['diverged']['step']}" if facts["diverged"] else status
    parts = [
        f'<h1>{name}<span class="status {status}">{shown}</span></h1>',
        f'<p class="lead">{escape(_lead(data, facts))}</p>',
        _notices(facts),
        _cards(data, facts),
        f'<section class="charts" aria-label="Curves">{_charts(data, facts)}</section>',
        sources_section(data),
        islands_section(data),
        time_section(data.book),
        legs_section(data),
        rewinds_section(data),
        handovers_section(data),
        _samples(data),
        _facts(data),
        _config(data),
        f"<footer>Written {clock_time(time.time())} from the files in {escape(str(data.run_dir))}</footer>",
    ]
    return frame(str(facts["name"]), parts)


def _lead(data: RunData, facts: Mapping[str, Any]) -> str:
    words = []
    if (parameters := number(data.facts.get("parameters"))) is not None:
        active = number(data.facts.get("active_parameters"))
        some = f" ({format_number(active)} active)" if active is not None and active < parameters else ""
        words.append(f"{format_number(parameters)} parameters{some}")
    if facts["step"] is not None:
        words.append(f"{facts['step']:,} steps")
    if facts["legs"] > 1:
        words.append(f"{facts['legs']} legs")
    started = number(data.legs[0].get("started")) if data.legs else None
    if started is not None:
        words.append(f"started {clock_time(started)}")
    return ", ".join(words) or "nothing was recorded yet"


def _notices(facts: Mapping[str, Any]) -> str:
    texts = []
    if diverged := facts["diverged"]:
        found = diverged.get("found")
        said = [diverged.get("what"), *(found if isinstance(found, list) else [])]
        texts.append(f"Diverged at step {diverged['step']}: {escape('; '.join(str(one) for one in said if one))}.")
        advice = diverged.get("advice")
        tries = [f"{one[0]} ({one[1]})".strip() for one in advice if _is_pair(one)] if isinstance(advice, list) else []
        texts += [f"To try: {escape('; '.join(tries))}."] if tries else []
    if facts["skipped_lines"]:
        texts.append(f"{facts['skipped_lines']} line(s) of the run's files could not be read and are left out.")
    if facts["non_finite_losses"]:
        texts.append(f"{facts['non_finite_losses']} step(s) have a loss or gradients that are not finite numbers.")
    return "".join(f'<p class="notice">{text}</p>' for text in texts)


def _cards(data: RunData, facts: Mapping[str, Any]) -> str:
    loss, mean, val = facts["loss"], facts["loss_mean"], facts["val_loss"]
    perplexity = facts["val_perplexity"]
    peak, source = (
        number(data.facts.get("peak_flops_per_device")),
        str(data.facts.get("peak_source") or "peak rate unknown"),
    )
    peak_text = f"of {flops(peak)}/s per device; {source}" if peak else source
    devices = facts["devices"]
    where = f"{devices} × {facts['device'] or facts['target']}" if devices else facts["device"]
    hosts = facts["hosts"]
    on = f"{facts['target']}, {hosts} host{'s' if hosts != 1 else ''}" if hosts else facts["target"]
    memory = facts["peak_memory_bytes"]
    rows: list[tuple[str, str | None, str]] = [
        _loss_card(loss, mean, facts),
        ("Validation loss", fixed(val), f"perplexity {format_number(perplexity)}" if perplexity is not None else ""),
        ("Tokens", short(facts["tokens"]), _in_steps(data, facts)),
        ("Tokens per second", whole(facts["tokens_per_second"]), step_time(facts["step_seconds"])),
        ("MFU", f"{facts['mfu']:.1%}" if facts["mfu"] is not None else None, peak_text),
        ("Training time", duration(facts["seconds"]), f"memory {gib(memory)}" if memory is not None else ""),
        ("Hardware", str(facts["target"]) if facts["target"] else None, where or on or ""),
    ]
    cells = []
    for label, value, small in rows:
        style = ' class="unknown"' if value is None else ""
        note = f"<small>{escape(small)}</small>" if small else ""
        cells.append(f"<div><dt>{label}</dt><dd{style}>{escape(value or 'unknown')}{note}</dd></div>")
    return f'<dl class="cards">{"".join(cells)}</dl>'


def _in_steps(data: RunData, facts: Mapping[str, Any]) -> str:
    if facts["step"] is None:
        return ""
    epochs = data.series("epochs")
    return f"in {facts['step']:,} steps" + (f", {epochs[-1][1]:.3g} epochs" if epochs else "")


def _loss_card(loss: float | None, mean: float | None, facts: Mapping[str, Any]) -> tuple[str, str | None, str]:
    if facts["diverged"] and facts["diverged"].get("source") != "spike":
        # The last number that was one is not where the run is.
        small = f"{fixed(loss)} at step {facts['loss_step']}, the last finite one" if loss is not None else ""
        return "Training loss", "not finite", small
    return "Training loss", fixed(loss), f"last {MEAN_STEPS} steps: {fixed(mean)}" if mean is not None else ""


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _charts(data: RunData, facts: Mapping[str, Any]) -> str:
    boundaries = marks(data)
    losses = data.series("loss")
    if len(losses) >= _SMOOTH_FROM:
        window = 2 * (len(losses) // 100) + 1
        train = [
            Series("training", losses, "train", hidden=True),
            Series(f"training (mean of {window} steps)", smooth(losses, window), "train"),
        ]
    else:
        train = [Series("training", losses, "train")]
    entropy = facts["unigram_entropy_nats"]
    rules = [] if entropy is None else [(entropy, "unigram entropy", "entropy")]
    validation = Series("validation", data.series("val_loss", data.evals), "validation", dots=True)
    average = Series("validation, averaged weights", data.series("val_loss_ema", data.evals), "rate", dots=True)
    lines = [(step, "") for step, _ in boundaries]

    def small(key: str, title: str, points: Sequence[Point], style: str, unit: str = "") -> str:
        series = Series(title.partition(" (")[0].lower(), points, style)
        return Chart(key, title, [series], marks=lines, unit=unit, include=(0.0,)).render()

    memory = [(step, value / 2**30) for step, value in data.series("memory_bytes")]
    routers = [
        small(key, title, points, "norm") for key, title in _FURTHER_CHARTS.items() if (points := data.series(key))
    ]
    parts = [
        Chart(
            "loss", "Loss (nats per token)", [*train, validation, average], 1000.0, 360.0, rules, boundaries
        ).render(),
        small("speed", "Tokens per second", data.series("tokens_per_second"), "speed"),
        small("norm", "Gradient norm", data.series("grad_norm"), "norm"),
        small("rate", "Learning rate", data.series("lr"), "rate"),
        small("memory", "Memory in use (GiB)", memory, "memory", " GiB") if memory else "",
        *routers,
        source_charts(data, lines),
        task_charts(data, lines),
    ]
    return f'<div class="wide">{parts[0]}</div>{"".join(parts[1:])}'


def _samples(data: RunData) -> str:
    if not data.samples:
        return ""
    shown = list(reversed(data.samples))[:_SAMPLES_SHOWN]
    blocks = []
    for sample in shown:
        prompt, text = str(sample.get("prompt") or ""), str(sample["text"])
        text = text.removeprefix(prompt)
        step = f"Step {escape(known(sample.get('step')))}"
        blocks.append(f'<div class="sample"><p>{step}</p><pre><b>{escape(prompt)}</b>{escape(text)}</pre></div>')
    more = (
        f'<p class="lead">The last {len(shown)} of {len(data.samples)}.</p>' if len(shown) < len(data.samples) else ""
    )
    return f"<h2>Samples</h2>{more}{''.join(blocks)}"


def _facts(data: RunData) -> str:
    facts, leg = data.facts, data.legs[-1] if data.legs else {}
    peak, active = number(facts.get("peak_flops_per_device")), facts.get("active_parameters")
    model = {
        "Parameters": grouped(facts.get("parameters")),
        "Active for a token": None if active == facts.get("parameters") else grouped(active),
        "Trained, in adapters": grouped(facts.get("trained_parameters")),
        "Vocabulary": grouped(facts.get("vocab_size")),
        "Arithmetic per token": flops(number(facts.get("flops_per_token"))),
        "Peak rate per device": f"{flops(peak)}/s" if peak is not None else "unknown",
        "Source of the peak": facts.get("peak_source"),
        "Unigram entropy (nats)": fixed(number(facts.get("unigram_entropy_nats"))),
    }
    source = facts.get("data")
    described = flat(source) if isinstance(source, Mapping) else {}
    software = leg.get("software")
    tables = [
        table("Model", model),
        table("Software", flat(software) if isinstance(software, Mapping) else {}),
        table("Data", described),
    ]
    filled = [table for table in tables if table]
    return f'<div class="columns">{"".join(filled)}</div>' if filled else ""


def _config(data: RunData) -> str:
    if not data.config_text:
        return ""
    text = escape(data.config_text.rstrip())
    return f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"
