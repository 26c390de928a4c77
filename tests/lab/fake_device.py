"""A device of a vendor's name that computes on the CPU: torch's Python backend for PrivateUse1, in pure Python.

`install("neuron", "neuron")` gives this process what importing the vendor's package would: a device type, its device
module, its process group, its generator, streams, events and `torch.compile` backend. Tensors of the device have memory
of their own device type (a kernel that is handed a mixture of devices fails, as on a chip); each kernel runs on a view
of that memory as a CPU tensor, and each collective is gloo's. So the arithmetic is the CPU's, and everything else goes
by the vendor's names.

Once in a process, and not to be undone: torch renames PrivateUse1 once. Tests call it in forked ranks.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections import Counter
from typing import Any

import torch
import torch._dynamo  # not after the device has been named
import torch.distributed as dist
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
_CPU = torch.device("cpu")
_CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
# Kernels that touch only what describes a tensor: the CPU's own do for any device.
_METADATA = (
    aten.as_strided.default,
    aten.view.default,
    aten._reshape_alias.default,
    aten.unfold.default,
    aten.set_.source_Storage,
    aten.set_.source_Storage_storage_offset,
    aten.set_.source_Tensor,
)
_MATRIX_PRODUCTS = (
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.scaled_dot_product_attention.default,
)
# torch has a kernel of its own for PrivateUse1 that hands the device's tensors to the group: gloo's would refuse them.
_COLLECTIVES = (
    "allreduce_",
    "allgather_",
    "_allgather_base_",
    "_reduce_scatter_base_",
    "reduce_scatter_",
    "broadcast_",
)
_COLLECTIVES += (
    "reduce_",
    "gather_",
    "scatter_",
    "alltoall_",
    "alltoall_base_",
    "allreduce_coalesced_",
    "send",
    "recv_",
)
_COLLECTIVES += ("allgather_into_tensor_coalesced_", "reduce_scatter_tensor_coalesced_", "barrier")
_PRODUCTS = (aten.mm, aten.addmm, aten.bmm)
_SWEEP_BYTES = 64 * 2**20

calls: Counter[str] = Counter()
"""How often each operation of the device and each function of its module was called."""


class FakeDevice:
    """State of the device: its memory, and its generator.

    Args:
        name: of the device type.
    """

    def __init__(self, name: str):
        self.name, self.device = name, torch.device("privateuseone", 0)
        # Memory of the device, by the address of the storage that has it; freed when that is found dead.
        self.owners: dict[int, torch.UntypedStorage] = {}
        self.unswept, self.peak = 0, 0
        self.generator = torch.Generator()
        self.pinned: set[int] = set()

    # --- memory ---------------------------------------------------------------------------------

    def own(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return `storage`, which is the CPU's, as memory of the device."""
        result = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), self.device, storage.nbytes())
        self.unswept += storage.nbytes()
        if self.unswept > _SWEEP_BYTES:
            self.sweep()
        self.owners[result._weak_ref()] = storage
        return result

    def sweep(self) -> int:
        """Free what no tensor has any more; return the bytes that remain."""
        for address in [address for address in self.owners if torch.UntypedStorage._expired(address)]:
            del self.owners[address]
            torch.UntypedStorage._free_weak_ref(address)
        self.unswept, used = 0, sum(storage.nbytes() for storage in self.owners.values())
        self.peak = max(self.peak, used)
        return used

    def wrap(self, tensor: torch.Tensor, storage: torch.UntypedStorage | None = None) -> torch.Tensor:
        """Return a CPU tensor as one of the device; on `storage`, which it is a view of, or on memory of its own."""
        storage = self.own(tensor.untyped_storage()) if storage is None else storage
        result = torch._C._acc.create_empty_tensor([0], tensor.dtype)
        self.point(result, storage, tensor)
        return result

    @staticmethod
    def point(tensor: torch.Tensor, storage: torch.UntypedStorage, like: torch.Tensor) -> None:
        place = (like.storage_offset(), like.size(), like.stride())
        aten.set_.source_Storage_storage_offset.redispatch(_CPU_KERNEL, tensor, storage, *place)

    @staticmethod
    def unwrap(tensor: torch.Tensor) -> torch.Tensor:
        """Return a CPU tensor on the same memory."""
        storage = tensor.untyped_storage()
        alias = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _CPU, storage.nbytes())
        return torch.empty(0, dtype=tensor.dtype).set_(alias, tensor.storage_offset(), tensor.size(), tensor.stride())

    # --- kernels --------------------------------------------------------------------------------

    def run(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `op` on the CPU, on the memory of the device's tensors."""
        calls[op._name] += 1
        if op in _METADATA:
            return op.redispatch(_CPU_KERNEL, *args, **kwargs)
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def enter(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(map(enter, value))
            if isinstance(value, torch.device):
                return _CPU if value.type == self.name else value
            if not isinstance(value, torch.Tensor):
                return value
            if value.device.type == self.name:
                pairs.append((self.unwrap(value), value))
                return pairs[-1][0]
            mixed = value.dim() > 0 and op.namespace == "aten" and op is not aten._copy_from.default
            assert not mixed, f"{op} got a tensor of {value.device} among those of {self.name}"
            return value

        host_args, host_kwargs = enter(args), {name: enter(value) for name, value in kwargs.items()}
        if op is aten._copy_from.default:
            host_args[1].copy_(host_args[0])
            return args[1]
        self._check(op, host_kwargs)
        if op.overloadpacket in _PRODUCTS and torch.get_float32_matmul_precision() != "highest":
            host_args = tuple(_rounded(value) for value in host_args)
        empty = self._empty_outputs(op, kwargs, host_kwargs)
        with self._randomness(op):
            result = op(*host_args, **host_kwargs)
        for host, ours in empty:
            self.point(ours, self.own(host.untyped_storage()), host)
        return self._leave(pairs + empty, result)

    def _check(self, op: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what the vendor's kernels refuse."""
        if op.overloadpacket is aten._fused_adamw_ and self.name == "neuron":
            assert kwargs.get("found_inf") is None, "torch-neuronx, python_ops: no found_inf in its fused AdamW"

    @staticmethod
    def _empty_outputs(op: Any, ours: dict[str, Any], hosts: dict[str, Any]) -> list[tuple[Any, Any]]:
        """Give the kernel something that it may resize for each `out=` that has no elements yet."""
        found = []
        for name in _outputs(op) if ours else ():
            if isinstance(hosts.get(name), torch.Tensor) and not hosts[name].numel():
                hosts[name] = torch.empty(0, dtype=hosts[name].dtype)
                found.append((hosts[name], ours[name]))
        return found

    def _leave(self, pairs: list[tuple[Any, Any]], value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(self._leave(pairs, one) for one in value)
        if not isinstance(value, torch.Tensor):
            return value
        address = value.untyped_storage().data_ptr()
        for host, ours in pairs:
            if host is value:
                return ours
        for host, ours in pairs:
            if address and host.untyped_storage().data_ptr() == address:
                return self.wrap(value, ours.untyped_storage())
        return self.wrap(value)

    @contextlib.contextmanager
    def _randomness(self, op: Any) -> Any:
        """Let what is random draw from the device's generator, and not from the CPU's."""
        if not _is_random(op):
            yield
            return
        kept = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(kept)


def _rounded(value: Any) -> Any:
    """Return fp32 as a chip reads it for a matrix product, unless it is told to keep all bits: torch_tpu's default."""
    matrix = isinstance(value, torch.Tensor) and value.dtype == torch.float32
    return value.to(torch.bfloat16).float() if matrix else value


@functools.cache
def _outputs(op: Any) -> list[str]:
    return [argument.name for argument in op._schema.arguments if argument.is_out]


@functools.cache
def _is_random(op: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


class _Event:
    def __init__(self, device: Any = None, **kwargs: Any):
        calls["Event"] += 1

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        calls["Event.synchronize"] += 1

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any):
        self.device_index, self.device = 0, torch.device("privateuseone", 0)

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()

    def synchronize(self) -> None:
        calls["Stream.synchronize"] += 1


def _module(fake: FakeDevice) -> types.ModuleType:
    """Return what is `torch.<name>`."""
    module, stream = types.ModuleType(f"torch.{fake.name}"), _Stream()

    def used(device: Any = None) -> int:
        calls["memory_allocated"] += 1
        return fake.sweep()

    def peak(device: Any = None) -> int:
        fake.sweep()
        return fake.peak

    def seed(number: int) -> None:
        calls["manual_seed_all"] += 1
        fake.generator.manual_seed(number)

    def set_state(state: torch.Tensor, device: Any = None) -> None:
        calls["set_rng_state"] += 1
        fake.generator.set_state(state)

    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: contextlib.nullcontext(),
        "synchronize": lambda device=None: None,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": lambda device=None: fake.generator.get_state(),
        "set_rng_state": set_state,
        "memory_allocated": used,
        "max_memory_allocated": peak,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def install(name: str, group: str) -> FakeDevice:
    """Make this process believe that the vendor's package is loaded.

    Args:
        name: of the device type.
        group: of its process group.
    """
    fake = FakeDevice(name)
    module = _module(fake)
    _setup_privateuseone_for_python_backend(name, backend_module=module)
    # All of it lives as long as the process.
    fake.libraries = _register_kernels(fake)
    _register_runtime(fake, module)
    dist.Backend.register_backend(group, _gloo, devices=[name])
    torch.set_float32_matmul_precision("medium")
    torch._dynamo.register_backend(lambda graph, inputs: _compiled(name, graph), name=name)
    return fake


def _register_kernels(fake: FakeDevice) -> list[torch.library.Library]:
    every, own, groups = (torch.library.Library(space, "IMPL") for space in ("_", "aten", "c10d"))
    every.fallback(fake.run, "PrivateUse1")
    for op in _METADATA:
        own.impl(op, functools.partial(fake.run, op), "PrivateUse1")
    for name in _COLLECTIVES:
        op = getattr(torch.ops.c10d, name).default
        groups.impl(op, functools.partial(fake.run, op), "PrivateUse1", allow_override=True)
    every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for op in _MATRIX_PRODUCTS:
        own.impl(op, functools.partial(_autocast, fake.name, op), "AutocastPrivateUse1")
    return [every, own, groups]


def _autocast(name: str, op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a matrix product in the dtype of autocast."""
    calls["autocast"] += 1
    dtype = torch.get_autocast_dtype(name)
    cast = pytree.tree_map_only(torch.Tensor, lambda one: one.to(dtype) if one.dtype == torch.float32 else one, args)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return op(*cast, **kwargs)


def _register_runtime(fake: FakeDevice, module: types.ModuleType) -> None:
    """Put in place what a backend in C++ registers and one in Python cannot."""
    resize, event, accelerator = torch.UntypedStorage.resize_, torch.Event, torch.accelerator

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        if storage.device.type != fake.name:
            return resize(storage, size)
        assert size in (0, storage.nbytes()), "memory is given back and taken again, and not resized"
        if size == 0:
            # What was given back must not be read.
            torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _CPU, storage.nbytes()).fill_(0xFF)
        return storage

    def pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        calls["pin_memory"] += 1
        assert tensor.device.type == "cpu", "only memory of the host is pinned"
        return tensor.clone()

    class AnyEvent(event):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = None, **kwargs: Any) -> Any:
            ours = device is not None and torch.device(device).type == fake.name
            return _Event() if ours else event(device, **kwargs)

    torch.UntypedStorage.resize_ = resize_
    torch.Tensor.pin_memory = pin
    torch.Event = AnyEvent
    for function in ("memory_allocated", "max_memory_allocated", "current_stream", "synchronize"):
        setattr(accelerator, function, getattr(module, function))


def _gloo(store: Any, rank: int, size: int, timeout: Any) -> Any:
    calls["process_group"] += 1
    return dist.ProcessGroupGloo(store, rank, size, timeout=timeout)


def _compiled(name: str, graph: Any) -> Any:
    calls[f"compile:{name}"] += 1
    return graph.forward
