"""The chunked cross-entropy against torch's own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.models.loss import VocabShard, ZLoss, chunked_cross_entropy, chunked_token_losses

N, D, V = 37, 8, 53


def problem(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator) * scale
    weight = torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[[0, 5, 6, 36]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    return (loss.detach(), *torch.autograd.grad(loss / 7.0, (hidden, weight)))


@pytest.mark.parametrize("chunk_tokens", [1, 8, 36, 37, 1000])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_loss_and_gradients(chunk_tokens: int, scale: float) -> None:
    hidden, weight, targets = problem(scale)
    expected, d_hidden, d_weight = reference(hidden, weight, targets)
    loss = chunked_cross_entropy(hidden, weight, targets, chunk_tokens)
    (loss / 7.0).backward()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(hidden.grad, d_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, d_weight, rtol=1e-4, atol=1e-5 * scale)


def test_without_gradients() -> None:
    hidden, weight, targets = problem()
    expected = reference(hidden, weight, targets)[0]
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets, 10)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_only_the_gradients_that_are_wanted() -> None:
    hidden, weight, targets = problem()
    d_hidden = reference(hidden, weight, targets)[1]
    chunked_cross_entropy(hidden, weight.detach(), targets, 10).div(7.0).backward()
    torch.testing.assert_close(hidden.grad, d_hidden, rtol=1e-5, atol=1e-6)
    chunked_cross_entropy(hidden.detach(), weight, targets, 10).backward()
    assert weight.grad is not None


def test_no_target_at_all() -> None:
    hidden, weight, _ = problem()
    loss = chunked_cross_entropy(hidden, weight, torch.full((N,), -100), 10)
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_never_more_logits_than_a_chunk() -> None:
    hidden, weight, targets = problem()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 2 and out.shape[-1] == V:
                largest = max(largest, out.shape[0])
            return out

    with Watch():
        chunked_cross_entropy(hidden, weight, targets, 10).backward()
    assert largest == 10


def test_bf16_products_with_an_fp32_weight_gradient() -> None:
    hidden, weight, targets = problem()
    expected = reference(hidden, weight, targets)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = chunked_cross_entropy(low, weight, targets, 10)
    (loss / 7.0).backward()
    assert low.grad is not None
    assert weight.grad is not None
    assert (loss.dtype, low.grad.dtype, weight.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(weight.grad, expected[2], rtol=0.05, atol=0.05)


def test_second_backward_is_refused() -> None:
    loss = chunked_cross_entropy(*problem(), 10)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once per forward"):
        loss.backward()


def test_chunk_must_be_positive() -> None:
    with pytest.raises(ValueError, match="chunk_tokens"):
        chunked_cross_entropy(*problem(), 0)


class Ranks:
    """All-reduces between threads."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count, timeout=30)
        self.given: list[Tensor | None] = [None] * count

    def reduce(self, rank: int, combine: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def all_reduce(t: Tensor) -> Tensor:
            self.given[rank] = t.clone()
            self.barrier.wait()
            result = combine(torch.stack([g for g in self.given if g is not None]))
            self.barrier.wait()
            return result

        return all_reduce


@pytest.mark.parametrize("cuts", [(0, 20, 53), (0, 18, 36, 53)])
def test_sharded_vocabulary(cuts: tuple[int, ...]) -> None:
    hidden, weight, targets = problem(10.0)
    expected, d_hidden, d_weight = reference(hidden, weight, targets)
    count = len(cuts) - 1
    ranks = Ranks(count)
    results: list[tuple[Tensor, Tensor, Tensor] | None] = [None] * count

    def run(rank: int) -> None:
        shard = VocabShard(
            cuts[rank],
            ranks.reduce(rank, lambda t: t.amax(0)),
            ranks.reduce(rank, lambda t: t.sum(0)),
        )
        own = hidden.detach().clone().requires_grad_()
        rows = weight.detach()[cuts[rank] : cuts[rank + 1]].clone().requires_grad_()
        loss = chunked_cross_entropy(own, rows, targets, 10, shard)
        results[rank] = (loss.detach(), *torch.autograd.grad(loss / 7.0, (own, rows)))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [result for result in results if result is not None]
    assert len(done) == count
    for loss, _, _ in done:
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(sum(part for _, part, _ in done), d_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([part for _, _, part in done]), d_weight, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_each_target_has_a_factor_and_the_normaliser_a_penalty(softcap: float | None, coefficient: float) -> None:
    hidden, weight, targets = problem(3.0)
    weights = torch.randn(N, generator=torch.Generator().manual_seed(1))
    weights[targets == -100] = torch.nan  # counts for nothing
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    penalties = coefficient * logits.logsumexp(-1).square() * weights.nan_to_num()
    wanted = (losses * weights.nan_to_num()).sum() + penalties.sum()
    expected = torch.autograd.grad(wanted, (hidden, weight))
    penalty = ZLoss(coefficient)
    loss = chunked_cross_entropy(hidden, weight, targets, 10, softcap=softcap, weights=weights, penalty=penalty)
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(penalty.take(), penalties.sum().detach(), rtol=1e-5, atol=1e-5)
    assert penalty.take() is None
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_likeliest_token_is_the_first_of_equal_ones() -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [-1.0]])
    hidden = torch.ones(5, 1)
    losses, greedy = chunked_token_losses(hidden, weight, torch.tensor([0, 1, 2, 3, -100]), 2)
    assert greedy.tolist() == [False, True, False, False, False]
    normaliser = torch.tensor([1.0, 2.0, 2.0, -1.0]).logsumexp(0)
    torch.testing.assert_close(
        losses, torch.stack([normaliser - 1, normaliser - 2, normaliser - 2, normaliser + 1, 0 * normaliser])
    )
