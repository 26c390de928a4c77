"""Settle the reference model of a run: score its pairs before the first step, or let it be there in every step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from orchestrator.atomic_files import write_atomically
from orchestrator.checkpoint.adapters import adapter_record, content_of
from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.checkpoint.signing import Trust
from orchestrator.checkpoint.storage import locate
from orchestrator.config.convert import to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.data.skipping import kept
from orchestrator.data.store_cache import cache_root, key_of
from orchestrator.data.stream import StepLoader, TokenStream
from orchestrator.distributed import standing
from orchestrator.distributed.exchange import exchange, new_topic
from orchestrator.errors import CheckpointError
from orchestrator.runs.messages import say, warn
from orchestrator.training.adapter_state import base_of
from orchestrator.training.data_module import TokenDataModule
from orchestrator.training.live_reference import LiveReference
from orchestrator.training.module import LanguageModule
from orchestrator.training.preference import Pairs
from orchestrator.training.reference_scores import FILE, MAX_BYTES, ReferenceScores
from orchestrator.training.restore import open_together, restore_weights

STATE_KEY = "preference"  # of a checkpoint's state: which reference its scores are by
_BETWEEN = 64  # batches between two exchanges of what the ranks have found
Part = tuple[TokenStream, Sequence[int]]


def reference_identity(config: RunConfig, start: Checkpoint | None) -> str:
    """Return what tells the reference model of a run from others: of its weights, or of how they are drawn.

    Args:
        config: of the run.
        start: the checkpoint that it starts from; None where its weights are drawn.
    """
    if start is not None:
        record = adapter_record(start)
        return key_of(weights=content_of(start), beneath=record.content if record else None)
    return key_of(seed=config.seed, model=to_dict(config.model))


def parts_of(config: RunConfig, loader: StepLoader, step: int, held_out: Sequence[Part]) -> list[Part]:
    """Return the sequences that a run will see, each once: of training, and of its evaluations.

    Args:
        config: of the run.
        loader: of its training.
        step: optimizer steps completed.
        held_out: of its evaluations.
    """
    count = max(0, config.train.max_steps - step) * loader.global_batch
    seen: dict[tuple[int, int], int] = {}
    for index in kept(loader.skipped, loader.first(step), count):
        seen.setdefault(loader.stream.locate(index), index)
    return [(loader.stream, list(seen.values())), *held_out]


def settle_reference(
    module: LanguageModule,
    config: RunConfig,
    tokens: TokenDataModule,
    loader: StepLoader,
    source: Checkpoint | None,
    restored: Checkpoint | None,
    begin: Callable[[], Checkpoint | None],
    again: Callable[[], object],
    trusted: Trust = Trust(),
) -> dict[str, Any]:
    """See that the reference is there, or its log-probabilities of all pairs are. All ranks call it together.

    Args:
        module: with its weights.
        config: of the run.
        tokens: its data.
        loader: of its training.
        source: the checkpoint that the weights are from.
        restored: the same, if the run goes on from it.
        begin: gives the model the weights that the run began with.
        again: gives it those of the run so far.
        trusted: whose checkpoints are believed.

    Returns:
        What the state of a checkpoint says of it; nothing where a run learns from no preferences.

    Raises:
        CheckpointError: pairs are not known, and the model that the run began with is not there to score them.
    """
    if module.preferences is None:
        return {}
    identity = reference_of(restored) if restored is not None else reference_identity(config, source)
    if module.preferences.live is not None:
        there = reference_identity(config, _fill_live(module.preferences.live, module, config, source, trusted))
        if there != identity:
            raise _another(config, restored)
        return {STATE_KEY: {"reference": identity}}
    found = ReferencePass(module, config, identity or "")
    found.take_known(restored, identity)
    sets = tokens.validation.sets(config.data.document_mask)
    parts = parts_of(config, loader, module.step, [(one.stream, one.indices) for one in sets])
    missing = found.missing(parts)
    if missing and restored is not None:
        if restored.partial:
            raise CheckpointError(
                "the reference model's log-probabilities are lost, and the run goes on from the memory of its hosts",
                got=f"{sum(len(indices) for _, indices in missing):,} sequences that are not scored",
                fix="go on from the newest checkpoint in storage: checkpoint.memory.enabled=false",
            )
        start = begin()
        if reference_identity(config, start) != identity:
            raise _another(config, restored)
    if missing:
        if module.parallel.speaks:
            say(f"reference  scoring {sum(len(indices) for _, indices in missing):,} sequences of pairs, once")
        found.score(missing)
        if restored is not None:
            again()
    return {STATE_KEY: {"reference": identity}}


def _fill_live(
    live: LiveReference, module: LanguageModule, config: RunConfig, source: Checkpoint | None, trusted: Trust
) -> Checkpoint | None:
    """Give a second model the weights that the run began with. Returns the checkpoint that has the reference's."""
    parallel, named = module.parallel, config.train.init_from
    if live.model is None:
        assert source is not None, "adapters lie beside weights"
        return base_of(source, trusted, parallel, named)
    if named is None:
        parallel.initialize(live.model, config.seed)
        return None
    start = open_together(locate(named), trusted, parallel)
    restore_weights(start, config, parallel, live.model, trusted=trusted)
    return start


