"""Tasks of lm-eval during training: the model is asked where it is, between two steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as lightning

from orchestrator.atomic_files import write_atomically
from orchestrator.config.schema import RunConfig
from orchestrator.data.tokenize import Tokenizer
from orchestrator.distributed import standing
from orchestrator.errors import UserError, error_from_dict, error_to_dict
from orchestrator.evaluation.evaluate_tasks import Evaluated
from orchestrator.observe.history import TASKS
from orchestrator.observe.metrics import Metrics
from orchestrator.observe.sink import Channel, SideChannels
from orchestrator.optim.steps import evaluated
from orchestrator.runs.messages import warn
from orchestrator.strategies.parallel_strategy import ParallelStrategy

if TYPE_CHECKING:
    from orchestrator.evaluation.harness_model import HarnessModel
    from orchestrator.evaluation.harness_tasks import HarnessTasks


class TaskWatch(lightning.Callback):
    """Asks the tasks of `train.tasks` every so many steps and at the end.

    What lm-eval makes of the answers ends no training; what the model raises does.

    Args:
        config: of the run.
        parallel: the strategy.
        tokenizer: of the data.
        run_dir: the run's directory, which gets a file per evaluation in lm-eval's schema.
        metrics: gets a row per evaluation.
        channels: those of the run; the files are one of them.
        say: prints a line.

    Raises:
        UserError: there are no such tasks, or their data is not here; on all processes.
    """

    def __init__(
        self,
        config: RunConfig,
        parallel: ParallelStrategy,
        tokenizer: Tokenizer,
        run_dir: Path,
        metrics: Metrics,
        channels: SideChannels,
        say: Callable[[str], None],
    ):
        self._config, self._settings, self._parallel, self._words = config, config.train.tasks, parallel, tokenizer
        self._metrics, self._say = metrics, say
        self._done_at: int | None = None
        self._tasks: HarnessTasks | None = None
        if not self._settings.names:
            return
        self._kept: Channel[tuple[int, dict[str, Any]]] = channels.open(
            "tasks", lambda results: _write(run_dir, results), unit="results of tasks"
        )
        self._load()

    def _load(self) -> None:
        """Load the tasks on rank 0, before the first step; a mistake in them is raised on all ranks."""
        problem = None
        with standing.within(standing.LOADING):
            if self._parallel.rank == 0:
                try:
                    self._tasks = self._loaded()
                except UserError as error:
                    problem = error_to_dict(error)
            if found := self._parallel.broadcast(problem):
                raise error_from_dict(found)

    def _loaded(self) -> HarnessTasks:
        from orchestrator.evaluation.harness_tasks import HarnessTasks, TaskRequest

        settings = self._settings
        return HarnessTasks(
            TaskRequest(
                settings.names,
                settings.include,
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                bootstrap=0,
            )
        )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Ask where a period ends."""
        every = self._settings.every_steps
        if every and pl_module.step % every == 0:
            self.run(pl_module)

    def rewind(self) -> None:
        """Forget what was asked: the steps come again, with other weights."""
        self._done_at = None

    def run(self, pl_module: Any) -> None:
        """Ask now, unless this step has been.

        Args:
            pl_module: the `LanguageModule`.
        """
        if not self._settings.names or self._done_at == pl_module.step:
            return
        self._done_at = pl_module.step
        self._metrics.flush()
        with evaluated(getattr(pl_module, "optimizer", None)), standing.within(standing.EVALUATING):
            results = self._ask(pl_module)
        # A row of rank 0's, which alone has them.
        values = dict(_figures(results)) if results else {}
        if values:
            self._metrics.write_evaluation(pl_module.step, **{TASKS: float(len(results["results"])), **values})
            self._kept.put([(pl_module.step, results)])
            shown = ", ".join(f"{name.partition('/')[2]} {value:.4f}" for name, value in values.items())
            self._say(f"step {pl_module.step}: {shown}")
        self._metrics.pause()

    def _ask(self, pl_module: Any) -> dict[str, Any]:
        asked = Evaluated(
            pl_module.model,
            self._parallel,
            self._words,
            self._config.model.max_seq_len,
            self._settings.batch_tokens,
            facts={"model_args": {"step": pl_module.step}},
        )

        def work(model: HarnessModel) -> dict[str, Any]:
            assert self._tasks is not None, "rank 0 has loaded them"
            try:
                return self._tasks.run(model)
            except Exception as error:
                if model.problem is not None:
                    raise
                warn(f"step {pl_module.step}: the tasks gave no result: {error}")
                return {}

        return asked.lead_harness(work) or {}


def _figures(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of results as keys of a row: `task/NAME/METRIC`, with the filter where it is a further one."""
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                yield f"task/{name}/{metric}{'' if kind == 'none' else f'/{kind}'}", float(value)


def _write(run_dir: Path, results: Sequence[tuple[int, dict[str, Any]]]) -> None:
    folder = run_dir / "tasks"
    folder.mkdir(exist_ok=True)
    for step, found in results:
        write_atomically(folder / f"step-{step:08d}.json", json.dumps(found, indent=2, ensure_ascii=False))
