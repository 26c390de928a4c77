"""Context parallelism: each kind gives what attention over the whole sequence gives, and the same training."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from orchestrator.errors import LayoutError
from orchestrator.models.attention import AttentionCore
from orchestrator.models.mask import CausalMask
from orchestrator.models.remat import remat_function
from orchestrator.strategies import ring_attention as ring_module
from orchestrator.strategies.block_attention import Scores, attend, attend_backward, uses_kernel
from orchestrator.strategies.context_parallel import check_core
from orchestrator.strategies.ring_attention import RingAttentionCore, SequenceRing, ring_attend
from orchestrator.strategies.sequence_order import SequenceOrder, SequenceParts
from orchestrator.strategies.ulysses import UlyssesAttentionCore
from tests.lab.ranks import run_ranks

LENGTH = 48


@dataclass(frozen=True)
class Case:
    """Attention of one shape."""

    heads: int = 4
    kv_heads: int = 2
    documents: bool = False
    window: int | None = None
    width: int = 8  # of values
    batch: int = 2


ATTENTION = {
    "causal": Case(),
    "one sequence": Case(batch=1, kv_heads=4),
    "documents": Case(documents=True),
    "window": Case(window=7),
    "long window": Case(window=30, kv_heads=1),
    "documents and window": Case(documents=True, window=11, kv_heads=1),
    "narrow values": Case(width=4, documents=True),
}
KINDS = [("ring", 1), ("ring", 2), ("ulysses", 1)]  # and chunks of a rank


def _inputs(case: Case) -> tuple[list[torch.Tensor], torch.Tensor, CausalMask]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(case.heads, 8), (case.kv_heads, 8), (case.kv_heads, case.width)]
    tensors = [torch.randn(case.batch, heads, LENGTH, width, generator=draw) for heads, width in shapes]
    grad = torch.randn(case.batch, case.heads, LENGTH, case.width, generator=draw)
    documents = None
    if case.documents:
        documents = (torch.rand(case.batch, LENGTH, generator=draw) < 0.1).cumsum(1)
    rule = CausalMask(queries=LENGTH, past=0, documents=documents, window=case.window, device=torch.device("cpu"))
    return tensors, grad, rule


def _whole(case: Case) -> list[torch.Tensor]:
    tensors, grad, rule = _inputs(case)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    out = AttentionCore()(*tensors, rule.whole())
    out.backward(grad)
    return [out.detach(), *(tensor.grad for tensor in tensors)]


def _join(world):
    store = dist.FileStore(world.store.removeprefix("file:"), world.size)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size)
    return dist.group.WORLD


def _attend(world, cases):
    group, results = _join(world), {}
    for name, (kind, chunks) in itertools.product(cases, KINDS):
        order = SequenceOrder(world.size, chunks)
        tensors, grad, rule = _inputs(cases[name])
        mine = [order.cut(tensor, world.rank, 2).clone().requires_grad_() for tensor in tensors]
        core = (
            RingAttentionCore(AttentionCore(), SequenceRing(group, order), tile=(5, 7))
            if kind == "ring"
            else UlyssesAttentionCore(AttentionCore(), group, tile=(5, 7))
        )
        out = core(*mine, rule)
        out.backward(order.cut(grad, world.rank, 2))
        results[name, kind, chunks] = [tensor.numpy() for tensor in (out.detach(), *(tensor.grad for tensor in mine))]
    return results


@pytest.mark.parametrize("size", [2, 4])
def test_each_kind_gives_what_attention_over_the_whole_sequence_gives(size):
    parts = run_ranks(size, _attend, ATTENTION)
    for name, kind, chunks in parts[0]:
        order = SequenceOrder(size, chunks)
        for which, wanted in enumerate(_whole(ATTENTION[name])):
            found = torch.cat([torch.from_numpy(part[name, kind, chunks][which]) for part in parts], 2)
            torch.testing.assert_close(
                order.restore(found, 2), wanted, rtol=1e-5, atol=2e-6, msg=f"{kind} {name} {which}"
            )


def _softened(world):
    """Soft-capped scores and a sink for each head, against the formula."""
    group, order = _join(world), SequenceOrder(world.size, 2)
    tensors, grad, rule = _inputs(ATTENTION["documents"])
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0])
    mine = [order.cut(tensor, world.rank, 2).clone().requires_grad_() for tensor in tensors]
    own_sinks = sinks.clone().requires_grad_()
    out = ring_attend(*mine, own_sinks, rule, SequenceRing(group, order), Scores(0.3, 2.0, (5, 7)))
    out.backward(order.cut(grad, world.rank, 2))
    dist.all_reduce(own_sinks.grad)
    whole = [tensor.clone().requires_grad_() for tensor in (*tensors, sinks)]
    q, k, v, sink = whole
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = 2.0 * torch.tanh(q @ k.mT * 0.3 / 2.0)
    scores = scores.masked_fill(~rule.whole(), float("-inf"))
    column = sink[None, :, None, None].expand(*scores.shape[:3], 1)
    wanted = torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v
    wanted.backward(grad)
    close = {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(out, order.cut(wanted, world.rank, 2), **close)
    for own, each in zip(mine, whole, strict=False):
        torch.testing.assert_close(own.grad, order.cut(each.grad, world.rank, 2), **close)
    torch.testing.assert_close(own_sinks.grad, sink.grad, **close)


def test_soft_caps_and_sinks_go_round_the_ring_too():
    run_ranks(2, _softened)


def test_chunks_are_cut_and_restored_in_order():
    whole = torch.arange(24).reshape(1, 24)
    order = SequenceOrder(3, 2)
    assert order.cut(whole, 1).tolist() == [[4, 5, 6, 7, 16, 17, 18, 19]]
    assert order.ranges(1, 8) == [(4, 8), (16, 20)]
    for order in (SequenceOrder(3, 2), SequenceOrder(4), SequenceOrder(2, 2)):
        gathered = torch.cat([order.cut(whole, rank) for rank in range(order.ranks)], 1)
        assert torch.equal(order.restore(gathered), whole)
    # Keys before a query, itself included, are as many on every rank.
    assert {sum(sum(range(*r)) for r in SequenceOrder(4, 2).ranges(rank, 6)) for rank in range(4)} == {69}


def _sums(world):
    group = _join(world)
    whole = torch.arange(2.0 * 24).reshape(2, 24, 1) ** 2
    for chunks in (1, 2):
        order = SequenceOrder(world.size, chunks)
        parts = SequenceParts(order, group)
        mine = order.cut(whole, world.rank).requires_grad_()
        per_chunk = parts.split(mine).sum(2)
        torch.testing.assert_close(parts.join(parts.split(mine)), mine)
        torch.testing.assert_close(parts.sum(per_chunk.sum(0)), whole.sum(1))
        earlier = parts.before(per_chunk)
        starts = [start for start, _ in order.ranges(world.rank, mine.shape[1])]
        torch.testing.assert_close(earlier, torch.stack([whole[:, :start].sum(1) for start in starts]))
        # Each rank's chunks are counted by those after them, on all ranks.
        earlier.sum().backward()
        size = 24 // (world.size * chunks)
        after = [(24 - start) // size - 1 for start in starts]
        expected = torch.tensor(after, dtype=torch.float32).repeat_interleave(size)
        torch.testing.assert_close(mine.grad, expected.expand(2, -1)[..., None])


def test_sums_over_a_sequence_know_its_order():
    run_ranks(2, _sums)
    alone = SequenceParts(SequenceOrder(1), None)
    assert alone.before(torch.ones(1, 2)).tolist() == [[0, 0]]
    assert alone.sum(torch.ones(2)).tolist() == [1, 1]


class _Alive(TorchDispatchMode):
    """Bytes of all tensors that exist at a time, at most, and the largest one."""

    def __init__(self):
        super().__init__()
        self._made, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made.setdefault(id(storage), weakref.ref(storage, lambda _, key=id(storage): self._made.pop(key)))
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(found.nbytes() for ref in self._made.values() if (found := ref()) is not None))
        return result


def _alive(world, length):
    """Peak of forward and backward over `length` positions in all, under a document mask, and the largest tensor."""
    group, found = _join(world), {}
    # What the operation makes inside itself is seen where it is called as the function that it is.
    ring_module._ring_attention = ring_module._ring_attention._init_fn
    documents = (torch.arange(length) // 48)[None]
    rule = CausalMask(queries=length, past=0, documents=documents, window=None, device=torch.device("cpu"))
    ring = SequenceRing(group, SequenceOrder(world.size, 2))
    cores = {
        "ring": RingAttentionCore(AttentionCore(), ring, tile=(16, 16)),
        "ulysses": UlyssesAttentionCore(AttentionCore(), group, tile=(16, 16)),
    }
    for kind, core in cores.items():
        *mine, grad = (torch.randn(1, 4, length // world.size, 8) for _ in range(4))
        with _Alive() as alive:
            core(*(tensor.requires_grad_() for tensor in mine), rule).backward(grad)
        found[kind] = alive.peak, alive.largest
    return found


def test_memory_of_a_rank_grows_with_its_part_of_the_sequence():
    """Twice the ranks halve it, and twice the sequence on twice the ranks needs the same."""
    sizes = ((2, 256), (4, 256), (4, 512))
    results = [run_ranks(ranks, _alive, length)[0] for ranks, length in sizes]
    part = 4 * 4 * 256 // 2 * 8  # bytes of one of the four tensors on one of two ranks
    for kind in ("ring", "ulysses"):
        (half, largest), (quarter, _), (same, _) = (result[kind] for result in results)
        assert quarter < 0.6 * half
        # From three ranks on, what is worked on, what arrives and what leaves are three parts.
        assert same < 1.15 * half
        assert largest <= 3 * part, "queries, keys and values in one message, and never the scores of a part"
        assert half < 18 * part


def test_selective_recomputation_keeps_what_a_ring_gives(monkeypatch):
    calls = []
    attend = ring_module.attend
    monkeypatch.setattr(ring_module, "attend", lambda *args: calls.append(args) or attend(*args))
    tensors, grad, rule = _inputs(ATTENTION["documents"])
    core = RingAttentionCore(AttentionCore(), SequenceRing(None, SequenceOrder(1)))
    for policy, times in (("none", 1), ("selective", 1), ("full", 2)):
        calls.clear()
        mine = [tensor.clone().requires_grad_() for tensor in tensors]
        remat_function(policy)(core, *mine, rule).backward(grad)
        assert len(calls) == times, policy


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_cores_that_a_kind_does_not_know_are_refused(kind):
    class Own(AttentionCore):
        pass

    for core in (Own(), AttentionCore(dropout=0.1)):
        with pytest.raises(LayoutError, match="computes attention itself"):
            check_core(core, kind)
    check_core(AttentionCore(softcap=2.0, sinks=True), kind)


def test_flash_kernels_for_cuda_are_called_by_their_schemas():
    """On fake tensors alone: these kernels have not been run."""
    with FakeTensorMode():
        q, grad = (torch.empty(2, 4, 16, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        k, v = (torch.empty(2, 2, 16, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        scores = Scores(0.125)
        assert uses_kernel(q, v, "causal", scores)
        out, lse = attend(q, k, v, "causal", scores)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, torch.float32, q.shape[:3], torch.float32)
        found = attend_backward(grad, q, k, v, out.to(q.dtype), lse, lse, "causal", scores)
        assert [(tensor.shape, tensor.dtype) for tensor in found] == [(x.shape, torch.float32) for x in (q, k, v)]
