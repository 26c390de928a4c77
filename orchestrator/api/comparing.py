"""Compare runs from Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.api.runs import Run, Table, load_run
from orchestrator.config.compose import read_plain
from orchestrator.errors import ConfigError, UserError
from orchestrator.report.comparison import Compared, compare_text, differences, read_compared
from orchestrator.runs import run_directory


@dataclass(frozen=True)
class Comparison:
    """The comparison of several runs. `str` gives the tables of the command line."""

    runs: Sequence[Compared]

    @property
    def table(self) -> Table:
        """One row for each run: its headline figures, `best_loss` and `best_val_loss`; None for what is unknown."""
        return Table(run.facts for run in self.runs)

    @property
    def differences(self) -> dict[str, list[str]]:
        """The keys of the configuration whose values differ, with the value of each run as text."""
        return differences(self.runs)

    def write_html(self, path: str | Path) -> Path:
        """Write a page with the loss curves over each other. Returns its path.

        Args:
            path: of the new file.

        Raises:
            ConfigError: there is a file of that name, or it cannot be written.
        """
        from orchestrator.report.compare_page import write_compare_page

        try:
            write_compare_page(Path(path), self.runs)
        except FileExistsError:
            raise ConfigError("there is a file of that name", got=path, fix="name another one") from None
        except OSError as error:
            raise ConfigError(f"the page cannot be written: {error.strerror or error}", got=path) from None
        return Path(path)

    def __str__(self) -> str:
        return compare_text(self.runs)


def compare(runs: Sequence[Run | str | Path], *, runs_dir: str | Path = "runs") -> Comparison:
    """Compare runs.

    Args:
        runs: two or more, each a `Run` or what `load_run` takes.
        runs_dir: where `latest` and names look.

    Raises:
        ConfigError: there are fewer than two.
        CheckpointError: there is no such run.
    """
    if isinstance(runs, (str, Path)) or len(runs) < 2:
        raise ConfigError("two runs or more are compared", got=str(runs), allowed="latest, run directories, names")
    found = [run if isinstance(run, Run) else load_run(run, runs_dir=runs_dir) for run in runs]
    directories = [run.directory for run in found]
    return Comparison(read_compared(directories, [_config(directory) for directory in directories]))


def _config(directory: Path) -> dict[str, Any]:
    try:
        return read_plain(directory / run_directory.CONFIG)
    except UserError:
        return {}  # damaged, or not there: the curves can be compared all the same
