"""Runs as Python objects: status, metrics, checkpoints and report of a run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import committed
from orchestrator.config.compose import read_config
from orchestrator.config.schema import RunConfig
from orchestrator.errors import MissingExtraError
from orchestrator.report.run_data import RunData, headline, read_run_data
from orchestrator.runs import listing, run_directory

if TYPE_CHECKING:
    import pandas


class Table(list[dict[str, Any]]):
    """Rows, each a mapping of column to value; a column that a row lacks is not in it."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a data frame.

        Raises:
            MissingExtraError: pandas is not installed; nothing else needs it.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise MissingExtraError("pandas", "pandas", "Table.to_pandas") from error
        return pandas.DataFrame(list(self))


@dataclass(frozen=True)
class Run:
    """A run, by its directory. What it says is read from there each time, so a run that is under way can be followed.

    Attributes:
        directory: of the run, absolute.
    """

    directory: Path

    @property
    def status(self) -> str:
        """How it stands.

        `running`, `finished`, `interrupted` (a signal stopped it; it was saved), `pruned` (its sweep ended it
        early), `diverged` or `failed`; `unknown` where the directory does not say.
        """
        return str(self.summary["status"])

    @property
    def config(self) -> RunConfig:
        """The configuration that it was last started with.

        Raises:
            ConfigError: the directory has none.
            ConfigErrors: it is of another version.
        """
        return read_config(self.directory / run_directory.CONFIG)

    @property
    def metrics(self) -> Table:
        """One row for each step, by rising step.

        Its keys: `step`, `loss` (nats per token), `grad_norm`, `lr`, `tokens`, `tokens_per_second`, `step_seconds`,
        `mfu`, `memory_bytes`, `time` and `leg`; after an evaluation `val_loss` and `val_perplexity`, too; at times
        `epochs`, and with several sources or validation sets figures of each: `loss/NAME`, `val_loss/NAME`,
        `tokens/NAME`, `epochs/NAME`. None stands for what was not finite or is not known.
        """
        data = self._data()
        rows: dict[int, dict[str, Any]] = {}
        for row in (*data.train, *data.evals):
            known = rows.setdefault(row["step"], {})
            known.update({key: value for key, value in row.items() if key not in known})
        return Table(rows[step] for step in sorted(rows))

    @property
    def summary(self) -> dict[str, Any]:
        """The headline figures: last losses, tokens, throughput, time, hardware."""
        return headline(self._data())

    @property
    def diverged(self) -> Mapping[str, Any]:
        """Where and why it diverged, and what to try; empty where it did not."""
        return dict(self.summary["diverged"])

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that it keeps, the newest last.

        Raises:
            CheckpointError: their place cannot be read.
        """
        folder = run_directory.checkpoints_dir(self.directory, self.config)
        return [Checkpoint(path) for path in reversed(committed(folder))]

    @property
    def report(self) -> Path:
        """`report.html`, which shows it."""
        return self.directory / "report.html"

    def _data(self) -> RunData:
        return read_run_data(self.directory)


def load_run(where: str | Path = "latest", *, runs_dir: str | Path = "runs") -> Run:
    """Return a run that was started before.

    Args:
        where: `latest`, a run directory, or the name of a run.
        runs_dir: where `latest` and names look.

    Raises:
        CheckpointError: there is no such run.
    """
    return Run(listing.find_run(str(where), str(runs_dir)).absolute())