def _another(config: RunConfig, restored: Checkpoint | None) -> CheckpointError:
    got = f"train.init_from={config.train.init_from}"
    if restored is None or (config.train.lora.rank is not None and config.train.preference.reference == "live"):
        return CheckpointError(
            "the run began with adapters: with them switched off the model is not its reference",
            got=got,
            allowed="a checkpoint of whole weights beneath the adapters of this run",
            fix="set train.preference.reference=cached",
        )
    return CheckpointError(
        "the model that the run began with is another one now",
        got=got,
        allowed=f"the reference of {restored.directory}",
        fix="put the checkpoint that it began from back in its place",
    )


class ReferencePass:
    """Scores pairs by the model as it is.

    Args:
        module: whose model is placed.
        config: of the run.
        identity: of the reference, as `reference_identity` gives it.
    """

    def __init__(self, module: LanguageModule, config: RunConfig, identity: str):
        assert module.preferences is not None
        self._module, self._preferences, self._parallel = module, module.preferences, module.parallel
        key = key_of(identity=identity, precision=module.parallel.precision)
        self._cache = cache_root(config.data.cache_dir) / "references" / f"{key}.bin"

    def take_known(self, restored: Checkpoint | None, identity: str | None) -> None:
        """Take over what the cache and the checkpoint know, on all ranks alike. All of them call it.

        Args:
            restored: that the run goes on from.
            identity: of the reference.
        """
        found = ReferenceScores()
        if self._parallel.rank == 0:
            if restored is not None and reference_of(restored) == identity and FILE in restored.manifest.files:
                found.merge(ReferenceScores.from_bytes(restored.read(FILE, MAX_BYTES), restored.directory))
            found.merge(self._cached())
        self._preferences.reference = ReferenceScores.from_text(self._parallel.broadcast(found.to_text()))

    def _cached(self) -> ReferenceScores:
        try:
            if self._cache.stat().st_size <= MAX_BYTES:
                return ReferenceScores.from_bytes(self._cache.read_bytes(), self._cache)
        except OSError:
            pass
        except Exception as error:
            warn(f"{self._cache} is left aside: {error}")
        return ReferenceScores()

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        """Return those sequences of which a pair is not known, the same on all ranks.

        Args:
            parts: sequences by stream.
        """
        found = []
        for stream, indices in parts:
            unknown = [index for index in indices if self._unknown(stream, index)]
            found.append((stream, unknown))
        return [part for part in found if part[1]]

    def _unknown(self, stream: TokenStream, index: int) -> bool:
        batch = stream.batch([index])
        keys = Pairs.of(batch, np.zeros(batch["tokens"].shape)).keys
        return self._preferences.reference.missing(keys)

    def score(self, parts: Sequence[Part]) -> None:
        """Score sequences, divided over the ranks, and tell all of them. All ranks call it together.

        Args:
            parts: as `missing` gives them.
        """
        parallel, model, training = self._parallel, self._module.model, self._module.model.training
        rank, shares = parallel.data_share
        rows = self._module.micro_batch
        model.eval()
        fresh = ReferenceScores()
        for number, (stream, indices) in enumerate(_rounds(parts, rows * shares)):
            standing.mark()
            batch = stream.batch(indices[rank * rows : (rank + 1) * rows])
            pairs = self._preferences.score(model, batch, rows, lambda micro_batch, part: None)
            fresh.add(pairs.keys, pairs.logps)
            if number % _BETWEEN == _BETWEEN - 1:
                self._tell(fresh)
                fresh = ReferenceScores()
        self._tell(fresh)
        model.train(training)

    def _tell(self, fresh: ReferenceScores) -> None:
        """Give what a rank has found to all, and to the cache."""
        parallel, known = self._parallel, self._preferences.reference
        topic = parallel.broadcast(new_topic())
        told = exchange(parallel, topic, fresh.to_text(), _merged)
        known.merge(ReferenceScores.from_text(told))
        if parallel.rank == 0:
            try:
                self._cache.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._cache, known.to_bytes(), shared=True)
            except OSError as error:
                warn(f"the log-probabilities of the reference are not cached: {error}")


def reference_of(checkpoint: Checkpoint) -> str | None:
    """Return the identity of the reference model that a run of preferences has; None where it says none.

    Args:
        checkpoint: of the run.
    """
    found = checkpoint.state().get(STATE_KEY)
    identity = found.get("reference") if isinstance(found, dict) else None
    return identity if isinstance(identity, str) else None


def _merged(texts: list[str]) -> str:
    merged = ReferenceScores()
    for text in texts:
        merged.merge(ReferenceScores.from_text(text))
    return merged.to_text()


def _rounds(parts: Sequence[Part], size: int) -> Iterator[Part]:
    """Cut sequences into rounds of `size`; the last of a stream is filled up, so that there is one shape."""
    for stream, indices in parts:
        for at in range(0, len(indices), size):
            some = list(indices[at : at + size])
            yield stream, some + [some[-1]] * (size - len(some))
