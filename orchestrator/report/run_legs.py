"""The sections of a report on the legs of a run and the handover checks between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from orchestrator.report.run_data import RunData, number
from orchestrator.report.run_text import clock_time, duration, known, layout
from orchestrator.report.svg import format_number

_QUANTITIES = (("loss", "Loss"), ("grad_norm", "Gradient norm"), ("logits", "Logits"), ("tensors", "Changed tensors"))


def marks(data: RunData) -> list[tuple[float, str]]:
    """Return where a later leg took over; named where something changed, so that restarts in place stay quiet.

    Args:
        data: of the run.
    """
    found = []
    for before, leg in zip(data.legs, data.legs[1:], strict=False):
        start = number(leg.get("start_step"))
        if start is None:
            continue
        moved = any(before.get(key) != leg.get(key) for key in ("target", "device_names", "layout", "precision"))
        name = f"leg {known(leg.get('leg'))}: {known(leg.get('target'))}" if moved else ""
        if moved and before.get("target") == leg.get("target"):
            name += f", {layout(leg.get('layout'))}"
        found.append((start, name + (", handover differs" if _verdict(leg) == "differs" else "")))
    found += [(onset, "spike") for one in _entries(data, "spikes") if (onset := number(one.get("onset"))) is not None]
    found += [(to, f"rewind from {known(one.get('step'))}") for to, one in _rewinds(data)]
    return found


def _entries(data: RunData, key: str) -> list[Mapping[str, Any]]:
    """Return what the legs list under a key, one after the other."""
    lists = [found for leg in data.legs if isinstance(found := leg.get(key), list)]
    return [one for found in lists for one in found if isinstance(one, Mapping)]


def _rewinds(data: RunData) -> list[tuple[float, Mapping[str, Any]]]:
    """Return the rewinds of all legs, each with the step that the run was taken back to."""
    entries = _entries(data, "rewinds")
    return [(to, one) for one in entries if (to := number(one.get("to"))) is not None]


def rewinds_section(data: RunData) -> str:
    """Return a table of the times that the run was taken back; nothing where it was not.

    Args:
        data: of the run.
    """
    rows = []
    for to, one in _rewinds(data):
        skipped, found = one.get("skipped"), one.get("found")
        said = [one.get("what"), *(found if isinstance(found, list) else [])]
        left_out = "unknown"
        if isinstance(skipped, list) and len(skipped) == 2:
            left_out = f"sequences {known(skipped[0])} to before {known(skipped[1])}"
        rows.append(
            (
                known(one.get("step")),
                format_number(to),
                "; ".join(str(text) for text in said if text),
                left_out,
                known(one.get("undone_steps")),
            )
        )
    head = ("From step", "To step", "Why", "Left out", "Steps undone")
    return _rows_section("Rewinds", head, rows, long="Why") if rows else ""


def legs_section(data: RunData) -> str:
    """Return a table of the legs; nothing where there is none.

    Args:
        data: of the run.
    """
    if not data.legs:
        return ""
    head = (
        "Leg",
        "Started",
        "Time",
        "Steps",
        "Hardware",
        "Layout",
        "Precision",
        "Software",
        "Resumed from",
        "Handover",
    )
    rows = []
    for index, leg in enumerate(data.legs):
        started, ended = number(leg.get("started")), number(leg.get("ended"))
        spent = duration(ended - started) if started is not None and ended is not None else None
        rows.append(
            (
                str(leg.get("leg", index)),
                clock_time(started) if started is not None else "unknown",
                spent or "unknown",
                f"{known(leg.get('start_step'))} to {known(leg.get('end_step'))}",
                _hardware(leg),
                layout(leg.get("layout")),
                known(leg.get("precision")),
                _software(leg),
                Path(str(leg["resumed_from"])).name if leg.get("resumed_from") else "",
                _verdict(leg),
            )
        )
    return _rows_section("Sessions (one per start)", head, rows, long="Hardware")


def handovers_section(data: RunData) -> str:
    """Return a table of the checks of `handover.json`, also of those that stopped the run, if there are any.

    Args:
        data: of the run.
    """
    if not data.handovers:
        return ""
    head = ("Step", "Leg", "From", "To", "Changed", *(title for _, title in _QUANTITIES), "Verdict")
    rows = []
    for entry in data.handovers:
        changed = entry.get("changed")
        verdict = known(entry.get("verdict"))
        if verdict == "differs":
            verdict += ", went on" if entry.get("went_on") else ", stopped"
        rows.append(
            (
                known(entry.get("step")),
                known(entry.get("leg")),
                _side(entry.get("from")),
                _side(entry.get("to")),
                ", ".join(map(str, changed)) if isinstance(changed, list) else "",
                *(_difference(entry.get(key), key) for key, _ in _QUANTITIES),
                verdict,
            )
        )
    lead = (
        '<p class="lead">What the model gave for the reference batch before the first step, against what it gave when '
        "the checkpoint was saved: the difference, and what is allowed.</p>"
    )
    return _rows_section("Handovers", head, rows, long="To", lead=lead)


def _difference(value: Any, key: str) -> str:
    if not isinstance(value, Mapping):
        return "unchecked"
    difference, allowed = number(value.get("difference")), number(value.get("tolerance"))
    if key == "tensors":
        return known(value.get("difference"))
    shown = "not finite" if difference is None else format_number(difference)
    return f"{shown} of {'unknown' if allowed is None else format_number(allowed)}"


def _side(side: Any) -> str:
    if not isinstance(side, Mapping):
        return "unknown"
    return (
        f"{known(side.get('target'))}, {layout(side.get('layout'))}, {known(side.get('precision'))}, {_software(side)}"
    )


def _hardware(leg: Mapping[str, Any]) -> str:
    names, hosts = leg.get("device_names") or [], leg.get("hosts")
    device = f"{leg.get('devices', '?')} × {names[0] if names else leg.get('target', 'unknown')}"
    return device + (f" on {hosts} hosts" if isinstance(hosts, int) and hosts > 1 else "")


def _software(side: Mapping[str, Any]) -> str:
    software = side.get("software")
    return f"torch {known(software.get('torch'))}" if isinstance(software, Mapping) else "unknown"


def _verdict(leg: Mapping[str, Any]) -> str:
    handover = leg.get("handover")
    return known(handover.get("verdict")) if isinstance(handover, Mapping) else ""


def _rows_section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], long: str, lead: str = "") -> str:
    wide = list(head).index(long)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=long' if at == wide else ''}>{escape(cell)}</td>" for at, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    titles = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        f'<h2>{title}</h2>{lead}<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )
