"""One island of a run, as one of its ranks takes part: it comes in, gets leases, exchanges, saves where it is asked."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as lightning
from torch import Tensor

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.reader import read_into
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.storage import AnyPath, locate
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.data.stream import Position
from orchestrator.distributed import standing
from orchestrator.errors import CheckpointError, RunFailedError
from orchestrator.islands.island_keys import read as read_key
from orchestrator.islands.island_messages import (
    PROTOCOL,
    Bye,
    Hello,
    Lease,
    LeaseRequest,
    Peer,
    Saved,
    Score,
    Welcome,
)
from orchestrator.islands.link import Link
from orchestrator.runs.messages import warn
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.data_module import TokenDataModule
from orchestrator.training.handover_check import measure
from orchestrator.training.inner_optimizer import check_inner_optimizer
from orchestrator.training.island_exchange import IslandExchange, LeavingError
from orchestrator.training.island_loader import IslandLoader, LeasePosition, lease_position
from orchestrator.training.island_numbers import IslandNumbers

if TYPE_CHECKING:
    from orchestrator.training.callbacks.checkpointing import Checkpoints
    from orchestrator.training.callbacks.evaluation import Validation
    from orchestrator.training.callbacks.preemption import StopOnSignal
    from orchestrator.training.module import LanguageModule

_LAST = "end"  # the mark of a save that nobody asked for


class IslandMember(lightning.Callback):
    """Takes part in a run with islands, on one rank.

    Args:
        config: of the run, with `islands.join`.
        parallel: the strategy.
        module: with weights and optimizer.
        tokens: its data.
        restored: the checkpoint of this island that it goes on from; None: it begins.
        trusted: whose checkpoints are believed.

    Attributes:
        name: of the island.
        loader: its batches.
        welcome: how it was let in.
        left: the signal by which the island was asked to stop while it waited for an exchange; 0: it was not.
    """

    def __init__(
        self,
        config: RunConfig,
        parallel: ParallelStrategy,
        module: LanguageModule,
        tokens: TokenDataModule,
        restored: Checkpoint | None,
        trusted: Trust = Trust(),
    ):
        self._config, self._parallel, self._module, self._tokens = config, parallel, module, tokens
        self._trusted = trusted
        islands = config.islands
        assert islands.join is not None, "who has no hub is no island"
        self.name = islands.island or "island-0"
        incarnation = parallel.broadcast(uuid.uuid4().hex)
        key = read_key(Path(islands.key_file)) if islands.key_file else None
        self._link = Link(islands.join, key, Peer(self.name, incarnation, parallel.rank))
        self._exchange = IslandExchange(parallel, module.model, config, self._link)
        train, (rank, shares) = config.train, parallel.step_share
        batch = train.global_batch_tokens // train.seq_len
        wait = functools.partial(self._exchange.wait, count=False)
        self.loader = IslandLoader(tokens.stream, batch, rank, shares, config.data.prefetch, self._lease, wait)
        self._reference: Mapping[str, Any] | None = None
        self._marked: str | None = None
        self._numbers = IslandNumbers(parallel)
        self._handled = self._reported = -1
        self._told_stop, self.left = False, 0
        self._saving: dict[str, tuple[str, int]] = {}  # checkpoint's step -> mark and lease
        self.welcome = self._enter(incarnation, restored)

    @property
    def ended(self) -> bool:
        """Whether the hub has said that there is nothing left to train."""
        return self.loader.ended is not None

    # --- to come in -------------------------------------------------------------------------------------

    def _enter(self, incarnation: str, restored: Checkpoint | None) -> Welcome:
        state = restored.state() if restored is not None else {}
        mine = state.get("island") or {}
        position = lease_position(state) if mine else LeasePosition()
        self._link.beating(self._beat)
        answer = self._link.ask(self._hello(incarnation, position, mine)).result()[0]
        assert isinstance(answer, Welcome)
        check_inner_optimizer(self._module.optimizer, answer.terms)
        if answer.start == "replay":
            assert restored is not None, "what the hub answers is the mark of a save"
            self._exchange.begin(answer.terms, answer.versions)
            self._read_state(restored, mine)
            self._numbers.restore(mine["numbers"])
        else:
            position = self._begin_anew(answer, restored)
        self._module.step, self._module.island = position.step, self
        self.loader.begin(position)
        self._tokens.position = Position(position.step, 0, position.sequences * self._tokens.stream.seq_len)
        self._handled = self._reported = position.lease - 1 if not position.done else position.lease
        for fragment in sorted(self._exchange.under_way):
            self._exchange.send(fragment)
        return answer

    def _begin_anew(self, answer: Welcome, restored: Checkpoint | None) -> LeasePosition:
        step, sequences = self._module.step, 0
        if answer.start in ("take", "restore") and answer.path:
            source = self._donor(answer, restored)
            if source is not None:
                self._fill_from(source)
        if restored is not None and answer.start != "restore":
            sequences = lease_position(restored.state()).sequences if restored.state().get("island") else 0
        self._exchange.begin(answer.terms, answer.versions)
        if answer.start == "give":
            self._exchange.give()
        elif answer.start == "take":
            self._exchange.take()
        return LeasePosition(step, answer.lease, 0, sequences)

    def _donor(self, answer: Welcome, restored: Checkpoint | None) -> Checkpoint | None:
        """Return the checkpoint of another island whose moments, or whole state, this one begins with."""
        if restored is not None and answer.start == "take":
            return None  # it has moments of its own
        problem, found = "", None
        try:
            found = Checkpoint(locate(answer.path), self._trusted)
            found.state()
        except (CheckpointError, OSError) as error:
            problem = str(error)
        if not self._parallel.any_raised(bool(problem)):
            return found
        if answer.start == "restore":
            raise RunFailedError(
                "an island that joins a run of gradients needs the state of another one, and cannot read it",
                got=answer.path,
                fix="let both see one folder, or a store; or exchange weights: islands=diloco",
            )
        if self._parallel.rank == 0:
            warn(f"island {self.name} begins with new moments: it cannot read {answer.path}")
        return None

    def _fill_from(self, source: Checkpoint) -> None:
        from orchestrator.training.restore import fill

        fill(source, self._config, self._parallel, self._module.model, self._module.optimizer, trusted=self._trusted)

    def _read_state(self, restored: Checkpoint, mine: Mapping[str, Any]) -> None:
        stored = restored.manifest.tensors
        shards = self._exchange.empty_state(mine["exchange"], stored)
        read_into(restored, shards, ["model.", "optimizer."], check=self._parallel)

    def _hello(self, incarnation: str, position: LeasePosition, mine: Mapping[str, Any]) -> Hello:
        train, exchange = self._config.train, self._exchange
        described = json.dumps([to_dict(self._config.model), exchange.names, exchange.shapes], default=str)
        layout, device = self._parallel.layout, self._parallel.target.name
        return Hello(
            PROTOCOL,
            str(mine.get("run", "")),
            self.name,
            incarnation,
            self._parallel.rank,
            self._parallel.size,
            hashlib.sha256(described.encode()).hexdigest(),
            self._tokens.stream.fingerprint,
            train.global_batch_tokens // train.seq_len,
            train.seq_len,
            train.max_steps,
            self._config.seed,
            layout.data_parallel,
            exchange.names,
            exchange.shapes,
            exchange.boxes(),
            position.lease if mine else None,
            str(mine.get("mark", "")),
            place=f"{layout.devices} x {device}, {layout}",
        )

    def _beat(self) -> tuple[int, str]:
        if self._link.stop and not self._told_stop:
            self._told_stop = True
            os.kill(os.getpid(), signal.SIGTERM)
        return standing.here.step, standing.here.phase

    def _lease(self, number: int) -> Lease:
        answer = self._link.ask(LeaseRequest(number)).result()[0]
        assert isinstance(answer, Lease)
        return answer

    # --- what the step asks -----------------------------------------------------------------------------

    def at(self, step: int) -> int:
        """Return the step of the run that the learning rate of an inner step is that of.

        Args:
            step: inner steps completed.
        """
        lease, index = self.loader.lease_at(step)
        return lease.steps[index].at

    def exchange_gradients(self, targets: Tensor) -> None:
        """Make the gradients those of all islands, where they exchange gradients.

        Args:
            targets: tokens that are in the gradients.
        """
        if self.welcome.terms.gradients:
            lease, _ = self.loader.lease_at(self._module.step)
            real = self._parallel.fetch([targets])[0] if lease.steps[0].rows else 0.0
            self._exchange.gradients(lease.lease, int(real))

    # --- between steps ------------------------------------------------------------------------------------

    def attach(self, checkpoints: Checkpoints, validation: Validation, reference: Mapping[str, Any] | None) -> None:
        """Take what saves and evaluates the island: both act where the hub says.

        Args:
            checkpoints: of the island.
            validation: of the held-out data.
            reference: the batch that is measured for an island that joins; None: it is not.
        """
        self._checkpoints, self._validation, self._reference = checkpoints, validation, reference
        checkpoints.island(self._exchange.shards, self.state, self._kept)
        validation.only_asked()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Hear what is recorded of each step."""
        pl_module.record = recording(self, pl_module.record)
        self._numbers.begin(self._exchange.waited)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *unused: Any) -> None:
        """Do what the lease says before its first step."""
        step = pl_module.step
        while (lease := self.loader.paused(step, self._handled)) is not None:
            self._obey(lease, wait=True)
        if batch:
            lease, index = self.loader.lease_at(step)
            if lease.lease != self._handled and index == 0:
                self._obey(lease)
            self._apply_due(step)  # what was under way when the island was saved

    def _obey(self, lease: Lease, wait: bool = False) -> None:
        self._handled = lease.lease
        if lease.save:
            self._marked = lease.save
            self._saving[str(self._module.step)] = (lease.save, lease.lease)
            self._checkpoints.save(self._module)
            if wait:
                self._checkpoints.settle()
            self._marked = None
        if lease.probe and self._reference is not None:
            self._probe(lease, self._reference)
        if lease.evaluate:
            at = lease.steps[0].at if lease.steps else 0
            self._evaluate(at, lease.lease)

    def _probe(self, lease: Lease, batch: Mapping[str, Any]) -> None:
        model = self._module.model
        run = lambda: measure(model, self._parallel, batch)  # noqa: E731
        measured = run() if self.welcome.terms.gradients else self._exchange.with_outer(run)
        values = [measured.loss, measured.grad_norm]
        if self._parallel.rank == 0 and None not in values:
            found = tuple(float(value) for value in values if value is not None)
            names = ("loss", "grad_norm", self._parallel.precision)
            score = Score("probe", 0, lease.lease, found, names, tuple(self._exchange.versions))
            self._link.ask(score)

    def _evaluate(self, at: int, lease: int) -> None:
        run = lambda: self._validation.run(self._module)  # noqa: E731
        if self.welcome.terms.gradients or self.ended:
            run()
        else:
            self._exchange.with_outer(run)
        self._say_score(at, lease)

    def _say_score(self, at: int, lease: int) -> None:
        if self._parallel.rank == 0 and math.isfinite(loss := self._validation.latest[1]):
            self._link.ask(Score("validation", at, lease, (loss,), ("val_loss",), tuple(self._exchange.versions)))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *unused: Any) -> None:
        """Offer what is due, and report what a lease has come to."""
        if not batch:
            return
        step = pl_module.step
        lease, index = self.loader.lease_at(step - 1)
        done = index + 1
        if not self.welcome.terms.gradients:
            self._offer_due(lease, done, step)
            try:
                self._apply_due(step)
            except LeavingError as leaving:
                self.left, trainer.should_stop = leaving.number, True
        if done == len(lease.steps):
            self._report(lease)
            self.loader.forget_before(lease.lease - 2)

    def _offer_due(self, lease: Lease, done: int, step: int) -> None:
        exchange, terms, length = self._exchange, self.welcome.terms, len(lease.steps)
        for fragment in range(exchange.count):
            if max(1, math.ceil(length * (fragment + 1) / exchange.count)) == done:
                if fragment in exchange.under_way:
                    exchange.apply(fragment, leaves=False)
                targets = self._numbers.since_offer(fragment)
                share = min(1.0, lease.steps[done - 1].sequences / self.loader.global_batch)
                exchange.offer(fragment, lease.lease, done, targets, step + terms.overlap_steps, share)

    def _apply_due(self, step: int) -> None:
        for fragment, one in sorted(self._exchange.under_way.items()):
            if one.due <= step:
                self._exchange.apply(fragment)

    def heard(self, step: int, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """Take note of a step's numbers, for the report of its lease.

        Args:
            step: inner steps completed.
            loss: of the step.
            grad_norm: of the step.
            lr: learning rate of the step.
        """
        lease, index = self.loader.lease_at(step - 1)
        real, waited = bool(lease.steps[index].rows), self._exchange.waited
        self._numbers.heard(loss, grad_norm, self._module.targets, lr, real, waited)

    def _report(self, lease: Lease) -> None:
        report = self._numbers.report(lease, self._exchange.waited)
        if report is not None and self._parallel.rank == 0 and lease.lease > self._reported:
            self._link.ask(report)

    @contextlib.contextmanager
    def fitting(self, stop: StopOnSignal) -> Iterator[None]:
        """Within it the trainer's loop runs. It may be left while the island waits for the hub.

        Args:
            stop: knows the signal, if it ended the training between two steps.
        """
        try:
            yield
        except LeavingError as leaving:  # in the middle of a step, which is taken again
            self.left = leaving.number
            stop.on_train_end(None, self._module)
            for parameter in self._module.model.parameters():
                parameter.grad = None
        stop.stopped = stop.stopped or self.left or self.loader.left

    # --- saves --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what the state of a checkpoint says of the island."""
        return {
            "island": {
                "name": self.name,
                "run": self.welcome.run,
                "mark": self._marked or _LAST,
                "exchange": self._exchange.plain(),
                "numbers": self._numbers.plain(),
            }
        }

    def _kept(self, path: AnyPath, step: int) -> None:
        """Tell the hub that a checkpoint is kept; by the thread that wrote it, on the first rank."""
        mark, lease = self._saving.pop(str(step), ("", 0))
        if mark:
            self._link.ask(Saved(mark, lease, str(path), step))

    # --- the end --------------------------------------------------------------------------------------------

    def prepare_end(self) -> None:
        """Before the last save: where the run has ended, the weights are the outer ones."""
        if self.loader.ended is not None:
            self._exchange.finish(self.loader.ended.lease)
        self._marked = f"{_LAST}.{uuid.uuid4().hex[:8]}" if self._parallel.rank == 0 else _LAST
        self._marked = self._parallel.broadcast(self._marked)
        position = self.loader.position(self._module.step)
        self._saving[str(self._module.step)] = (self._marked, position.lease)

    @property
    def leads(self) -> bool:
        """Whether this island evaluates at the end."""
        return self.welcome.leads

    def conclude(self, status: Literal["finished", "stopped"]) -> None:
        """Say goodbye.

        Args:
            status: of the island.
        """
        if status == "finished" and self.leads:
            self._say_score(self._config.train.max_steps, self.loader.ended.lease if self.loader.ended else 0)
        self._parallel.barrier()
        if self._parallel.rank == 0:
            self._link.ask(Bye(status)).result(60)

    def close(self, diverged: bool = False) -> None:
        """End the link. An island that does not say goodbye is waited for: it may be started again.

        Args:
            diverged: its loss is not finite, and would not be when it is started again: others get its data.
        """
        if diverged and self._parallel.rank == 0:
            with contextlib.suppress(Exception):  # the hub may have gone, or has set this island aside
                self._link.ask(Bye("failed", "its loss or its weights are not finite")).result(10)
        self._link.close()


def island_member(
    config: RunConfig,
    parallel: ParallelStrategy,
    module: LanguageModule,
    tokens: TokenDataModule,
    restored: Checkpoint | None,
    trusted: Trust,
) -> IslandMember | None:
    """Come into the run whose hub the configuration names; None where it names none.

    Args:
        config: of the run.
        parallel: the strategy.
        module: with weights and optimizer.
        tokens: its data.
        restored: the checkpoint of this island that it goes on from.
        trusted: whose checkpoints are believed.

    Raises:
        UserError: the hub does not let it in, or there is none.
    """
    if config.islands.join is None:
        return None
    return IslandMember(config, parallel, module, tokens, restored, trusted)


Record = Callable[..., None]


def recording(member: IslandMember, record: Record) -> Record:
    """Let the member hear what is recorded of each step.

    Args:
        member: of the island.
        record: what records it.
    """

    def both(**values: Any) -> None:
        member.heard(values["step"], values["loss"], values["grad_norm"], values["lr"])
        record(**values)

    return both
