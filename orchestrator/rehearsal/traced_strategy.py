"""The torch-native strategy on fake tensors and a fake process group: one rank of any world in one process.

Everything is done as in a run; the process group says that it has sent and received, and tensors know their
shapes and how many bytes they would need (`FakeTensorMode`). So one process can go through the step of any rank of
hundreds and be watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary

from orchestrator.distributed.coordinator import ProcessCoordinator
from orchestrator.models.protocol import ShardableModel
from orchestrator.strategies.dtensor import DTensorStrategy


class _FakeCoordinator(ProcessCoordinator):
    """The coordinator of a process whose peers do not exist: every collective returns at once.

    It has no group for votes, as no decision is taken in a trace, and what it broadcasts is its own.
    """

    def meet(self, backend: str) -> None:
        """Make torch's fake process group of the whole world, whatever `backend`."""
        rank, size = self._world.rank, self._world.size
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    def broadcast(self, text: str, src: int = 0) -> str:
        """Return `text`: there is no rank 0 to wait for."""
        return text


class TracedStrategy(DTensorStrategy):
    """See `DTensorStrategy`.

    Attributes:
        fake: the mode under which the model's parts are allocated, and under which its step has to run.
        before_update: called when the gradients are complete.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.before_update: Callable[[], None] = lambda: None
        self._coordinator = _FakeCoordinator(self.world, self.timeout_seconds)

    def check_agreement(self) -> None:
        """There is nobody to agree with."""

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return `obj`, on any rank: there is nobody to say anything else.

        Args:
            obj: of this process.
            src: the rank that is not there.
        """
        return obj

    def leave(self) -> None:
        """Leave the fake process group and forget what was derived from it."""
        super().leave()
        # It remembers the groups of this world, which the next one's equal mesh would be given.
        _clear_sharding_prop_cache()

    def _allocate(self, model: ShardableModel) -> None:
        # Only the allocation: what comes before it on the meta device reads the mesh's ranks, which are data.
        with self.fake:
            super()._allocate(model)

    def reduce_and_clip(
        self, model: ShardableModel, loss_part: Tensor, max_norm: float | None
    ) -> tuple[Tensor, Tensor]:
        """Report that the gradients are complete, then clip them."""
        self.before_update()
        return super().reduce_and_clip(model, loss_part, max_norm)

    def fetch_later(self, value: Tensor) -> Callable[[], float]:
        """Return 0 for any value, as a trace computes none."""
        return lambda: 0.0  # nothing is computed: no step of a trace goes wrong


class EvenLoads(TorchDispatchMode):
    """Lets every router choose all experts equally often, and computes with these choices in earnest.

    How many rows an expert gets is data, and decides about shapes, but a trace has no data. Choices (of `topk`) are
    therefore tensors with numbers in them, and so is what is made of them alone: orders, counts, and the counts that
    come back from an all-to-all, which are those that were sent. To be entered after the fake mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute `func` on choices in earnest, everything else as it comes."""
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if not is_split(types) and tensors and all(tensor in self._known for tensor in tensors):
            with _disable_current_modes():
                if func is torch.ops.c10d.alltoall_base_.default:
                    args[0].copy_(args[1])
                else:
                    return self._note(func(*args, **kwargs))
        result = func(*args, **kwargs)
        if func is torch.ops.aten.topk.default:
            with _disable_current_modes():
                shape = tuple(result[1].shape)
                choices = torch.arange(result[1].numel()).remainder(args[0].shape[-1]).view(shape)
            return type(result)((result[0], self._note(choices))) if isinstance(result, tuple) else result
        return result

    def _note(self, result: Any) -> Any:
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._known[value] = True
        return result


def local_storage(tensor: Any) -> Any:
    """Return the storage of this rank's part of a tensor.

    Args:
        tensor: a tensor or `DTensor`.
    """
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def is_split(types: Iterable[type]) -> bool:
    """Return whether an operation on tensors of these types is one on whole tensors, of which a rank has parts.

    Args:
        types: of the operation's tensors.
    """
    return any(issubclass(kind, DTensor) for kind in types)
