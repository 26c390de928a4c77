"""Save the run periodically, with what travels along with the tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as lightning
import numpy as np

from orchestrator.checkpoint.async_saver import Saver
from orchestrator.checkpoint.attestation import attester, attests
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.run_checkpoints import committed, prune, put_aside, set_aside, step_of
from orchestrator.checkpoint.signing import signer
from orchestrator.checkpoint.storage import AnyPath, is_remote
from orchestrator.checkpoint.writer import Contents
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.data.stream import StepLoader
from orchestrator.data.tokenize import Tokenizer
from orchestrator.distributed import standing
from orchestrator.errors import CheckpointError, ConfigError, NonFiniteError, SaveError, UserError
from orchestrator.observe.history import HISTORY, History
from orchestrator.observe.metrics import Metrics
from orchestrator.observe.sink import reason
from orchestrator.optim.steps import evaluated
from orchestrator.runs import run_directory
from orchestrator.runs.lease import fence
from orchestrator.runs.messages import warn
from orchestrator.runs.shared_folder import check_shared
from orchestrator.sharding.shard import Shard
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.adapter_state import saved_shards
from orchestrator.training.callbacks.own_state import OwnStates
from orchestrator.training.divergence import Diverged
from orchestrator.training.handover_check import measure, reference_files

_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Keeps:
    """What a run's checkpoints hold beside its state.

    Attributes:
        tokenizer: what documents are in its tokens is recorded.
        files: what travels with the model, by name: without a tokenizer the weights cannot be used elsewhere.
        reference: the batch of the handover check; None to leave it out.
        own: of the user's callbacks.
    """

    tokenizer: Tokenizer
    files: Mapping[str, bytes]
    reference: Mapping[str, np.ndarray] | None
    own: OwnStates


class Checkpoints(lightning.Callback):
    """Saves every so many steps and, by `save_now`, at the end.

    Args:
        place: where the run is kept.
        config: of the run, as the user has it; it travels along.
        parallel: the strategy.
        loader: whose position is saved.
        keeps: what else travels along.
        provenance: what the state says of where it was written.
        metrics: flushed before a save, and told of the time that it took.
        history: the run so far; it travels along.
        say: prints a line.

    Attributes:
        directory: of the run's checkpoints.
        saved: step and directory of the last save that is known to be kept.
        elsewhere: why the last save lies in the run directory and not in the store; None where it does not.
        stalls: seconds that each save on the way kept the training waiting.
        trusted_step: the last step that nothing can turn out to be wrong with; the newest checkpoint up to it is kept.
            None: all can be trusted.
        beside: what else the state of a checkpoint has.
    """

    def __init__(
        self,
        place: run_directory.RunPaths,
        config: RunConfig,
        parallel: ParallelStrategy,
        loader: StepLoader,
        keeps: Keeps,
        provenance: Mapping[str, Any],
        metrics: Metrics,
        history: History,
        say: Callable[[str], None],
    ):
        self._config, self._parallel = config, parallel
        self._loader, self._provenance, self._say = loader, provenance, say
        self._metrics, self._history, self._reference, self._own = metrics, history, keeps.reference, keeps.own
        self._extra, self._documents = dict(keeps.files), keeps.tokenizer.record()
        settings, main = config.checkpoint, parallel.rank == 0
        # Only the process that writes manifests needs the keys.
        self._sign = signer(settings.signing_key) if settings.signing_key and main else None
        asked = (settings.model_signing_key, settings.statement)
        self._attested, self._attest = attests(*asked), attester(settings.signing_key, *asked) if main else None
        self.at_end = config.checkpoint.at_end
        self.saved: tuple[int, AnyPath] | None = None
        self.elsewhere: str | None = None
        self.stalls: list[float] = []
        self.beside: Callable[[], Mapping[str, Any]] = dict
        self._also: Callable[[], list[Shard]] = list
        self._kept: Callable[[AnyPath, int], None] | None = None
        self.trusted_step: Callable[[], int | None] = lambda: None
        self._started, self._prepared = 0, False
        self._refused: NonFiniteError | None = None
        self.directory, self._run_dir = place.checkpoints, place.run_dir
        self._allowed = fence(self.directory, self._run_dir) if main and is_remote(self.directory) else None
        self._saver = Saver(self.directory, parallel, config.checkpoint.asynchronous, self._prune)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Compile the graph of the reference batch, where graphs are compiled, and allocate the memory of saves."""
        if self._reference is not None and self._parallel.compilations() is not None:
            # Its graph is compiled here, before the first step, and never in the middle of the run.
            measure(pl_module.model, self._parallel, self._reference)
        if self._config.checkpoint.every_steps and not self._prepared:
            self._prepared = True  # also where the training begins again after a rewind
            self._saver.prepare(self._shards(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *unused: Any) -> None:
        """Save where a period ends, and learn how the last save went."""
        if not self._saver.busy:
            self._settle()
        every = self._config.checkpoint.every_steps
        if every and pl_module.step % every == 0 and self._kept is None:
            self.save(pl_module)

    def save(self, pl_module: Any) -> None:
        """Save now, on the way; written beside the training.

        Args:
            pl_module: the `LanguageModule`.
        """
        self._metrics.flush()
        if not self._parallel.leads:
            return  # another copy of the model saves
        begin = time.perf_counter()
        self._save(pl_module, self._saver)
        self.stalls.append(time.perf_counter() - begin)
        self._metrics.pause()

    def island(
        self,
        also: Callable[[], list[Shard]],
        beside: Callable[[], Mapping[str, Any]],
        kept: Callable[[AnyPath, int], None],
    ) -> None:
        """Save what an island has beside weights and optimizer, and only when it asks.

        Args:
            also: its own tensors.
            beside: what the state has of it.
            kept: told the directory and the step of each checkpoint that counts.
        """
        before = self.beside
        self._also, self._kept = also, kept
        self.beside = lambda: {**before(), **beside()}

    def save_now(self, pl_module: Any) -> AnyPath:
        """Save the state after `pl_module.step` steps, unless that has been done, and wait until it is kept.

        Where a store does not take it, it is written below the run directory: nothing comes after this one.

        Args:
            pl_module: the `LanguageModule`.

        Raises:
            CheckpointError: it could not be written.
            Diverged: weights or optimizer state are not finite.
        """
        self._settle()
        self._stop_if_refused()
        step = pl_module.step
        if self.saved is None or self.saved[0] != step:
            self._save(pl_module, self._saver)
            path, problem = self._outcome(step, self._saver)
            # All ranks do the same, also where an answer has reached some of them only.
            if is_remote(self.directory) and self._parallel.any_raised(problem is not None):
                path, problem = self._save_beside(pl_module, problem), None
            if problem is not None:
                raise problem
            assert path is not None
            self.saved = (step, path)
        return self.saved[1]

    def _outcome(self, step: int, saver: Saver) -> tuple[AnyPath | None, CheckpointError | None]:
        try:
            with standing.within(standing.SAVING):
                return saver.wait(), None
        except NonFiniteError as error:
            raise Diverged(step, {}, "weights") from error
        except CheckpointError as error:
            return None, error

    def _save_beside(self, pl_module: Any, problem: CheckpointError | None) -> AnyPath:
        problem = problem or SaveError("another process could not write its part of it", got=self.directory)
        place = run_directory.beside(self._run_dir)
        if self._parallel.rank == 0:
            self._say(f"warning: {problem}\n  then:    it is written below the run directory")
        second: UserError | None
        try:
            check_shared(place, self._parallel)
            saver = Saver(place, self._parallel, asynchronous=False)
            self._save(pl_module, saver)
            path, second = self._outcome(pl_module.step, saver)
        except (SaveError, ConfigError) as error:
            path, second = None, error
        if path is None:
            said = second.what if second is not None else "nothing was written"
            raise SaveError(
                f"{problem.what}; nor could it be written below the run directory: {said}",
                got=f"{self.directory}; {place}",
                fix=problem.fix,
            ) from problem
        self.elsewhere = problem.what
        return path

    def settle(self) -> None:
        """Wait for the save that is under way. All ranks call it together.

        Raises:
            CheckpointError: it could not be written.
            Diverged: it was refused, as weights or optimizer state were not finite.
        """
        try:
            if path := self._saver.wait():
                self.saved = (self._started, path)
        except NonFiniteError as error:
            self._refused = error
        self._stop_if_refused()

    def rewind(self, pl_module: Any, restored: Checkpoint | None, because: str) -> None:
        """Let the run go on from the state that it was taken back to. All ranks call it together.

        Later checkpoints are set aside. The state is saved once more, with what the run leaves out from now on: a
        restart before the next save sees the same batches.

        Args:
            pl_module: the `LanguageModule`, taken back.
            restored: the checkpoint that it was filled from; None for initial weights.
            because: why, in a sentence.
        """
        if restored is not None:
            self._own.restore(restored)
        self.set_aside(pl_module.step, because)
        self.saved = None
        if restored is not None and self._config.checkpoint.every_steps:
            self._save(pl_module, self._saver)

    def set_aside(self, after: int, because: str) -> list[AnyPath]:
        """Mark the checkpoints of later steps as none to go on from. One process does it.

        Args:
            after: a step.
            because: why, in a sentence.

        Returns:
            Those that were marked now.
        """
        marked: list[AnyPath] = []
        if self._parallel.rank:
            return marked
        try:
            for path in committed(self.directory):
                if step_of(path) > after and not set_aside(path):
                    put_aside(path, because)
                    marked.append(path)
        except (OSError, CheckpointError) as error:
            warn(f"checkpoints after step {after} could not be set aside: {reason(error)}; remove them by hand")
        return marked

    def close(self) -> None:
        """Let the save that is under way end, for a while: what it waits for may have gone."""
        self._saver.join(_GRACE_SECONDS)

    def _save(self, pl_module: Any, saver: Saver) -> None:
        with standing.within(standing.SAVING):
            self._settle()
            self._stop_if_refused()
            with evaluated(pl_module.optimizer):
                self._start_save(pl_module, saver)

    def _start_save(self, pl_module: Any, saver: Saver) -> None:
        """Measure the reference batch and copy the state; the rest is written beside the training."""
        step = self._started = pl_module.step
        files: dict[str, bytes] = {}
        if self._reference is not None:
            try:
                files = reference_files(pl_module.model, self._parallel, self._reference)
            except NonFiniteError as error:
                raise Diverged(step, {}, "weights") from error
        saver.save(step, self._shards(pl_module), self.contents(step, files))

    def _shards(self, pl_module: Any) -> list[Shard]:
        shards = saved_shards(self._parallel.state_shards(pl_module.model, pl_module.optimizer), self._config)
        return [*shards, *self._also()]

    def contents(self, step: int, files: Mapping[str, bytes], attested: bool = True) -> Contents:
        """Return what is saved beside the tensors of `step`.

        Args:
            step: optimizer steps completed.
            files: by name, beside the model's and the run's history.
            attested: with the signatures that others check, and not that of the manifest alone.
        """
        settings = self._config.checkpoint
        beside = {**self._extra, HISTORY: self._history.content(step), **files}
        signed = (self._attested, self._attest) if attested else (False, None)
        allowed = self._allowed if attested else None
        return Contents(self._state(step), to_dict(self._config), beside, self._sign, settings.hash, *signed, allowed)

    def _settle(self) -> None:
        """Wait for the save that is under way, and say how the last one went."""
        try:
            if path := self._saver.wait():
                self.saved = (self._started, path)
        except NonFiniteError as error:
            # Ranks come here at different steps; they stop together where all of them wait for it.
            self._refused = error
            if self._parallel.rank == 0:
                self._say(f"warning: {error}")
        except CheckpointError as error:
            # Training is worth more than this one checkpoint; the end of the run insists.
            if self._parallel.rank == 0:
                self._say(f"warning: {error}")

    def _stop_if_refused(self) -> None:
        if self._refused is not None:
            error, self._refused = self._refused, None
            raise Diverged(self._started, {}, "weights") from error

    def _prune(self, path: AnyPath) -> None:
        """Remove old checkpoints. Where that fails, the new one is no less written."""
        if self._kept is not None:
            self._kept(path, self._started)
        try:
            settings = self._config.checkpoint
            prune(path.parent, settings.keep_last, settings.keep_every_steps, self.trusted_step())
        except Exception as error:
            warn(f"old checkpoints could not be removed: {reason(error)} ({path.parent})")

    def _state(self, step: int) -> dict[str, Any]:
        config = self._config
        return {
            "step": step,
            "documents": self._documents,
            "data": {**self._loader.state(step), "global_batch_sequences": self._loader.global_batch},
            # Masks are drawn from (seed, step, micro-step, rank): there is no generator state to carry.
            "rng": {"scheme": "counter", "seed": config.seed},
            "schedule": {"kind": config.optim.schedule.kind, "step": step, "max_steps": config.train.max_steps},
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **self._own.save(),
            **self.beside(),
            **self._provenance,
        }
