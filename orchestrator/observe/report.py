"""`report.html`: one file that shows a run, without network, library or server."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from orchestrator.observe.report_data import (
    MEAN_STEPS,
    Point,
    RunData,
    headline,
    number,
    read_run_data,
    smooth,
    summarise,
)
from orchestrator.observe.svg import Chart, Series, format_number

__all__ = ["summarise", "write_report"]

_SAMPLES_SHOWN = 12
_SMOOTH_FROM = 200  # training rows from which the loss is smoothed
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from whatever files are there.

    Raises:
        OSError: the file cannot be written.
    """
    path = run_dir / "report.html"
    aside = path.with_name("report.html.partial")
    aside.write_text(render(read_run_data(run_dir)), encoding="utf-8")
    os.replace(aside, path)
    return path


def render(data: RunData) -> str:
    """The page as HTML."""
    facts = headline(data)
    name, status = escape(str(facts["name"])), escape(str(facts["status"]))
    parts = [
        f'<h1>{name}<span class="status {status}">{status}</span></h1>',
        f'<p class="lead">{escape(_lead(data, facts))}</p>',
        _notices(facts),
        _cards(data, facts),
        f'<section class="charts" aria-label="Curves">{_charts(data, facts)}</section>',
        _legs(data),
        _samples(data),
        _facts(data),
        _config(data),
        f"<footer>Written {_clock_time(time.time())} from the files in {escape(str(data.run_dir))}</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f'<title>{name}</title>\n<link rel="icon" href="data:,">\n<style>\n{_asset("report.css")}</style>\n</head>\n'
        f"<body>\n<main>\n{chr(10).join(part for part in parts if part)}\n</main>\n"
        f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n"
    )


def _lead(data: RunData, facts: Mapping[str, Any]) -> str:
    words = []
    if (parameters := number(data.facts.get("parameters"))) is not None:
        words.append(f"{format_number(parameters)} parameters")
    if facts["step"] is not None:
        words.append(f"{facts['step']:,} steps")
    if facts["legs"] > 1:
        words.append(f"{facts['legs']} legs")
    started = number(data.legs[0].get("started")) if data.legs else None
    if started is not None:
        words.append(f"started {_clock_time(started)}")
    return ", ".join(words) or "nothing was recorded yet"


def _notices(facts: Mapping[str, Any]) -> str:
    texts = []
    if facts["skipped_lines"]:
        texts.append(f"{facts['skipped_lines']} line(s) of the run's files could not be read and are left out.")
    if facts["non_finite_losses"]:
        texts.append(f"{facts['non_finite_losses']} step(s) have a loss that is not a finite number.")
    return "".join(f'<p class="notice">{text}</p>' for text in texts)


def _cards(data: RunData, facts: Mapping[str, Any]) -> str:
    loss, mean, val = facts["loss"], facts["loss_mean"], facts["val_loss"]
    perplexity = facts["val_perplexity"]
    peak, source = (
        number(data.facts.get("peak_flops_per_device")),
        str(data.facts.get("peak_source") or "peak rate unknown"),
    )
    peak_text = f"of {_flops(peak)}/s per device; {source}" if peak else source
    devices = facts["devices"]
    where = f"{devices} × {facts['device'] or facts['target']}" if devices else facts["device"]
    hosts = facts["hosts"]
    on = f"{facts['target']}, {hosts} host{'s' if hosts != 1 else ''}" if hosts else facts["target"]
    memory = facts["peak_memory_bytes"]
    rows: list[tuple[str, str | None, str]] = [
        ("Training loss", _fixed(loss), f"last {MEAN_STEPS} steps: {_fixed(mean)}" if mean is not None else ""),
        ("Validation loss", _fixed(val), f"perplexity {format_number(perplexity)}" if perplexity is not None else ""),
        ("Tokens", _short(facts["tokens"]), f"in {facts['step']:,} steps" if facts["step"] is not None else ""),
        ("Tokens per second", _whole(facts["tokens_per_second"]), _step_time(facts["step_seconds"])),
        ("MFU", f"{facts['mfu']:.1%}" if facts["mfu"] is not None else None, peak_text),
        ("Training time", _duration(facts["seconds"]), f"memory {_gib(memory)}" if memory is not None else ""),
        ("Hardware", str(facts["target"]) if facts["target"] else None, where or on or ""),
    ]
    cells = []
    for label, value, small in rows:
        style = ' class="unknown"' if value is None else ""
        note = f"<small>{escape(small)}</small>" if small else ""
        cells.append(f"<div><dt>{label}</dt><dd{style}>{escape(value or 'unknown')}{note}</dd></div>")
    return f'<dl class="cards">{"".join(cells)}</dl>'


def _charts(data: RunData, facts: Mapping[str, Any]) -> str:
    marks = _marks(data)
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
    lines = [(step, "") for step, _ in marks]

    def small(key: str, title: str, points: Sequence[Point], style: str, unit: str = "") -> str:
        series = Series(title.partition(" (")[0].lower(), points, style)
        return Chart(key, title, [series], marks=lines, unit=unit, include=(0.0,)).render()

    memory = [(step, value / 2**30) for step, value in data.series("memory_bytes")]
    parts = [
        Chart("loss", "Loss (nats per token)", [*train, validation], 1000.0, 360.0, rules, marks).render(),
        small("speed", "Tokens per second", data.series("tokens_per_second"), "speed"),
        small("norm", "Gradient norm", data.series("grad_norm"), "norm"),
        small("rate", "Learning rate", data.series("lr"), "rate"),
        small("memory", "Memory in use (GiB)", memory, "memory", " GiB") if memory else "",
    ]
    return f'<div class="wide">{parts[0]}</div>{"".join(parts[1:])}'


def _marks(data: RunData) -> list[tuple[float, str]]:
    """Where a later leg took over."""
    marks = []
    for index, leg in enumerate(data.legs[1:], 1):
        start = number(leg.get("start_step"))
        if start is not None:
            marks.append((start, f"leg {leg.get('leg', index)}: {leg.get('target', 'unknown')}"))
    return marks


def _legs(data: RunData) -> str:
    if not data.legs:
        return ""
    head = ("Leg", "Started", "Time", "Steps", "Hardware", "Layout", "Precision", "Resumed from")
    rows = []
    for index, leg in enumerate(data.legs):
        started, ended = number(leg.get("started")), number(leg.get("ended"))
        names = leg.get("device_names") or []
        device = f"{leg.get('devices', '?')} × {names[0] if names else leg.get('target', 'unknown')}"
        hosts = leg.get("hosts")
        rows.append(
            (
                str(leg.get("leg", index)),
                _clock_time(started) if started is not None else "unknown",
                (_duration(ended - started) if started is not None and ended is not None else None) or "unknown",
                f"{_known(leg.get('start_step'))} to {_known(leg.get('end_step'))}",
                device + (f" on {hosts} hosts" if isinstance(hosts, int) and hosts > 1 else ""),
                _layout(leg.get("layout")),
                _known(leg.get("precision")),
                Path(str(leg["resumed_from"])).name if leg.get("resumed_from") else "",
            )
        )
    long = head.index("Hardware")
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=long' if column == long else ''}>{escape(cell)}</td>" for column, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    return (
        f'<h2>Legs</h2><div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _samples(data: RunData) -> str:
    if not data.samples:
        return ""
    shown = list(reversed(data.samples))[:_SAMPLES_SHOWN]
    blocks = []
    for sample in shown:
        prompt, text = str(sample.get("prompt") or ""), str(sample["text"])
        text = text.removeprefix(prompt)
        step = f"Step {escape(_known(sample.get('step')))}"
        blocks.append(f'<div class="sample"><p>{step}</p><pre><b>{escape(prompt)}</b>{escape(text)}</pre></div>')
    more = (
        f'<p class="lead">The last {len(shown)} of {len(data.samples)}.</p>' if len(shown) < len(data.samples) else ""
    )
    return f"<h2>Samples</h2>{more}{''.join(blocks)}"


def _facts(data: RunData) -> str:
    facts, leg = data.facts, data.legs[-1] if data.legs else {}
    peak = number(facts.get("peak_flops_per_device"))
    model = {
        "Parameters": _grouped(facts.get("parameters")),
        "Vocabulary": _grouped(facts.get("vocab_size")),
        "Arithmetic per token": _flops(number(facts.get("flops_per_token"))),
        "Peak rate per device": f"{_flops(peak)}/s" if peak is not None else "unknown",
        "Source of the peak": facts.get("peak_source"),
        "Unigram entropy (nats)": _fixed(number(facts.get("unigram_entropy_nats"))),
    }
    source = facts.get("data")
    described = _flat(source) if isinstance(source, Mapping) else {}
    software = leg.get("software")
    tables = [
        _table("Model", model),
        _table("Software", _flat(software) if isinstance(software, Mapping) else {}),
        _table("Data", described),
    ]
    filled = [table for table in tables if table]
    return f'<div class="columns">{"".join(filled)}</div>' if filled else ""


def _table(title: str, rows: Mapping[str, Any]) -> str:
    cells = [
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(str(value))}</td></tr>'
        for key, value in rows.items()
        if value not in (None, "")
    ]
    if not cells:
        return ""
    return (
        f'<section><h2>{title}</h2><div class="scroll"><table><tbody>{"".join(cells)}</tbody></table></div></section>'
    )


def _config(data: RunData) -> str:
    if not data.config_text:
        return ""
    text = escape(data.config_text.rstrip())
    return f"<h2>Configuration</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mappings as dotted keys."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _value(value)
    return flat


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "unknown" if value is None else str(value).lower()
    if isinstance(value, int):
        return _grouped(value) or ""
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(item) if not isinstance(item, Mapping) else str(dict(item)) for item in value)
    return str(value)


def _layout(layout: Any) -> str:
    """The degrees above one: `fsdp 4 × tensor 2`."""
    if not isinstance(layout, Mapping):
        return "unknown" if layout is None else str(layout)
    degrees = [(axis, degree) for axis, degree in layout.items() if isinstance(degree, int) and degree > 1]
    return " × ".join(f"{axis} {degree}" for axis, degree in degrees) or "one device"


def _known(value: Any) -> str:
    return "unknown" if value is None else _value(value)


def _grouped(value: Any) -> str | None:
    known = number(value)
    return None if known is None else f"{known:,.0f}"


def _fixed(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _short(value: float | None) -> str | None:
    return None if value is None else format_number(value)


def _flops(value: float | None) -> str | None:
    """An amount of arithmetic with its SI prefix: 91.2 GFLOP."""
    if value is None:
        return None
    power = min(5, max(0, int(math.log10(value) // 3))) if value >= 1 else 0
    return f"{value / 1000.0**power:.4g} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"


def _whole(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _gib(value: float) -> str:
    return f"{value / 2**30:.2f} GiB"


def _step_time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.2f} s per step" if seconds >= 1 else f"{seconds * 1000:.0f} ms per step"


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{seconds:.1f} s"


def _clock_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
