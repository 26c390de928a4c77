"""Certificates side by side: in which cases, by how much and from which devices on two vendors differ. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.certify.certificate import PASSED, TIERS, Certificate, OpenedCertificate
from orchestrator.certify.kinds import KINDS

ABSENT = "-"


@dataclass(frozen=True)
class Apart:
    """How far the trainings of two certificates are from each other.

    Attributes:
        one: label of the first one.
        other: label of the other one.
        layouts: of both; one word where it is the same.
        losses: largest relative difference of a loss; None where one is not finite, or there are none.
        step: at which that is, from 1.
        allowed: largest difference that agrees.
    """

    one: str
    other: str
    layouts: str
    losses: float | None
    step: int
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the losses differ by no more than is allowed."""
        return self.losses is not None and self.losses <= self.allowed


@dataclass(frozen=True)
class Sides:
    """Several certificates, compared.

    Attributes:
        labels: a short name of each, another one for each.
        certificates: in the same order.
    """

    labels: tuple[str, ...]
    certificates: tuple[Certificate, ...]

    @classmethod
    def of(cls, opened: Sequence[OpenedCertificate]) -> Sides:
        """Compare what was read.

        Args:
            opened: two certificates or more.
        """
        names = [str(each.certificate.device.get("target")) for each in opened]
        labels = [name if names.count(name) == 1 else f"{name} {at + 1}" for at, name in enumerate(names)]
        return cls(tuple(labels), tuple(each.certificate for each in opened))

    @property
    def comparable(self) -> bool:
        """Whether they were held against the same reference."""
        return len({certificate.reference for certificate in self.certificates}) == 1

    def results(self) -> list[list[str]]:
        """Return a row of results for each kind: what they are of, whether they have passed, and their tiers."""
        rows = [
            ["devices", *(_devices(each) for each in self.certificates)],
            ["result", *("passed" if each.passed else f"{len(each.failures)} failed" for each in self.certificates)],
        ]
        words = {True: "reached", False: "not reached", None: "nothing to compare"}
        rows += [[said, *(words[each.tiers[name]] for each in self.certificates)] for name, said in TIERS.items()]
        return rows

    def cases(self) -> list[list[str]]:
        """Return a row for each kind of case in which they differ: what was measured on the worst layout of each."""
        rows = [[_title(name), *(_worst(each, name) for each in self.certificates)] for name in self._kinds()]
        return [row for row in rows if len(set(row[1:])) > 1]

    def verdicts(self) -> list[str]:
        """Return a line for each kind of case that one has passed, on all its layouts, and another one has not."""
        lines = []
        for name in self._kinds():
            pairs = zip(self.labels, self.certificates, strict=True)
            found = {label: verdict for label, each in pairs if (verdict := _verdict(each, name))}
            if len(set(found.values())) > 1:
                lines.append(f"{_title(name)}: {'; '.join(f'{said} on {label}' for label, said in found.items())}")
        return lines

    def _kinds(self) -> list[str]:
        return list(dict.fromkeys(case.name for each in self.certificates for case in each.cases))

    def losses(self) -> list[Apart]:
        """Return how far the losses of each are from those of the first one, on layouts of both, else on one each."""
        return [
            apart
            for label, certificate in zip(self.labels[1:], self.certificates[1:], strict=True)
            for apart in _apart(self.labels[0], self.certificates[0], label, certificate)
        ]

    def facts(self) -> list[list[str]]:
        """Return a row for each fact of devices, runtime and software that is not the same."""
        tables = [_facts(each) for each in self.certificates]
        keys = dict.fromkeys(key for table in tables for key in table)
        rows = [[key, *(table.get(key, ABSENT) for table in tables)] for key in keys]
        return [row for row in rows if len(set(row[1:])) > 1]

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain data for JSON."""
        return {
            "certificates": list(self.labels),
            "comparable": self.comparable,
            "results": {name: values for name, *values in self.results()},
            "verdicts": self.verdicts(),
            "cases": [dict(zip(("case", *self.labels), row, strict=True)) for row in self.cases()],
            "losses": [{**vars(apart), "agrees": apart.agrees} for apart in self.losses()],
            "facts": {name: values for name, *values in self.facts()},
        }


def _devices(certificate: Certificate) -> str:
    names = certificate.device.get("device_names") or [certificate.device.get("target")]
    simulated = " (simulated)" if certificate.device.get("simulated") else ""
    return f"{certificate.device.get('devices')} x {names[0]}{simulated}"


def _title(name: str) -> str:
    return KINDS[name].title if name in KINDS else name


def _worst(certificate: Certificate, name: str) -> str:
    """Return what was measured on the layout on which it is farthest off, or was not measured at all."""
    cases = [case for case in certificate.cases if case.name == name]
    if not cases:
        return ABSENT
    worst = max(cases, key=lambda case: (case.status != PASSED, math.inf if case.measured is None else case.measured))
    measured = "not finite" if worst.measured is None else f"{worst.measured:.1e}"
    # Where it is nothing, no layout is worse than another.
    where = f" ({worst.layout})" if worst.layout and worst.measured != 0 else ""
    return f"{measured} {worst.status}{where}"


def _verdict(certificate: Certificate, name: str) -> str:
    """Say whether a kind has passed on all layouts, else on which it has not; empty where it was not tried."""
    cases = [case for case in certificate.cases if case.name == name]
    wrong = [case for case in cases if case.status != PASSED]
    if not wrong:
        return PASSED if cases else ""
    layouts = ", ".join(case.layout for case in wrong if case.layout)
    return f"failed{f' ({layouts})' if layouts else ''}"


def _apart(one: str, first: Certificate, other: str, second: Certificate) -> list[Apart]:
    common = [layout for layout in first.losses if layout in second.losses]
    pairs = [(layout, layout) for layout in common] or list(zip(first.losses, second.losses, strict=False))[:1]
    found = []
    for mine, theirs in pairs:
        name = mine if mine == theirs else f"{mine} and {theirs}"
        differences = [
            None if a is None or b is None else abs(a - b) / max(abs(a), 1e-30)
            for a, b in zip(first.losses[mine], second.losses[theirs], strict=False)
        ]
        whole = bool(differences) and None not in differences
        step = max(range(len(differences)), key=lambda at: differences[at] or 0.0) if whole else 0
        found.append(
            Apart(one, other, name, differences[step] if whole else None, step + 1, 2 * KINDS["losses"].tolerance)
        )
    return found


def _facts(certificate: Certificate) -> dict[str, str]:
    groups: dict[str, Mapping[str, Any]] = {
        "device": certificate.device,
        "runtime": certificate.runtime,
        "software": certificate.software,
    }
    return {f"{group}.{key}": _said(value) for group, values in groups.items() for key, value in values.items()}


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(item)}" for key, item in value.items())
    if isinstance(value, list):
        kinds = list(dict.fromkeys(map(str, value)))
        return ", ".join(kinds)
    return "unknown" if value is None else str(value)
