"""`python -m orchestrator watch`: follow a run on the terminal."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator import stopping
from orchestrator.config.options import describe_options, option, parse_options
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Group

    from orchestrator.api.run_overview import RunLook

_PROGRAM = "python -m orchestrator watch"
_ROW_BYTES = 1 << 19  # of the metrics' end, for the curve
_BAR = 40
_NARROW = 60


@dataclass(frozen=True)
class WatchOptions:
    """Options of `watch`."""

    run: str = option("latest", help="latest, a run directory, or the name of a run")
    every: float = option(2.0, help="seconds between two looks")
    once: bool = option(False, help="show it once")
    runs_dir: str = option("runs", help="where latest and names look")


def main(argv: list[str]) -> int:
    """Run the verb; `argv` is what follows `watch`. Returns the exit status.

    Raises:
        UserError: wrong options, or a run that is not there.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(f"usage: {_PROGRAM} [RUN] [key=value ...]\n")
        print("Show how far a run is, its loss, its speed and what its time went into, until it ends (or Ctrl-C).")
        print("The run is not touched, and may be on another host that shares its folder.\n")
        print(describe_options(WatchOptions))
        return 0
    options = parse_options(WatchOptions, argv, positional=("run",))
    if not 0.1 <= options.every <= 3600:
        raise ConfigError("a look takes time", got=f"every={options.every:g}", allowed="0.1 to 3600 s")
    from pathlib import Path

    from orchestrator.runs.listing import find_run

    run_dir, runs_dir = find_run(options.run, options.runs_dir), Path(options.runs_dir)
    if options.once:
        return _print_once(run_dir, runs_dir)
    return _draw(run_dir, runs_dir, options.every) if sys.stdout.isatty() else _print(run_dir, runs_dir, options.every)


def _print_once(run_dir: Path, runs_dir: Path) -> int:
    from rich.console import Console

    from orchestrator.api.run_overview import look_at

    width = max(_NARROW, shutil.get_terminal_size((100, 40)).columns)
    Console(width=width, highlight=False).print(_picture(look_at(run_dir, runs_dir, _ROW_BYTES), width))
    return 0


def _draw(run_dir: Path, runs_dir: Path, every: float) -> int:
    """Draw the run in place until it ends; the last picture stays."""
    from rich.console import Console
    from rich.live import Live

    from orchestrator.api.run_overview import look_at

    console = Console(highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            look = look_at(run_dir, runs_dir, _ROW_BYTES)
            live.update(_picture(look, max(_NARROW, console.width)), refresh=True)
            if look.overview.state != "running":
                return 0
            _wait(every)


def _print(run_dir: Path, runs_dir: Path, every: float) -> int:
    """Print a line for each new step that is seen; for files and pipes."""
    from orchestrator.api.run_overview import look_at

    shown: tuple[str, int | None] | None = None
    while True:
        one = look_at(run_dir, runs_dir).overview
        if (one.state, one.step) != shown:
            shown = one.state, one.step
            loss = "" if one.loss is None else f"  loss {one.loss:.4f}"
            rate = "" if one.tokens_per_second is None else f"  {one.tokens_per_second:,.0f} tokens/s"
            print(f"{one.run}  {one.state}  step {one.step or 0:,} of {one.max_steps or 0:,}{loss}{rate}", flush=True)
        if one.state != "running":
            return 0
        _wait(every)


def _wait(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        stopping.check()
        time.sleep(min(left, 0.1))


def _picture(look: RunLook, width: int) -> Group:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    from orchestrator.report.run_frame import frame, seconds_to_go, time_line
    from orchestrator.report.run_text import duration

    one = look.overview
    left = seconds_to_go([row for row in look.rows if "loss" in row], one.step, one.max_steps)
    head = Text.assemble((one.run, "bold"), "  ", (one.state, _COLOURS.get(one.state, "")), f"  {one.host or ''}")
    ends = f", {duration(left)} to go" if left and one.state == "running" else ""
    progress = Table.grid(padding=(0, 2))
    done = Text(f"step {one.step or 0:,} of {one.max_steps or 0:,}{ends}")
    progress.add_row(ProgressBar(total=max(1, one.max_steps or 1), completed=one.step or 0, width=_BAR), done)
    body = Table.grid(padding=(0, 2))
    for label, text in frame(look.facts, look.rows, width):
        body.add_row(Text(label, "dim"), Text(text, no_wrap=True, overflow="ellipsis"))
    if booked := _seconds(look.goodput):
        goodput = "" if one.goodput is None else f"goodput {one.goodput:.1%}"
        body.add_row(Text("time", "dim"), Text(goodput))
        for label, text in time_line(booked, _BAR):
            body.add_row(Text(f"  {label}", "dim"), Text(text))
    return Group(head, progress, body)


_COLOURS = {"running": "green", "finished": "green", "failed": "red", "dead": "red", "diverged": "red"}


def _seconds(goodput: Mapping[str, object]) -> dict[str, float]:
    seconds = goodput.get("seconds")
    if not isinstance(seconds, dict):
        return {}
    return {str(key): float(value) for key, value in seconds.items() if isinstance(value, (int, float))}
