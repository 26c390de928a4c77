"""The cases of the devices by themselves, without a strategy's sharding: what each computes alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from orchestrator.certify.fixture import batch
from orchestrator.certify.kinds import PRODUCT_TERMS
from orchestrator.certify.measuring import Found, gather
from orchestrator.models.decoder import Decoder
from orchestrator.models.init import draw_slice
from orchestrator.strategies.parallel_strategy import ParallelStrategy
from orchestrator.training.resolved import Resolved

_ROWS, _COLUMNS = 256, 128
# Relative errors of sums of some hundred products, by the format that the factors were rounded to.
_FORMATS = ((3e-6, "fp32"), (5e-5, "bf16 in three products"), (1e-3, "TF32"), (1e-2, "bf16"), (1.0, "less than bf16"))


def matrix_products(parallel: ParallelStrategy) -> Found:
    """Measure the error of fp32 matrix products on this process's device, in the context of a forward pass.

    Args:
        parallel: the strategy, joined.

    Returns:
        The largest relative error of the product, of its two backward products and of a batched one.
    """
    generator = np.random.Generator(np.random.PCG64(parallel.rank))
    left, right, given = (
        generator.standard_normal(shape, dtype=np.float32)
        for shape in ((_ROWS, PRODUCT_TERMS), (PRODUCT_TERMS, PRODUCT_TERMS), (_ROWS, PRODUCT_TERMS))
    )
    device = parallel.root_device
    x, weight = (torch.from_numpy(array).to(device).requires_grad_() for array in (left, right))
    with parallel.forward_context():
        y = F.linear(x, weight)
        pairs = torch.matmul(x.reshape(4, -1, PRODUCT_TERMS), weight.t())
    y.backward(torch.from_numpy(given).to(device).to(y.dtype))
    parallel.finish_step()
    wide = [array.astype(np.float64) for array in (left, right, given)]
    exact = {
        "forward": (y, wide[0] @ wide[1].T),
        "batched": (pairs.reshape(_ROWS, -1), wide[0] @ wide[1].T),
        "backward to the input": (x.grad, wide[2] @ wide[1]),
    }
    errors = {name: _error(value, wanted) for name, (value, wanted) in exact.items()}
    # Its sums have as many terms as there are rows.
    errors["backward to the weight"] = _error(weight.grad, wide[2].T @ wide[0])
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], f"{worst}, {_format(errors[worst])}"


def _error(value: Any, wanted: np.ndarray) -> float:
    found = value.detach().float().cpu().numpy().astype(np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _format(error: float) -> str:
    return next((f"as {name}" for limit, name in _FORMATS if error <= limit), "no product at all")


def each_device(resolved: Resolved, parallel: ParallelStrategy) -> Found:
    """Compare the bits of loss and gradients that each process's device computes alone. All ranks call it together.

    Args:
        resolved: the training.
        parallel: the strategy, joined, with one device to a process.
    """
    config = replace(resolved.config.model)
    model = Decoder(config)
    with torch.no_grad():
        for name, init in model.initializers().items():
            parameter = model.get_parameter(name)
            whole = tuple(slice(0, size) for size in parameter.shape)
            parameter.copy_(draw_slice(init, name, resolved.config.seed, tuple(parameter.shape), whole))
    model.to(parallel.root_device)
    rows = {name: torch.from_numpy(array).to(parallel.root_device) for name, array in batch(0).items()}
    with parallel.forward_context():
        loss = model(**rows)
    loss.backward()
    parallel.finish_step()
    found = hashlib.sha256(loss.detach().cpu().numpy().tobytes())
    for _, parameter in model.named_parameters():
        if parameter.grad is not None:
            found.update(parameter.grad.cpu().numpy().tobytes())
    told = gather(parallel, found.hexdigest())
    others = [rank for rank, digest in enumerate(told) if digest != told[0]]
    return len(others), f"processes {', '.join(map(str, others[:8]))}" if others else ""
