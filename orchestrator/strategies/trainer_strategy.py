"""What Lightning's Trainer asks of a strategy: the order of its set-up, its reductions, its checkpoints.

`Trainer.fit` calls `setup_environment` (the processes meet), the module's `configure_model` (the model is described),
`setup` (it is sharded, the optimizers are made), then `load_checkpoint`. In a run of the product the model is placed
before the Trainer exists, and `setup` finds nothing to do. No private method of Lightning's is called or replaced.
"""

from __future__ import annotations

import shutil
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import ParallelStrategy as LightningParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from orchestrator.checkpoint.checkpoint import Checkpoint
from orchestrator.distributed.world import World
from orchestrator.errors import ConfigError
from orchestrator.hardware.target import Target
from orchestrator.sharding.layout import Layout
from orchestrator.strategies import trainer_checkpoint
from orchestrator.strategies.accelerator import TargetAccelerator
from orchestrator.strategies.environment import JobEnvironment
from orchestrator.strategies.module_state import ModuleState
from orchestrator.strategies.precision import sharded_precision


class TrainerStrategy(LightningParallelStrategy):
    """The half of a strategy that Lightning calls.

    Args:
        target: the hardware of this process.
        world: this process among the job's.
        layout: degrees of the mesh axes.
        precision: `fp32`, `bf16` or `fp8` for the matrix products.

    Attributes:
        cluster_environment: keeps Lightning from looking for an engine of its own.
    """

    def __init__(self, target: Target, world: World, layout: Layout, precision: str):
        self.target, self.world, self.layout, self.precision = target, world, layout, precision
        self._target_accelerator = TargetAccelerator(target)
        # Where the strategy brings an accelerator Lightning refuses `Trainer(accelerator=...)`, which its users write.
        # Without one it would find a TPU, and refuse a strategy that is not its own.
        brought = self._target_accelerator if target.strategy == "xla" else None
        super().__init__(accelerator=brought, cluster_environment=JobEnvironment())
        self._world_size = world.size
        self._fitting = False

    # --- what the strategies implement --------------------------------------------------------------

    @property
    @abstractmethod
    def joined(self) -> bool:
        """Whether `join` was called."""

    @abstractmethod
    def join(self) -> None:
        """Meet the other processes and build the device mesh."""

    @abstractmethod
    def place(self, module: nn.Module) -> None:
        """Shard what `module` holds, unless that was done, and allocate this process's part of it.

        Raises:
            LayoutError: something in it cannot be sharded, or would not be reduced.
        """

    @abstractmethod
    def module_state(self, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> ModuleState:
        """Describe the tensors of a placed `module` and its `optimizers`, for checkpoints."""

    @abstractmethod
    def accumulating(self) -> AbstractContextManager[None]:
        """Around a backward pass that is not the last one of its step."""

    @abstractmethod
    def finish_step(self) -> None:
        """After the optimizer's step, and after each batch of an evaluation."""

    @abstractmethod
    def forward_context(self) -> AbstractContextManager[Any]:
        """Around every forward pass, where the precision is not a property of the placed parameters."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This process."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Processes of the job."""

    @abstractmethod
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Give `obj` of the rank `src` to every rank; all ranks call it, in the same order."""

    @abstractmethod
    def put(self, key: str, text: str) -> None:
        """Publish `text` to all ranks under a `key` that is used once. Any thread may call it."""

    @abstractmethod
    def get_now(self, key: str) -> str | None:
        """Return what a rank has published under `key`, or None. Does not wait. Any thread may call it."""

    @abstractmethod
    def any_raised(self, flag: bool) -> bool:
        """Whether any rank calls with `flag` set; waits for all of them."""

    # --- who this is -------------------------------------------------------------------------------

    @property
    def accelerator(self) -> TargetAccelerator:
        """The target's: whatever `Trainer(accelerator=...)` says, the devices are those of the target."""
        return self._target_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        """Take no `accelerator` of Lightning's: the target has its own."""

    @property
    def trainer_accelerator(self) -> Any:
        """The `accelerator` argument of a Trainer whose devices are the target's for certain."""
        return self._target_accelerator if self._accelerator is None else "auto"

    @property
    def world_size(self) -> int:
        """The processes that Lightning is told of.

        Where there are several it asks at each batch whether rank 0 got SIGTERM, and waits for the device then.
        """
        return self._world_size

    @world_size.setter
    def world_size(self, size: int) -> None:
        """Take `size` for the processes that Lightning counts."""
        self._world_size = size

    @property
    def parallel_devices(self) -> list[torch.device]:
        """A placeholder for the device of this process, which is `root_device`.

        Lightning counts what stands here. It also takes a device of a type it knows for the user's choice, and
        refuses a second Trainer that chooses another; so the type is one that it makes nothing of.
        """
        return [torch.device("meta", self.world.local_rank)]

    @parallel_devices.setter
    def parallel_devices(self, devices: Any) -> None:
        """Take no `devices` of Lightning's, which are of the accelerator that the user names."""

    @property
    def root_device(self) -> torch.device:
        """The device of this process."""
        return self.target.device(self.world.local_rank)

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self.world.rank == 0

    @property
    def global_rank(self) -> int:
        """Number of this process, from 0."""
        return self.world.rank

    @property
    def local_rank(self) -> int:
        """Number of this process on its host."""
        return self.world.local_rank

    @property
    def node_rank(self) -> int:
        """Number of this host."""
        return self.world.rank // self.world.local_size

    @property
    def num_nodes(self) -> int:
        """Number of hosts."""
        return self.world.hosts

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        """Take no `count`: the launcher knows it, and `Trainer(num_nodes=...)` need not say it."""

    @property
    def is_distributed(self) -> bool:
        """Lightning gives data loaders without a sampler one that deals out the samples; on one process, too.

        So the order of shuffled data is a function of seed and epoch on any number of processes.
        """
        return True

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """The data-parallel size and rank, by which Lightning deals out samples."""
        return {"num_replicas": self.layout.data_parallel, "rank": self.layout.data_rank(self.world.rank)}

    def set_world_ranks(self) -> None:
        """Let Lightning's loggers and messages speak on rank 0 alone; the Trainer calls it when it is made."""
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.world.rank  # type: ignore[attr-defined]

    # --- set-up --------------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        """Join the other processes, unless that was done."""
        if not self.joined:
            self.join()
        super().setup_environment()

    @contextmanager
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build modules on the meta device with `empty_init`, else on the host."""
        # Not on the device: before it is sharded the whole model need not fit there.
        with torch.device("meta") if empty_init else nullcontext():
            yield

    def setup(self, trainer: Any) -> None:
        """Place the module of `trainer`, and set up optimizers and precision."""
        assert self.lightning_module is not None
        if self._layer_sync is not None:
            raise ConfigError("this strategy does not synchronise batch norms", fix="leave out sync_batchnorm=True")
        self.accelerator.setup(trainer)
        for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
            # Where a validation comes first FSDP2 would gather into tensors that no backward pass can use.
            loop.inference_mode = False
        self.place(self.lightning_module)
        self._fitting = trainer.state.fn == TrainerFn.FITTING
        if self._fitting:
            self.setup_optimizers(trainer)
        elif not self._own_optimizers(self.lightning_module):
            self.optimizers, self.lr_scheduler_configs = [], []  # of another module, which was trained before
        self.setup_precision_plugin()

    def _own_optimizers(self, module: nn.Module) -> bool:
        own = set(module.parameters())
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return all(parameter in own for group in groups for parameter in group["params"])

    def model_to_device(self) -> None:
        """`place` has put every tensor where it belongs."""

    def teardown(self) -> None:
        """Lightning would gather the model on the host here. The processes stay together: others may follow."""

    # --- the step --------------------------------------------------------------------------------------

    @property
    def precision_plugin(self) -> Precision:
        """Lightning's precision plugin, made fit for parts of parameters."""
        plugin = self._precision_plugin
        return plugin if plugin is not None else Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        """Take Lightning's `plugin`, made fit for parts of parameters."""
        self._precision_plugin = None if plugin is None else sharded_precision(plugin, self)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step the `optimizer` with `closure`, for `model` with Lightning's `kwargs`, and end the step."""
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self.lightning_module is not None and self.lightning_module.automatic_optimization:
            self.finish_step()
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch that is not the last one of its step."""
        with self.accumulating():
            yield

    # --- reductions ------------------------------------------------------------------------------------

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Return `tensor`, whatever `group` and `reduce_op` are."""
        return tensor

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return `tensor`, whatever `group` and `sync_grads` are."""
        return tensor

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Return whether the `decision` of all ranks, or with `all=False` that of any, is for it."""
        return not self.any_raised(not decision) if all else self.any_raised(bool(decision))

    # --- checkpoints -----------------------------------------------------------------------------------

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """Refused: the strategy writes checkpoints itself."""
        raise ConfigError("this strategy writes and reads checkpoints itself", fix="call trainer.save_checkpoint")

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        """Refuse `io`: the strategy writes checkpoints itself."""
        raise ConfigError(
            "this strategy writes checkpoints in the portable format and takes no CheckpointIO",
            got=type(io).__name__,
            fix="leave it out of Trainer(plugins=...)",
        )

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """True: a restore fills parameters that are placed."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """False: the strategy restores the optimizer's state."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the whole weights, gathered on the host."""
        assert self.lightning_module is not None
        return self.module_state(self.lightning_module, self.optimizers).state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return nothing of `optimizer`: `save_checkpoint` takes the state from it, each process its part."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a portable checkpoint: a directory of the name `filepath`. All ranks call it together.

        Args:
            checkpoint: what Lightning and the callbacks keep; tensors of `state_dict`, the rest as JSON.
            filepath: of the directory; one that is there is replaced when the new one is complete.
            storage_options: not supported.

        Raises:
            SaveError: it could not be written; what was there before is untouched.
            NonFiniteError: weights or optimizer state are not finite.
            ConfigError: storage options were given.
        """
        if storage_options is not None:
            raise ConfigError("checkpoints of this strategy know no storage options", got=storage_options)
        assert self.lightning_module is not None
        state = self.module_state(self.lightning_module, self.optimizers)
        trainer_checkpoint.save(checkpoint, filepath, state, self)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Fill module and optimizers from a portable checkpoint. All ranks call it together.

        Args:
            checkpoint_path: its directory.
            weights_only: without effect, as nothing is unpickled.

        Returns:
            What Lightning and the callbacks had kept; `state_dict` is empty, as it is loaded already.

        Raises:
            CheckpointError: it is none, or of another module.
            DamagedError: it is not what was written.
        """
        module = self.lightning_module
        assert module is not None
        state = self.module_state(module, self.optimizers if self._fitting else [])
        return trainer_checkpoint.load(checkpoint_path, state, self, strict=module.strict_loading)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Do nothing: `load_checkpoint` has filled the module from `checkpoint`, `strict` or not."""

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove the checkpoint `filepath`, on rank 0."""
        path = Path(filepath)
        if self.is_global_zero and path.is_symlink():
            path.unlink()
        elif self.is_global_zero and path.is_dir():
            Checkpoint(path, look=False)  # or say that it is none: nothing else is removed
            shutil.rmtree(path)
