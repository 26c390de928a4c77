"""The cases of one layout: how the strategy places, sums, trains, saves, loads and goes on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from orchestrator.certify.certificate import Case
from orchestrator.certify.fixture import OTHER_SEED, ROWS, SAVED_STEP, SEQ_LEN, STEPS, batch, only, part_of
from orchestrator.certify.host_side import HostSide, excess
from orchestrator.certify.measuring import Found, NotRunError, attempt, farthest, gather, named, relative
from orchestrator.certify.recorded import batches_digest, recorded
from orchestrator.certify.trial import Place, Trial, differing, place_of, stored
from orchestrator.models.init import draw_slice
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.divergence import Diverged
from orchestrator.training.facts import provenance
from orchestrator.training.handover_check import check_handover, measure
from orchestrator.training.resolved import Resolved

BRIEFLY_LEFT_OUT = ("accumulation", "nonfinite")
"""Each needs graphs of its own: half of the time of a layout, where graphs are compiled."""
_ACCUMULATED_STEPS = 6
_MOMENT = "optimizer.exp_avg."  # of AdamW: after the first step a tenth of the clipped gradient


class LayoutCases:
    """Runs the cases of a layout. All ranks make it and call it together.

    Args:
        resolved: the training, with the layout.
        parallel: the strategy, joined.
        folder: that all processes see, for checkpoints.
        host: what the host's CPU has made of the same training.
    """

    def __init__(self, resolved: Resolved, parallel: ParallelStrategy, folder: Path, host: HostSide):
        self._resolved, self._parallel, self._folder, self._host = resolved, parallel, folder, host
        self._main: Trial | None = None
        self._loaded: Trial | None = None
        self._saved: Path | None = None
        self._at_save: dict[Place, torch.Tensor] = {}
        self._final: dict[Place, torch.Tensor] = {}

    @property
    def losses(self) -> list[float]:
        """Of the uninterrupted training; fewer than its steps where it has failed."""
        return self._main.losses if self._main else []

    @property
    def norms(self) -> list[float]:
        """Of its gradients."""
        return self._main.norms if self._main else []

    @property
    def saved(self) -> Path | None:
        """The checkpoint that the devices have written."""
        return self._saved

    def run(self, wanted: frozenset[str] | None = None, brief: bool = False) -> Iterator[Case]:
        """Run the cases, in the order in which one needs the other.

        Args:
            wanted: names; None: all of them. What a wanted one needs is run, too.
            brief: leave out those of `BRIEFLY_LEFT_OUT`.
        """
        for name, (measure_it, needed_by) in self._cases().items():
            if brief and name in BRIEFLY_LEFT_OUT:
                continue
            if wanted is None or {name, *needed_by} & wanted:
                yield attempt(self._parallel, name, str(self._parallel.layout), measure_it)

    def _cases(self) -> dict[str, tuple[Callable[[], Found], tuple[str, ...]]]:
        trained = ("losses", "gradient_norms", "save", "load", "resume", "determinism", "gradients")
        return {
            "initial_weights": (self._initial_weights, ("collectives", *trained)),
            "collectives": (self._collectives, ()),
            "gradients": (self._gradients, trained),
            "save": (self._save, trained),
            "losses": (lambda: self._finished(lambda trial: farthest(trial.losses, recorded().losses)), ("resume",)),
            "gradient_norms": (lambda: self._finished(lambda trial: farthest(trial.norms, recorded().norms)), ()),
            "accumulation": (self._accumulation, ()),
            "load": (self._load, ("resume", "handover_in")),
            "resume": (self._resume, ()),
            "handover_in": (self._handover_in, ()),
            "determinism": (self._determinism, ()),
            "nonfinite": (self._nonfinite, ()),
        }

    def _trial(self, **changes: object) -> Trial:
        return Trial(self._resolved, self._parallel, **changes)  # type: ignore[arg-type]

    @property
    def _trained(self) -> Trial:
        if self._main is None:
            raise NotRunError("the model could not be made")
        return self._main

    # --- the start --------------------------------------------------------------------------------

    def _initial_weights(self) -> Found:
        trial = self._trial()
        inits, wanted = trial.model.initializers(), recorded().weights
        shards = self._parallel.state_shards(trial.model, None)
        wrong = {shard.name for shard in shards} ^ {f"model.{name}" for name in wanted}
        for shard in shards:
            name = shard.name.removeprefix("model.")
            whole = draw_slice(inits[name], name, trial.seed, shard.shape, tuple(slice(0, n) for n in shard.shape))
            # By two ways: as recorded on another machine, and part by part as this process holds it.
            if hashlib.sha256(whole.numpy().tobytes()).hexdigest() != wanted.get(name):
                wrong.add(shard.name)
            place = place_of(shard)
            if differing({place: shard.data.detach().cpu()}, {place: whole[shard.slices]}):
                wrong.add(shard.name)
        if batches_digest() != recorded().batches:
            return math.inf, "the batches that are made here are not the recorded ones"
        self._main = trial
        return len(wrong), named(sorted(wrong))

    def _collectives(self) -> Found:
        lost = self._not_counted_once()
        if lost:
            return 1.0 + lost, f"{lost} of {ROWS * SEQ_LEN} tokens are not counted exactly once by a sum over the data"
        worst, note, trial, parts = 0.0, "", self._trained, self._parallel.layout.data_parallel
        for part, (loss, norm) in enumerate(self._host.parts[parts]):
            found = measure(trial.model, self._parallel, only(batch(0), part, parts))
            difference = max(relative(found.loss, loss), relative(found.grad_norm, norm))
            if difference > worst:
                worst = difference
                note = f"part {part + 1} of {parts}: loss {found.loss} for {loss}, norm {found.grad_norm} for {norm}"
        return worst, note if worst > 1e-5 else ""

    def _not_counted_once(self) -> int:
        """Count the tokens of a batch that a sum over the data does not count once."""
        tokens = {"tokens": torch.arange(ROWS * SEQ_LEN).reshape(ROWS, SEQ_LEN).numpy()}
        mine = self._parallel.prepare_batch(part_of(tokens, *self._parallel.data_share))["tokens"]
        numbers = torch.arange(ROWS * SEQ_LEN).to(self._parallel.root_device)
        here = (mine.reshape(-1, 1) == numbers.reshape(1, -1)).float().sum(0)
        counts = self._parallel.sum_over_data(here)
        self._parallel.finish_step()
        return int((counts.cpu() != 1).sum())

    def _gradients(self) -> Found:
        trial = self._trained
        trial.run(1)
        shards = [shard for shard in trial.shards() if shard.owned and shard.name.startswith(_MOMENT)]
        wanted = stored(self._host.first, [place_of(shard) for shard in shards])
        mine: dict[str, list[float]] = {}
        for shard in shards:
            there = wanted[place_of(shard)].double()
            squares = ((shard.data.detach().cpu().double() - there).square().sum(), there.square().sum())
            mine[shard.name] = [a + float(b) for a, b in zip(mine.get(shard.name, [0.0, 0.0]), squares, strict=True)]
        told = gather(self._parallel, {name: [repr(value) for value in pair] for name, pair in mine.items()})
        differences = {}
        for name in sorted({name for each in told for name in each}):
            pairs = [tuple(map(float, each[name])) for each in told if name in each]
            error, size = (math.fsum(column) for column in zip(*pairs, strict=True))
            differences[name.removeprefix(_MOMENT)] = math.sqrt(error / max(size, 1e-60))
        if not differences or not all(map(math.isfinite, differences.values())):
            return math.inf, "no gradients, or not finite ones"
        worst = max(differences, key=lambda name: differences[name])
        return differences[worst], worst

    # --- the training -----------------------------------------------------------------------------

    def _save(self) -> Found:
        trial = self._trained
        trial.run(SAVED_STEP - trial.module.step)
        self._at_save = trial.state()
        saved = trial.save(self._folder / str(self._parallel.layout).replace(" ", ""))
        self._saved = saved
        wrong = differing(stored(saved, list(self._at_save)), self._at_save)
        return len(wrong), named(wrong)

    def _finished(self, look: Callable[[Trial], float]) -> Found:
        trial = self._trained
        if trial.module.step < STEPS:
            trial.run(STEPS - trial.module.step)
            self._final = trial.state()
        return look(trial), ""

    def _accumulation(self) -> Found:
        share = ROWS // self._parallel.data_share[1]
        trial = self._trial(micro_batch=max(1, share // 4))
        trial.run(_ACCUMULATED_STEPS)
        wanted = recorded()
        losses = farthest(trial.losses, wanted.losses[:_ACCUMULATED_STEPS])
        return max(losses, farthest(trial.norms, wanted.norms[:_ACCUMULATED_STEPS])), ""

    # --- what is kept -----------------------------------------------------------------------------

    @property
    def _checkpoint(self) -> Path:
        if self._saved is None:
            raise NotRunError("the devices have saved no checkpoint")
        return self._saved

    def _load(self) -> Found:
        directory, trial = self._checkpoint, self._trial(seed=OTHER_SEED)
        trial.load(directory)
        held = trial.state()
        wrong = differing(held, stored(directory, list(held)))
        self._loaded = trial
        return len(wrong), named(wrong)

    def _resume(self) -> Found:
        if self._loaded is None or not self._final:
            raise NotRunError("there is nothing loaded to go on from, or no training to compare it with")
        trial, main = self._loaded, self._trained
        trial.run(STEPS - SAVED_STEP)
        return _others(trial, main.losses[SAVED_STEP:], main.norms[SAVED_STEP:], self._final)

    def _handover_in(self) -> Found:
        if self._loaded is None:
            raise NotRunError("nothing could be loaded")
        checkpoint = self._loaded.load(self._host.middle)
        here = provenance(self._parallel)
        result = check_handover(checkpoint, self._loaded.model, self._loaded.optimizer, self._parallel, here)
        return excess(result)

    def _determinism(self) -> Found:
        if not self._at_save:
            raise NotRunError("there is no first training to compare with")
        main, trial = self._trained, self._trial()
        trial.run(1)
        trial.run(SAVED_STEP - 1)
        return _others(trial, main.losses[:SAVED_STEP], main.norms[:SAVED_STEP], self._at_save)

    # --- numbers that are none --------------------------------------------------------------------

    def _nonfinite(self) -> Found:
        problems = list[str]()
        for value in (math.nan, math.inf):
            trial = self._trial(skips=True)
            before = _poison(trial, value)
            trial.run(1)
            if trial.module.guard.skipped != 1:
                problems.append(f"a step with a weight {value} was not left out")
            if all(map(math.isfinite, (*trial.losses, *trial.norms))):
                problems.append(f"a weight {value} gave finite numbers")
            if changed := differing(before, trial.state()):
                problems.append(f"a weight {value} changed {named(changed)}")
        trial = self._trial()
        before = _poison(trial, math.nan)
        try:
            trial.run(2)
            problems.append("a training that is to stop went on")
        except Diverged:
            if changed := differing(before, trial.state()):
                problems.append(f"a training that stopped had changed {named(changed)}")
        return len(problems), "; ".join(problems)


def _others(trial: Trial, losses: list[float], norms: list[float], state: dict[Place, torch.Tensor]) -> Found:
    """Count what of a training is not bitwise as it was before."""
    series = {"loss": (trial.losses, losses), "norm": (trial.norms, norms)}
    wrong = []
    for name, (mine, theirs) in series.items():
        if len(mine) != len(theirs):
            wrong.append(f"number of {name} values")
        wrong += [
            f"{name} of value {at + 1}" for at, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]
        ]
    wrong += differing(trial.state(), state)
    return len(wrong), named(wrong)


@torch.no_grad()
def _poison(trial: Trial, value: float) -> dict[Place, torch.Tensor]:
    """Write `value` into one element of the last weight that is a vector. Returns the state with it."""
    shards = trial.shards()
    name = [shard.name for shard in shards if shard.name.startswith("model.") and len(shard.shape) == 1][-1]
    for shard in shards:
        if shard.name == name and shard.data.numel() and shard.slices[0].start == 0:
            shard.data.view(-1)[0] = value
    trial.parallel.adopt(trial.model, trial.optimizer, shards)
    return trial.state()
