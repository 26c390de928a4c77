"""The plan of a run on islands as a part of the plan's page: tables, and the link that inner steps need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from orchestrator.planner.estimate.exchange_bytes import KINDS
from orchestrator.planner.island_plan import IslandsPlan, needed_bits
from orchestrator.report.island_plan_text import NOTE, island_rows, kind_rows, sweep_rows, way_rows
from orchestrator.report.plan_svg import Dot, Line, log_chart


def islands_section(plan: IslandsPlan) -> str:
    """Return the section as HTML.

    Args:
        plan: of the islands.
    """
    if not plan.fits:
        text = f"The model does not fit {', '.join(plan.misfits)}."
        return f'<h2>Islands</h2><p class="notice">{escape(text)}</p>'
    parts = [_table(island_rows(plan)), _table(way_rows(plan))]
    if plan.sweep:
        parts += [_chart(plan), _table(sweep_rows(plan)), _table(kind_rows(plan))]
    lead = f"A step of {plan.step}; {plan.outcomes[0].terms.label}. {NOTE}"
    figures = "\n\n".join(value.explain() for value in plan.outcomes[0].figures.values())
    derived = f"<details><summary>Derivations</summary><pre>{escape(figures)}</pre></details>"
    return f'<h2>Islands</h2><p class="lead">{escape(lead)}</p>{"".join(parts)}{derived}'


def _chart(plan: IslandsPlan) -> str:
    """Draw the link that each kind of numbers needs, against the inner steps; dots are the islands' links."""
    lines, dots = [], []
    step = plan.step.value if plan.step is not None else None
    for tone, kind in enumerate(KINDS):
        size = replace(plan.terms, kind=kind).size(plan.request.job.model).value
        if not step or not size:
            continue
        points = []
        for one in plan.sweep:
            terms = replace(one.terms, kind=kind)
            points.append((float(terms.inner_steps), needed_bits(size, step, terms) / 1e9))
        lines.append(Line(kind, points, tone))
    for site in plan.sites:
        if site.link.value:
            title = f"link of {site.name}: {site.link}"
            dots.append(Dot(float(plan.terms.inner_steps), site.link.value / 1e9, site.name, title, hollow=True))
    return log_chart("Link that an island needs", "inner steps (log scale)", "Gbit/s each way (log scale)", lines, dots)


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
