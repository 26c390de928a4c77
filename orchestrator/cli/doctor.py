"""`python -m orchestrator doctor`: list hardware and software, and say what is missing and how to get it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.config.options import describe_options, option, parse_options

if TYPE_CHECKING:
    from orchestrator.hardware.checks import Check
    from orchestrator.hardware.target import Target

SUMMARY = "what hardware and software is here, what is missing, what to do"
_PROGRAM = "python -m orchestrator doctor"
_SIGNS = {"ok": "ok", "note": "--", "warning": "!!", "error": "XX"}


@dataclass(frozen=True)
class DoctorOptions:
    """Options of `doctor`."""

    deep: bool = option(False, help="also let two processes talk to each other (some seconds more)")
    runs_dir: str = option("runs", help="folder whose disk is looked at")
    json: bool = option(False, help="print JSON; --json is the same")


def main(argv: list[str]) -> int:
    """Run the verb. Returns 0 where training works at least on the CPU, else 1.

    Args:
        argv: the words after the verb.

    Raises:
        ConfigErrors: wrong options.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: {_PROGRAM} [key=value ...] [--json]\n\n{SUMMARY}\n\n{describe_options(DoctorOptions)}")
        print("\nExits with 0 where training works at least on the CPU.")
        return 0
    options = parse_options(DoctorOptions, ["json=true" if word == "--json" else word for word in argv])
    return _examine(options)


def _examine(options: DoctorOptions) -> int:
    from orchestrator.hardware import checks

    say = (lambda text: None) if options.json else print
    targets = _targets()
    probes = {name: target.probe() for name, target in targets.items()}
    usable = [name for name, probe in probes.items() if probe.available]
    sections: dict[str, list[Check]] = {
        "System": checks.check_system(),
        "Software": checks.check_packages(),
        "Storage and limits": checks.check_storage(options.runs_dir),
        "Launch engines": _launch_engines(),
    }
    for title, found in sections.items():
        say(_section(title, found))
    rows = [_target_row(targets[name], probe) for name, probe in probes.items()]
    say(_hardware(rows))
    trials = checks.try_devices([targets[name].device_type for name in usable], deep=options.deep)
    say(_section("Trial", trials))
    errors = [check for found in sections.values() for check in found if check.state == "error"]
    working = [name for name in usable if f"{targets[name].device_type} arithmetic" in _passed(trials)]
    fine = "cpu" in working and not errors
    if options.json:
        print(json.dumps(_as_json(sections, rows, trials, working, fine), indent=2))
    else:
        say(_verdict(working, errors, fine))
    return 0 if fine else 1


def _launch_engines() -> list[Check]:
    """Look for the client of every engine of `launch`."""
    from orchestrator.engines.engine_table import ENGINES, engine_of
    from orchestrator.hardware.checks import Check

    found = []
    for name in ENGINES:
        missing = [client for client in engine_of(name).clients if shutil.which(client) is None]
        text = f"client not here: {', '.join(missing)}; dry_run=true works without" if missing else "here"
        found.append(Check(name, "note" if missing else "ok", text))
    return found


def _targets() -> dict[str, Target]:
    """Every target in each of its runtimes, by what chooses it on a command line behind `hardware=`."""
    from orchestrator.hardware import target_table

    targets = {}
    for name in target_table.TARGETS:
        usual = targets[name] = target_table.get_target(name)
        for runtime in target_table.runtimes(name):
            if runtime != usual.runtime:
                targets[f"{name} hardware.runtime={runtime}"] = target_table.get_target(name, runtime)
    return targets


def _passed(trials: Sequence[Check]) -> set[str]:
    return {trial.name for trial in trials if trial.state == "ok"}


def _section(title: str, found: Sequence[Check]) -> str:
    width = max((len(check.name) for check in found), default=0)
    lines = [title]
    for check in found:
        lines.append(f"  {_SIGNS[check.state]}  {check.name:<{width}}  {check.text}")
        if check.fix:
            lines.append(f"      {'':<{width}}  do: {check.fix}")
    return "\n".join(lines) + "\n"


def _target_row(target: Any, probe: Any) -> dict[str, Any]:
    return {
        "target": target.name,
        "hardware_runtime": target.runtime,
        "available": probe.available,
        "devices": probe.devices,
        "device_names": sorted(set(probe.device_names)),
        "chip": probe.chip,
        "precision": target.default_precision(probe),
        "runtime": probe.runtime,
        "device_memory_bytes": probe.device_memory_bytes,
        "problems": [asdict(problem) for problem in probe.problems],
        "experimental": target.experimental,
        "state": target.state,
    }


def _hardware(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "Hardware",
        f"      {'target':<9}  {'usable':<6}  {'devices':<7}  {'precision':<9}  device (chip of the catalogue)",
    ]
    for row in rows:
        sign = _SIGNS["ok"] if row["available"] else _SIGNS["warning" if row["devices"] else "note"]
        usable = "yes" if row["available"] else "no"
        device = ", ".join(row["device_names"]) or "none found"
        device += f" ({row['chip'] or 'not in it'})" if row["devices"] and row["target"] != "cpu" else ""
        precision = row["precision"] if row["devices"] else "-"
        lines.append(f"  {sign}  {row['target']:<9}  {usable:<6}  {row['devices']:<7}  {precision:<9}  {device}")
        runtime = "" if row["hardware_runtime"] == "torch" else f"hardware.runtime={row['hardware_runtime']}, "
        lines.append(f"      {'':<9}  state: {runtime}{row['state']}")
        # Where there is no device, what else it would need is noise: only that, and whether it would help to have one.
        problems = row["problems"]
        for problem in problems if row["devices"] or len(problems) < 3 else (problems[0], problems[-1]):
            lines += [f"      {'':<9}  missing: {problem['what']}", f"      {'':<9}  do: {problem['fix']}"]
    return "\n".join(lines) + "\n"


def _verdict(working: Sequence[str], errors: Sequence[Check], fine: bool) -> str:
    if not fine:
        causes = "; ".join(f"{check.name}: {check.text}" for check in errors) or "the trial on the CPU failed"
        fix = f"Mend the lines marked {_SIGNS['error']}, then run doctor again."
        return f"Verdict: training does not work here ({causes}). {fix}"
    best = working[0]
    lines = [
        f"Verdict: training works here on {', '.join(working)}.",
        "Try:",
        f"  python -m orchestrator train hardware={best}",
    ]
    if best == "cpu":
        lines.append("  python -m orchestrator train hardware=cpu hardware.devices=2    (two processes)")
    return "\n".join(lines)


def _as_json(
    sections: dict[str, list[Check]],
    rows: Sequence[dict[str, Any]],
    trials: Sequence[Check],
    working: Sequence[str],
    fine: bool,
) -> dict[str, Any]:
    found = {title.lower().replace(" ", "_"): [asdict(check) for check in checks] for title, checks in sections.items()}
    return {
        **found,
        "hardware": list(rows),
        "trial": [asdict(trial) for trial in trials],
        "works_on": working,
        "ok": fine,
    }
