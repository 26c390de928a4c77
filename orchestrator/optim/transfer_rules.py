"""How `optim.transfer` scales each parameter: its initial weights, learning rate, weight decay and epsilon.

Of a matrix [rows, columns] rows are what it writes, columns what it reads. With r the size here over the base's:

| parameter | initial std | AdamW: rate | decay | epsilon |
|---|---|---|---|---|
| embedding, positions | 1 | 1 | 1 | 1 / r(width) |
| output head, whose logits are scaled by 1 / r(width) | 1 | 1 | 1 | 1 / r(width) |
| matrix of a block | 1 / sqrt(r(columns)) | 1 / r(columns) | r(columns) | 1 / r(rows) |
| router, gate of the shared expert | 1 / r(width) | 1 / r(width) | r(width) | 1 |
| norm, bias | 1 | 1 | 1 | 1 / r(its size) |

Decay grows as the rate falls: what a step takes off a weight is their product. The router is an output whose factor is
not in the forward pass but in its weights (table 3 in place of table 8, by the paper's lemma J.1).

CompleteP scales the branches by 1 / r(depth), and so the epsilon of all in the blocks; at alpha = 1 no rate. Matrices
that write to the stream do not shrink with depth beyond the base's.

Muon's update has singular values of 1, times a factor of the matrix's shape. Feature learning asks for sqrt(rows /
columns) (Yang, Simon, Bernstein 2023, arXiv 2310.17813); what that is over the base's, beyond the optimizer's own
factor, scales the rate. Depth leaves it alone, as Adam's.

Sources: arXiv 2203.03466, table 8 and appendix B; `MuAdam` of github.com/microsoft/mup (rate and decay); arXiv
2505.01618, table 1, equation 40, and `configure_optimizers` of github.com/EleutherAI/nanoGPT-mup, branch completep
(decay and epsilon); routers as outputs: arXiv 2508.09752.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.config.schema import ModelConfig, MuonConfig, OptimConfig
from orchestrator.config.transfer import Ratios, ratios
from orchestrator.optim.muon import shape_factor
from orchestrator.sharding.axes import ParameterAxes

_FINITE = ("vocab", "positions", "choices", "balance", "head_dim")  # axes that do not grow with width
_RESIDUAL = (".o.weight", ".down.weight", ".experts.down")  # ends of the names of what writes to the stream


@dataclass(frozen=True)
class Factors:
    """What scales a parameter, each 1 at the base's shape.

    Attributes:
        init: of the standard deviation of its initial weights.
        lr: of its learning rate.
        decay: of its weight decay.
        eps: of Adam's epsilon.
    """

    init: float = 1.0
    lr: float = 1.0
    decay: float = 1.0
    eps: float = 1.0


def transfer_factors(
    optim: OptimConfig,
    model: ModelConfig,
    axes: ParameterAxes,
    shapes: Iterable[tuple[str, tuple[int, ...]]],
    shrunk: float = 1.0,
) -> dict[str, Factors]:
    """Return the factors of each parameter by its name; empty where nothing is transferred.

    Args:
        optim: of the run, checked.
        model: of the run.
        axes: of the parameters, as `logical_axes` gives them.
        shapes: names and global shapes.
        shrunk: by how much the model's own rule makes initial weights that write to the stream smaller than the base's.
    """
    by = ratios(optim, model)
    if by is None:
        return {}
    found = {}
    for name, shape in shapes:
        if name in axes:
            grown = _grown(name, axes[name], by)
            muon = isinstance(optim, MuonConfig) and len(grown) == 2 and name.startswith("layers.")
            adjust = optim.adjust_lr if isinstance(optim, MuonConfig) and muon else None
            found[name] = _factors(name, axes[name], grown, shape, by, shrunk, adjust)
    return found


def _grown(name: str, axes: tuple[str, ...], by: Ratios) -> tuple[float, ...]:
    """Return by how much each dim of a parameter is larger than the base's; experts do not count."""
    mlp = by.experts if ".experts." in name else by.shared if ".shared." in name else by.mlp
    sizes: Mapping[str, float] = {
        **dict.fromkeys(("embed", "norm"), by.width),
        **dict.fromkeys(("heads", "kv_heads"), by.attention),
        "mlp": mlp,
        **dict.fromkeys(_FINITE, 1.0),
    }
    return tuple(sizes[axis] for axis in axes if axis != "experts")


def _factors(
    name: str,
    axes: tuple[str, ...],
    grown: tuple[float, ...],
    shape: tuple[int, ...],
    by: Ratios,
    shrunk: float,
    adjust: str | None,
) -> Factors:
    depth = by.depth if name.startswith("layers.") else 1.0
    if len(grown) < 2:
        return Factors(eps=1.0 / (grown[0] * depth))
    rows, columns = grown
    if axes[0] in ("vocab", "positions"):
        return Factors(eps=1.0 / columns)
    if axes[0] == "choices":
        return Factors(1.0 / columns, 1.0 / columns, columns, 1.0 / depth)
    init = columns**-0.5 * (shrunk if name.endswith(_RESIDUAL) else 1.0)
    if adjust is None:
        return Factors(init, 1.0 / columns, columns, 1.0 / (rows * depth))
    here = (shape[-2], shape[-1])
    base = (here[0] / rows, here[1] / columns)
    rate = math.sqrt(rows / columns) * shape_factor(adjust, base) / shape_factor(adjust, here)
    return Factors(init, rate, 1.0 / rate)
