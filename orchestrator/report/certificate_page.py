"""The HTML pages of certificates: one by itself, and several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.atomic_files import write_atomically
from orchestrator.report.page import escaped, frame, table
from orchestrator.report.run_text import clock_time, duration, flat
from orchestrator.report.svg import Chart, Series

_TONES = ("#1f6feb", "#c2620a", "#1a7f4b", "#7a4fd0", "#c0362c", "#0e8a8a", "#b0448c", "#76652b")
# The classes of a run's status, whose colours the pages' style sheet has.
_STATUS = {"passed": "finished", "failed": "failed", "not run": "interrupted"}
Row = Sequence[str]


def write_certificate_page(path: Path, certificate: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the page of a certificate.

    Args:
        path: of the file.
        certificate: as `certificate.json` has it.
        kinds: title, meaning and reason of each kind of case, by name: `title`, `measures`, `tolerance`, `why`.

    Raises:
        OSError: it cannot be written.
    """
    write_atomically(path, render_certificate(certificate, kinds))


def render_certificate(certificate: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page as HTML.

    Args:
        certificate: as `certificate.json` has it.
        kinds: as for `write_certificate_page`.
    """
    device, passed = certificate["device"], certificate["passed"]
    title = f"Certificate: {device['target']}"
    failures = [case for case in certificate["cases"] if case["status"] != "passed"]
    lead = (
        f"{device['devices']} × {', '.join(device['device_names'][:1]) or device['target']}"
        f"{', simulated' if device.get('simulated') else ''}, {certificate['precision']}, "
        f"made {clock_time(certificate['made_at'])} in {duration(certificate['seconds'])}"
    )
    return frame(
        title,
        [
            f"<h1>{escaped(title)}{_status('passed' if passed else 'failed')}</h1>",
            f'<p class="lead">{escaped(lead)}</p>',
            *(f'<p class="notice">{escaped(_failure(case, kinds))}</p>' for case in failures),
            _cards(certificate),
            f'<section class="charts" aria-label="Curves">{_curves(certificate)}</section>',
            "<h2>Cases</h2>",
            _cases(certificate["cases"], kinds),
            _left_out(certificate["left_out"]),
            "<h2>What is measured</h2>",
            table(
                ("Case", "Measured", "Largest that passes", "Why"),
                [
                    (kind["title"], kind["measures"], f"{kind['tolerance']:g}", kind["why"])
                    for name, kind in kinds.items()
                    if any(case["name"] == name for case in certificate["cases"])
                ],
            ),
            "<h2>Where</h2>",
            table(("Key", "Value"), list(flat({key: certificate[key] for key in _FACTS}).items())),
        ],
        _style(len(certificate["losses"])),
    )


_FACTS = ("device", "runtime", "software", "reference")


def write_comparison_page(path: Path, title: str, parts: Sequence[tuple[str, Row, Sequence[Row]]]) -> None:
    """Write the page that sets certificates side by side.

    Args:
        path: of the file.
        title: as text.
        parts: heading, column names and rows of each table.

    Raises:
        FileExistsError: there is a file of that name; it stays as it is.
        OSError: it cannot be written.
    """
    body = [f"<h1>{escaped(title)}</h1>"]
    for heading, names, rows in parts:
        body += [f"<h2>{escaped(heading)}</h2>", table(names, rows) if rows else '<p class="lead">Nothing.</p>']
    with open(path, "x", encoding="utf-8") as file:
        file.write(frame(title, body))


def _status(status: str) -> str:
    return f'<span class="status {_STATUS.get(status, "")}">{escaped(status)}</span>'


def _failure(case: Mapping[str, Any], kinds: Mapping[str, Mapping[str, Any]]) -> str:
    title = kinds[case["name"]]["title"] if case["name"] in kinds else case["name"]
    where = f" ({case['layout']})" if case["layout"] else ""
    return f"{title}{where}: {case['status']}, {_number(case['measured'])}. {case['note']}"


def _cards(certificate: Mapping[str, Any]) -> str:
    words = {True: "reached", False: "not reached", None: "nothing to compare"}
    names = {"same layout": "Bitwise on the same layout", "across layouts": "Bitwise across layouts"}
    names["across vendors"] = "Within tolerance across vendors"
    cards = [(names.get(name, name), words[reached]) for name, reached in certificate["tiers"].items()]
    cases = certificate["cases"]
    cards.append(("Cases passed", f"{sum(case['status'] == 'passed' for case in cases)} of {len(cases)}"))
    rows = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in cards)
    return f'<dl class="cards">{rows}</dl>'


def _curves(certificate: Mapping[str, Any]) -> str:
    def chart(key: str, title: str, series: Mapping[str, Sequence[float | None]]) -> str:
        lines = [
            Series(layout, [(at + 1.0, value) for at, value in enumerate(values) if value is not None], f"run{number}")
            for number, (layout, values) in enumerate(series.items())
        ]
        return Chart(key, title, lines, 460.0, 230.0).render()

    losses = chart("loss", "Loss (nats per token), by layout", certificate["losses"])
    return losses + chart("norm", "Gradient norm, by layout", certificate["norms"])


def _cases(cases: Sequence[Mapping[str, Any]], kinds: Mapping[str, Mapping[str, Any]]) -> str:
    names = ("Case", "Layout", "Result", "Measured", "Tolerance", "Note")
    return table(
        names,
        [
            (
                kinds[case["name"]]["title"] if case["name"] in kinds else case["name"],
                case["layout"],
                case["status"],
                _number(case["measured"]),
                f"{case['tolerance']:.1e}",
                case["note"],
            )
            for case in cases
        ],
    )


def _left_out(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{escaped(line)}</li>" for line in lines)
    return f'<p class="lead">Layouts that were not tried:</p><ul class="lead">{items}</ul>' if lines else ""


def _number(value: float | None) -> str:
    return "not finite, or not measured" if value is None else f"{value:.1e}"


def _style(count: int) -> str:
    lines = [f".run{at} {{ --tone: {_TONES[at % len(_TONES)]}; }}" for at in range(count)]
    return "\n".join(lines) + "\n"
