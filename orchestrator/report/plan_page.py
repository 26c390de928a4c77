"""A plan as one HTML file with its pictures, without network, library or script."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tqdm import tqdm

from orchestrator.atomic_files import write_atomically
from orchestrator.chips.catalogue import Catalogue
from orchestrator.output import is_printed
from orchestrator.planner.estimate.work import parameters
from orchestrator.planner.explain import PARTS, bound, layout_text, loses, parts
from orchestrator.planner.island_plan import IslandsPlan
from orchestrator.planner.job_plan import FleetPlan, Request, pareto
from orchestrator.planner.quantity import write
from orchestrator.planner.scaling import BINDS, ScalePoint, binding, scale, sizes
from orchestrator.report.island_plan_page import islands_section
from orchestrator.report.plan_svg import Dot, Line, log_chart, stacked_bar
from orchestrator.report.plan_text import MEMORY_PARTS, stack_of, train_words

_TONES = 10
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_GIB = 2**30
_COLUMNS = {
    "step": "Step",
    "per_chip": "Tokens/s and chip",
    "mfu": "MFU",
    "goodput": "Goodput",
    "days": "Days",
    "cost": "Cost",
    "cost_per_trillion": "Per trillion tokens",
    "energy": "Energy",
    "power": "Facility",
}


def write_page(
    path: Path,
    request: Request,
    plans: Sequence[FleetPlan],
    objective: str,
    catalogue: Catalogue,
    islands: IslandsPlan | None = None,
) -> None:
    """Write the report of `plans`, in their order.

    Args:
        path: of the file.
        request: what was planned.
        plans: one for each fleet.
        objective: the figure that ranks the plans.
        catalogue: of chips.
        islands: the plan of all fleets as islands of one run; None: there are none.

    Raises:
        OSError: the file cannot be written.
    """
    curves = _curves(request, plans, catalogue)
    write_atomically(path, render(request, plans, objective, curves, islands))


def render(
    request: Request,
    plans: Sequence[FleetPlan],
    objective: str,
    curves: Sequence[Sequence[ScalePoint]],
    islands: IslandsPlan | None = None,
) -> str:
    """Return the page as HTML.

    Args:
        request: what was planned.
        plans: one for each fleet.
        objective: the figure that ranks the plans.
        curves: the scaling of each plan's fleet, in the order of `plans`.
        islands: as of `write_page`.
    """
    shape = request.job.model
    title = f"{shape.name}: plan"
    lead = (
        f"{write(parameters(shape), 'parameters')}, {request.tokens} in sequences of {request.job.seq_len:,}, "
        f"{request.job.precision}. Times, memory and failures are predictions; ~ marks what is built on an estimate."
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        "" if request.target is None else f'<p class="lead">{"<br>".join(map(escape, request.target.lines()))}</p>',
        "" if islands is None else islands_section(islands),
        _table(plans, objective),
        _scatter(plans),
        _scaling(plans, curves),
        *(_fleet(plan) for plan in plans),
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')} by python -m orchestrator plan</footer>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<title>{escape(title)}</title>\n'
        f'<link rel="icon" href="data:,">\n<style>\n{_asset("report.css")}{_asset("plan.css")}</style>\n</head>\n'
        f"<body>\n<main>\n{chr(10).join(part for part in body if part)}\n</main>\n</body>\n</html>\n"
    )


def _curves(request: Request, plans: Sequence[FleetPlan], catalogue: Catalogue) -> list[list[ScalePoint]]:
    """Compute the scaling of every kind of chip, searched size by size."""
    wanted = [sizes(plan.fleet) for plan in plans]
    hide = None if is_printed() else True
    with tqdm(total=sum(map(len, wanted)), desc="scaling", file=sys.stderr, leave=False, disable=hide) as bar:
        curves = []
        for plan, chips in zip(plans, wanted, strict=True):
            points: list[ScalePoint] = []
            for count in chips:
                points += scale(request, plan.fleet, catalogue, [count])
                bar.update()
            curves.append(points)
    return curves


def _table(plans: Sequence[FleetPlan], objective: str) -> str:
    best = pareto(plans)
    head = "".join(f'<th scope="col">{title}</th>' for title in ("Fleet", *_COLUMNS.values()))
    rows = []
    for plan in plans:
        star = '<span class="star" title="no other is both faster and cheaper">★</span> '
        name = (star if any(plan is other for other in best) else "") + escape(plan.fleet.label)
        if plan.figures:
            shown = {key: str(plan.figures[key]).removesuffix(" tokens/s") for key in _COLUMNS}
            cells = "".join(f'<td data-label="{_COLUMNS[key]}">{escape(text)}</td>' for key, text in shown.items())
        else:
            cells = f'<td colspan="{len(_COLUMNS)}">does not fit</td>'
        rows.append(f"<tr><td>{name}</td>{cells}</tr>")
    note = f'<p class="lead">Ranked by {escape(objective)}; ★ no other fleet is both faster and cheaper.</p>'
    table = (
        f'<div class="scroll compare"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    return table + (note if len(plans) > 1 else "")


def _scatter(plans: Sequence[FleetPlan]) -> str:
    """Cost against time, with the front of those that none beats in both."""
    if len(plans) < 2:
        return ""
    best, dots = pareto(plans), []
    for index, plan in enumerate(plans):
        days, cost = (plan.figures[key] if plan.figures else None for key in ("days", "cost"))
        if days is None or cost is None or days.value is None or cost.value is None:
            continue
        hollow = not any(plan is other for other in best)
        title = f"{plan.fleet.label}: {days}, {cost}"
        dots.append(Dot(days.value, cost.value, plan.fleet.label, title, index % _TONES, hollow))
    front = sorted((dot.x, dot.y) for dot in dots if not dot.hollow)
    chart = log_chart(
        "Cost against time",
        "days (log scale)",
        "USD (log scale)",
        [Line("Pareto-optimal (no fleet is both faster and cheaper)", front, dashed=True)],
        dots,
    )
    missing = [plan.fleet.label for plan in plans if plan.figures and plan.figures["cost"].value is None]
    left = f'<p class="lead">Without a price, not drawn: {escape(", ".join(missing))}.</p>' if missing else ""
    return f"<h2>Cost and time</h2>{chart}{left}"


def _scaling(plans: Sequence[FleetPlan], curves: Sequence[Sequence[ScalePoint]]) -> str:
    lines, dots, said = [], [], []
    for index, (plan, points) in enumerate(zip(plans, curves, strict=True)):
        tone, chip = index % _TONES, plan.fleet.cluster.chip.key
        lines.append(Line(chip, [(point.chips, point.per_chip) for point in points], tone))
        dots += [
            Dot(
                point.chips,
                point.per_chip,
                title=f"{chip} x {point.chips:,}: {layout_text(point.best.plan)}",
                tone=tone,
            )
            for point in points
        ]
        for link, point in binding(points).items():
            dots.append(
                Dot(
                    point.chips,
                    point.per_chip,
                    link.removeprefix("the ").partition(" ")[0],
                    f"{chip}: {link} binds",
                    tone,
                    hollow=True,
                )
            )
            said.append(f"{chip}: from {point.chips:,} chips on, {link} takes at least {BINDS:.0%} of the step")
    what = f"A link binds where the step waits for it at least {BINDS:.0%} of the time. The batch follows the fleet"
    what += " unless it was set; rates are per chip of the fleet, idle ones counted."
    chart = log_chart("Scaling", "chips (log scale)", "tokens per second and chip (log scale)", lines, dots, 380.0)
    items = "".join(f"<li>{escape(text)}</li>" for text in said)
    return f'<h2>Scaling</h2>{chart}<p class="lead">{what}</p><ul class="lead">{items}</ul>'


def _fleet(plan: FleetPlan) -> str:
    notes = "".join(f'<p class="notice">{escape(note)}</p>' for note in plan.notes)
    head = f'<section class="fleet"><h2>{escape(plan.fleet.label)}</h2>{notes}'
    speed = f"software: {stack_of(plan)}; best of {plan.result.layouts:,} layouts"
    best = plan.best
    if best is None:
        remedy = plan.remedy
        assert remedy is not None, "a plan without a layout says what would help"
        helps = [f"with {layout_text(remedy.layout.plan)}"] if remedy.layout else []
        helps += [f"on {remedy.chips:,} chips or more"] if remedy.chips else []
        text = f"Does not fit: {remedy.needs}." + (f" It fits {', or '.join(helps)}." if helps else "")
        return f'{head}<p class="notice">{escape(text)}</p></section>'
    memory, step = best.memory, best.time.step
    held = [(name, getattr(memory, name), f"{getattr(memory, name) / _GIB:,.1f} GiB") for name in MEMORY_PARTS]
    waits = [(PARTS[name], seconds, f"{seconds / step:.1%}") for name, seconds in parts(best.time).items()]
    capacity = f" of {memory.capacity / _GIB:,.1f} GiB" if memory.capacity else ""
    rows = "".join(
        f"<tr><td class=long>{escape(layout_text(other.plan))}</td><td>{escape(write(other.time.step, 's'))}</td>"
        f"<td class=long>{escape(loses(other, best))}</td></tr>"
        for other in plan.result.ranked[1:]
    )
    others = "<thead><tr><th>Runner-up</th><th>Step</th><th>Why it loses</th></tr></thead>"
    figures = "\n\n".join(value.explain() for value in plan.figures.values())
    lead = "; ".join((layout_text(best.plan), bound(best, plan.fleet.cluster), speed))
    train = f'<p class="lead">train: <code>{escape(train_words(best))}</code></p>'
    return (
        f'{head}<p class="lead">{escape(lead)}</p>{train}'
        f"<h3>Memory per device: {memory.total / _GIB:,.1f}{capacity}</h3>"
        f"{stacked_bar(held, max(memory.total, memory.capacity or 0.0), memory.capacity)}"
        f"<h3>Step: {escape(str(plan.figures['step']))}</h3>{stacked_bar(waits, step)}{_facts(plan)}"
        + (f'<div class="scroll"><table>{others}<tbody>{rows}</tbody></table></div>' if rows else "")
        + f"<h3>Derivations</h3><details><summary>Every figure, with its formula and sources</summary>"
        f"<pre>{escape(figures)}</pre></details></section>"
    )


def _facts(plan: FleetPlan) -> str:
    kept = plan.goodput
    assert kept is not None, "a plan with a layout has failures"
    names = {
        "Days without failures": "ideal_days",
        "Time between failures": "mtbf",
        "Interruptions": "interruptions",
        "Save every": "interval",
        "Stall of a save": "stall",
        "Spare chips advised": "spares",
    }
    cells = [(name, str(plan.figures[key])) for name, key in names.items()]
    cells += [("Goodput with restarts", str(kept.restart)), ("with replaced groups", str(kept.replace or "one group"))]
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in cells)
    return f'<dl class="cards">{rows}</dl>'


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
