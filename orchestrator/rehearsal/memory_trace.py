"""Peak memory of one training step on one rank of any world, measured on fake tensors.

The step is the product's own: model, optimizer, strategy and module of a run, driven by the trainer of a run, as one
rank of a world that is not there (`strategies.traced`). Every operation's results are watched from when they are made
until they are let go. What a kernel allocates inside itself, what a device's allocator wastes, and what its runtime
needs are not seen. Devices are CPUs here: attention is torch's kernel for CPUs, which keeps what the flash kernels of
other devices keep, and streams, which let two of a device's copies live at a time, have no meaning.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from orchestrator.config.schema import HardwareConfig, RunConfig
from orchestrator.data.sequences import blank_batch
from orchestrator.distributed.world import World
from orchestrator.hardware.target_table import resolve
from orchestrator.models.protocol import ShardableModel
from orchestrator.rehearsal.traced_strategy import EvenLoads, TracedStrategy, is_split, local_storage
from orchestrator.strategies.parallel_strategy import local_parameters
from orchestrator.training.job import make_trainer
from orchestrator.training.module import LanguageModule
from orchestrator.training.optimizer_setup import build_optimizer
from orchestrator.training.preference import without_preferences
from orchestrator.training.resolved import resolve_run

PHASES = ("forward", "head", "last_layer", "between", "first_layer", "embedding", "update")
"""Of a step, in order: forward with the loss; backward through the head, the layers and the embedding; clipping and
the optimizer."""
SHALLOW = (2, 4)

_About = tuple[str, tuple[int, ...], str]  # operation, shape and type of what was made


@dataclass(frozen=True)
class Memory:
    """Bytes allocated on one rank at the peak of a phase, by use.

    Attributes:
        parameters: the rank's shards, the master copy.
        gradients: the rank's shards, reduced.
        optimizer: both moments.
        working: everything else: activations, gathered parameters, gradients that are not reduced yet, logits,
            the batch.
    """

    parameters: float
    gradients: float
    optimizer: float
    working: float

    @property
    def total(self) -> float:
        """Bytes of everything."""
        return self.parameters + self.gradients + self.optimizer + self.working


@dataclass(frozen=True)
class Alive:
    """One allocation at the peak.

    Attributes:
        size: bytes.
        kind: what it is for, a field of `Memory`.
        operation: that made it.
        shape: of its first tensor.
        dtype: of its first tensor.
    """

    size: int
    kind: str
    operation: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Trace:
    """The memory trace of a step.

    Attributes:
        phases: the fullest moment of each of `PHASES`; of several micro-batches the fullest.
        alive: what that was, the largest first.
    """

    phases: Mapping[str, Memory]
    alive: Mapping[str, tuple[Alive, ...]]

    @property
    def peak(self) -> Memory:
        """The fullest moment of the step."""
        return max(self.phases.values(), key=lambda memory: memory.total)


def trace_step(config: RunConfig, devices: int, rank: int = 0) -> Trace:
    """Go through one step of `config` as `rank` of `devices` on the torch-native strategy.

    Args:
        config: complete, with a number as the vocabulary. It is resolved as for a CPU: `hardware.precision=auto` means
            fp32, and the layout is not planned.
        devices: in the whole job.
        rank: the process that is traced.

    Raises:
        LayoutError: the degrees do not fit the devices.
    """
    assert isinstance(config.model.vocab_size, int), "the vocabulary is known to whoever traces"
    target = resolve(HardwareConfig(target="cpu"))
    resolved = resolve_run(config, target, devices, config.model.vocab_size)
    world, config = World(rank, devices, 0, 1), resolved.config
    parallel = TracedStrategy(
        target, world, resolved.layout, resolved.precision, reduce_gradients=config.train.reduce_gradients
    )
    parallel.join()
    try:
        module = LanguageModule(without_preferences(config), parallel=parallel)
        module.configure_model()
        parts = parallel.parts(module.model)  # looks into the mesh's ranks, which are data
        with parallel.fake, _quiet():
            module.optimizer = build_optimizer(module.model, config.optim, parallel.root_device, parts)
            return _watch(module)
    finally:
        parallel.leave()


def trace_deep(config: RunConfig, devices: int) -> Trace:
    """Trace a deep model by tracing shallow ones and extrapolating linearly in the layers, phase by phase.

    Every layer adds the same to what is alive at a phase's fullest moment. What lies between the first layer and the
    last one is left out: it is nowhere fuller than at both ends.

    Args:
        config: of the run, complete.
        devices: of the whole job.
    """
    layers = config.model.layers
    if layers <= SHALLOW[1]:
        return trace_step(config, devices)
    low, high = (trace_step(replace(config, model=replace(config.model, layers=count)), devices) for count in SHALLOW)
    depth = (layers - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
    phases = {
        phase: Memory(**{key: a + depth * (getattr(high.phases[phase], key) - a) for key, a in vars(memory).items()})
        for phase, memory in low.phases.items()
        if phase != "between"
    }
    return Trace(phases, high.alive)


def _watch(module: LanguageModule) -> Trace:
    parallel, train = cast(TracedStrategy, module.parallel), module.config.train
    sequences = train.global_batch_tokens // train.seq_len // parallel.data_share[1]
    batch = blank_batch(sequences, train.seq_len, module.config.data.document_mask)
    watch = _Watch(module.model, module.optimizer)
    _mark_phases(module.model, watch)
    parallel.before_update = lambda: watch.enter("update")
    # The first step is not looked at: in it DTensor works out what results look like, with stand-ins for whole tensors.
    module.record = lambda *, step, **values: watch.clear() if step == 1 else None
    trainer = make_trainer(parallel, [], deterministic=False)
    with EvenLoads(), watch:
        # An iterator, as the trainer takes a list for several loaders.
        trainer.fit(module, iter([batch, batch]))
    return watch.trace()


_KINDS = tuple(Memory.__dataclass_fields__)


def _mark_phases(model: ShardableModel, watch: _Watch) -> None:
    """Let the watch know where in the model the step is: backward by the gradients that arrive."""

    def then(phase: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            if args[0].requires_grad:
                args[0].register_hook(lambda gradient: watch.enter(phase))

        return hook

    # First, as FSDP's own hook gathers what stays gathered.
    model.register_forward_pre_hook(lambda *unused: watch.enter("forward"), prepend=True)
    model.register_forward_hook(lambda *unused: watch.enter("head"))
    last = len(model.blocks) - 1
    model.norm.register_forward_pre_hook(then("last_layer" if last else "first_layer"))
    for index, block in enumerate(model.blocks):
        below = {0: "embedding", 1: "first_layer"}.get(index, "between")
        block.register_forward_pre_hook(then(below))


class _Watch(TorchDispatchMode):
    """Keeps account of every storage that an operation makes, for as long as it lives."""

    def __init__(self, model: ShardableModel, optimizer: torch.optim.Optimizer):
        super().__init__()
        self._model, self._optimizer = model, optimizer
        self._made: dict[int, tuple[weakref.ref[Any], _About]] = {}
        self._phase = PHASES[0]
        self._peaks: dict[str, tuple[int, list[tuple[str, int, _About]]]] = {}
        for _, tensor in self._state():
            self._note(local_storage(tensor), ("", tuple(tensor.shape), str(tensor.dtype)))

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a rank has for good, by what it is for. FSDP may put another tensor in a parameter's place."""
        for _, parameter in local_parameters(self._model):
            yield "parameters", parameter
            if parameter.grad is not None:
                yield "gradients", parameter.grad
            for value in self._optimizer.state[parameter].values():
                yield "optimizer", value

    def _note(self, storage: Any, about: _About) -> None:
        key = id(storage)
        if key not in self._made:
            self._made[key] = (weakref.ref(storage, lambda _: self._made.pop(key, None)), about)

    def clear(self) -> None:
        self._peaks.clear()

    def enter(self, phase: str) -> None:
        self._phase = phase

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_split(types):
            return NotImplemented  # it comes back as what it does to the local parts
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                about = (str(func), tuple(value.shape), str(value.dtype))
                self._note(value.untyped_storage(), about)
        self._measure()
        return result

    def _measure(self) -> None:
        # Anew each time: FSDP frees and fills the memory of its gathered parameters by changing a storage's size.
        alive = [(key, storage.nbytes(), about) for key, (ref, about) in self._made.items() if (storage := ref())]
        total = sum(size for _, size, _ in alive)
        if total > self._peaks.get(self._phase, (-1, []))[0]:
            kinds = {id(local_storage(tensor)): kind for kind, tensor in self._state()}
            named = [(kinds.get(key, "working"), size, about) for key, size, about in alive if size]
            self._peaks[self._phase] = (total, named)

    def trace(self) -> Trace:
        alive = {
            phase: tuple(sorted((Alive(size, kind, *about) for kind, size, about in found), key=lambda one: -one.size))
            for phase, (_, found) in self._peaks.items()
        }
        phases = {
            phase: Memory(**{kind: float(sum(one.size for one in found if one.kind == kind)) for kind in _KINDS})
            for phase, found in alive.items()
        }
        return Trace(phases, alive)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what a trainer says of the devices that it has found, and of data that it has not."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*no `val_dataloader`.*")
            yield
    finally:
        logger.setLevel(level)
