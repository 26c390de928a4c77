"""`python -m orchestrator coordinate-check`: whether activations keep their size as a model gets wider or deeper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError, ConfigErrors

if TYPE_CHECKING:
    from orchestrator.config.compose import Composed
    from orchestrator.training.coordinate_check import Scales

_PROGRAM = "python -m orchestrator coordinate-check"
# The check's own defaults of a training's keys, where the words have none: small, and without a tokenizer to make.
_SMALL = (
    *("model.layers=2", "train.seq_len=64", "train.global_batch_tokens=512"),
    *("data.tokenizer.kind=bytes", "hardware=cpu"),
)

_HELP = """usage: {program} [group=option ...] [key=value ...]

Train models of several widths, or depths, for a few steps, and compare how large their activations are. Under a rule
that transfers hyper-parameters (optim.transfer: docs/transfer.md) they are the same at every size; under the standard
parametrisation they grow. The configuration is that of `train`; its model is the base of the others.

Options
{options}

Examples
  {program}
  {program} optim=muon widths=64,128,256
  {program} layers=2,4,8,16 rules=none,completep

Writes check.json, check.svg and prints a table. Exits with 0 where the activations of every rule but `none` are flat:
the largest at most twice the smallest, of all sizes; with 1 otherwise."""


@dataclass(frozen=True)
class CheckOptions:
    """Options of `coordinate-check`; everything else is `train`'s."""

    widths: tuple[int, ...] = option((), help="of the models, comma-separated; none: 64,128,256,512,1024")
    layers: tuple[int, ...] = option((), help="or their numbers of layers, at the configured width")
    rules: tuple[Literal["none", "mup", "completep"], ...] = option(
        (), help="of optim.transfer, comma-separated; none,mup, and of layers none,completep"
    )
    steps: int = option(10, help="of each training, 1 or more")
    seeds: int = option(1, help="trainings of each model, 1 or more; scales are their means")
    output: str = option("coordinate-check", help="folder that check.json and check.svg are written to")


def main(argv: list[str]) -> int:
    """Run the verb. Returns the exit status.

    Args:
        argv: the words after the verb.

    Raises:
        UserError: what of the options, the configuration or the data is wrong.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(_HELP.format(program=_PROGRAM, options=describe_options(CheckOptions)))
        return 0
    from orchestrator.config.compose import run_composed

    own = [word for word in argv if word.partition("=")[0] in CheckOptions.__dataclass_fields__]
    options = parse_options(CheckOptions, own)
    if problems := _problems(options):
        raise ConfigErrors(problems)
    words = [word for word in argv if word not in own]
    given = {word.partition("=")[0] for word in words}
    if "experiment" not in given:
        words = [*(word for word in _SMALL if word.partition("=")[0] not in given), *words]
    return run_composed(words, "orchestrator coordinate-check", lambda composed: _check(composed, options))


def _problems(options: CheckOptions) -> list[ConfigError]:
    problems = []
    if options.widths and options.layers:
        what, got = "models of a check differ in width or in depth", "widths and layers"
        problems.append(ConfigError(what, got=got, fix="leave one of them out"))
    sizes = options.widths or options.layers
    if sizes and (len(set(sizes)) < 2 or min(sizes) < 1):
        what = "a check compares models of two sizes or more"
        problems.append(ConfigError(what, got=", ".join(map(str, sizes)), fix="give two, each 1 or more"))
    for key in ("steps", "seeds"):
        if getattr(options, key) < 1:
            problems.append(ConfigError(f"'{key}' is out of range", got=getattr(options, key), allowed="1 or more"))
    return problems


def _check(composed: Composed, options: CheckOptions) -> int:
    from orchestrator.hardware.target_table import resolve
    from orchestrator.training.coordinate_check import as_data, run_check

    config = composed.config
    target = resolve(config.hardware)
    if target.strategy != "dtensor":
        raise ConfigError(
            "a coordinate check trains on CPUs, CUDA and ROCm devices: what it finds is no matter of hardware",
            got=f"hardware={target.name}",
            fix="set hardware=cpu",
        )
    axis = "layers" if options.layers else "width"
    sizes = sorted(set(options.layers or options.widths or (64, 128, 256, 512, 1024)))
    rules = list(dict.fromkeys(options.rules)) or ["none", "completep" if options.layers else "mup"]

    def tell(last: Scales) -> None:
        print(f"trained    {last.rule}: {axis} {last.size}, loss {last.loss:.3f} after {last.step} steps", flush=True)

    measured = run_check(config, rules, axis, sizes, options.steps, options.seeds, target.device(0), tell)
    data = {**as_data(measured, axis, options.steps), "optimizer": config.optim.name, "lr": config.optim.lr}
    _write(Path(options.output).expanduser(), data, measured)
    print(_table(data, measured))
    return 0 if all(flat for rule, flat in data["flat"].items() if rule != "none") else 1


def _write(folder: Path, data: dict[str, Any], measured: Sequence[Scales]) -> None:
    from orchestrator.atomic_files import write_atomically

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "check.json", json.dumps(data, indent=1) + "\n")
        write_atomically(folder / "check.svg", _drawing(data, measured))
    except OSError as error:
        raise ConfigError("the check cannot be written", got=f"{folder}: {error.strerror or error}") from None


def _drawing(data: dict[str, Any], measured: Sequence[Scales]) -> str:
    from orchestrator.report.panels import Panel, draw_panels
    from orchestrator.report.plan_svg import Line
    from orchestrator.training.coordinate_check import KINDS, curve

    panels = []
    for rule in data["spread"]:
        lines = [
            Line(kind, list(curve(measured, rule, kind, data["steps"]).items()), tone)
            for tone, kind in enumerate(KINDS)
        ]
        title = f"{'standard' if rule == 'none' else rule}, {data['optimizer']} lr={data['lr']:g}"
        panels.append(Panel(title, data["axis"], f"mean |activation| after {data['steps']} steps", lines))
    return draw_panels(panels)


def _table(data: dict[str, Any], measured: Sequence[Scales]) -> str:
    from orchestrator.training.coordinate_check import FLAT, curve

    rows = []
    for rule, kinds in data["spread"].items():
        for kind, spread in kinds.items():
            values = curve(measured, rule, kind, data["steps"])
            rows.append([rule, kind, *(f"{value:.4g}" for value in values.values()), f"{spread:.2f}"])
    sizes = [str(size) for size in curve(measured, rows[0][0], rows[0][1], data["steps"])]
    rows.insert(0, ["rule", "activations", *(f"{data['axis']} {size}" for size in sizes), "largest/smallest"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    flat = [f"{rule}: {'flat' if ok else 'not flat'}" for rule, ok in data["flat"].items()]
    return "\n".join(["", *lines, "", f"{', '.join(flat)} (flat: at most {FLAT:g})"])
