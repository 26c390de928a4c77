"""Attention in blocks of queries is attention: the same numbers and gradients, whatever is hidden from a query."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from orchestrator.config.schema import ModelConfig
from orchestrator.models.attention import AttentionCore, BlockedAttentionCore
from orchestrator.models.decoder import Decoder
from orchestrator.models.mask import CausalMask
from orchestrator.models.protocol import attend_in_blocks

BATCH, LENGTH, WIDTH = 2, 23, 8


def _documents() -> torch.Tensor:
    return torch.tensor([[0] * 5 + [1] * 9 + [2] * 9, [0] * 16 + [1] * 7])


def _inputs(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    return [torch.randn(BATCH, h, LENGTH, WIDTH, generator=generator, dtype=torch.float64) for h in heads]


def _keep(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def _both(documents, window, kv_heads, block):
    """Result and gradients of a core that attends at once, and of one that does so in blocks."""
    mask = CausalMask(queries=LENGTH, past=0, documents=documents, window=window, device=torch.device("cpu"))
    results = []
    for core, given in (
        (AttentionCore(), mask.whole()),
        (BlockedAttentionCore(AttentionCore(), block, _keep), mask),
    ):
        tensors = [tensor.requires_grad_() for tensor in _inputs(kv_heads)]
        out = core(*tensors, given)
        out.square().sum().backward()
        results.append([out, *(tensor.grad for tensor in tensors)])
    return results


@pytest.mark.parametrize("documents", [None, _documents()], ids=["one document", "several documents"])
@pytest.mark.parametrize("window", [None, 3, 11])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("block", [1, 5, 8, 22])
def test_blocks_give_what_the_whole_gives(documents, window, kv_heads, block):
    whole, blocks = _both(documents, window, kv_heads, block)
    for one, other in zip(whole, blocks, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


def test_backward_drops_what_forward_dropped():
    """The result is linear in the values: with the same weights dropped, <gradient, values> is the result."""
    core = BlockedAttentionCore(AttentionCore(dropout=0.5), 5, _keep)
    mask = CausalMask(queries=LENGTH, past=0, documents=_documents(), window=None, device=torch.device("cpu"))
    q, k, v = (tensor.requires_grad_() for tensor in _inputs(4))
    torch.manual_seed(0)
    out = core(q, k, v, mask)
    assert not torch.allclose(out, core.eval()(q, k, v, mask))
    core.train()
    out.square().sum().backward()
    torch.testing.assert_close((v.grad * v).sum(), 2 * out.square().sum())


def test_a_short_sequence_is_not_cut(monkeypatch):
    def refuse(*unused):
        raise AssertionError("computed again")

    core = BlockedAttentionCore(AttentionCore(), LENGTH, refuse)
    mask = CausalMask(queries=LENGTH, past=0, documents=None, window=None, device=torch.device("cpu"))
    q, k, v = _inputs(4)
    assert torch.equal(core(q, k, v, mask), AttentionCore()(q, k, v, None))


def test_no_scores_beyond_a_block_exist():
    """The largest tensor that any operation makes, forward and backward, is a strip of scores."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    mask = CausalMask(queries=LENGTH, past=0, documents=_documents(), window=None, device=torch.device("cpu"))
    tensors = [tensor.requires_grad_() for tensor in _inputs(4)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), Largest() as largest:
        BlockedAttentionCore(AttentionCore(), 4, _keep)(*tensors, mask).sum().backward()
    assert largest.elements <= max(BATCH * 4 * LENGTH * 4, BATCH * 4 * LENGTH * WIDTH)


@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_a_model_that_attends_in_blocks_is_the_same_model(positions):
    config = ModelConfig(
        vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, max_seq_len=64, positions=positions
    )
    torch.manual_seed(0)
    model = Decoder(config)
    tokens = torch.randint(0, 64, (BATCH, LENGTH))
    arguments = {"tokens": tokens, "positions": torch.arange(LENGTH).expand(BATCH, -1), "documents": _documents()}
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    whole = model(**arguments)
    names = list(model.state_dict())
    attend_in_blocks(model, 4, _keep)
    torch.testing.assert_close(model(**arguments), whole, rtol=1e-5, atol=1e-6)
    assert list(model.state_dict()) == names, "a checkpoint does not know of it"
