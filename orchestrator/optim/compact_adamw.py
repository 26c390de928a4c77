"""AdamW whose moments are kept in bf16 or in 8 bits; what is computed is fp32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from orchestrator.constants import CODE_BLOCK, SCALE
from orchestrator.errors import LayoutError
from orchestrator.optim.rounding import CODES, draw_bits, to_bf16
from orchestrator.optim.steps import GuardedOptimizer, store
from orchestrator.sharding.parts import Parts

_MOMENTS = tuple(CODES)
_ELEMENTS = 1 << 22  # that are updated at one time, whose moments exist in fp32


class CompactAdamW(GuardedOptimizer):
    """`torch.optim.AdamW`, with the moments of matrices rounded by chance (`optim.rounding`); vectors keep fp32.

    State: `step`, `exp_avg`, `exp_avg_sq`; in 8 bits also `exp_avg_scale` and `exp_avg_sq_scale`, whose last dim counts
    blocks. A matrix whose last dim is no multiple of a block keeps fp32.

    Args:
        params: parameters, or groups of them.
        parts: how they are split.
        kept: in bf16 or int8.
        keys: 32 bits for each parameter whose moments are rounded: what its rounding is drawn by.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the root of the second.
        weight_decay: decoupled.

    Raises:
        LayoutError: the tensor axis cuts a matrix within a block.
    """

    blocks = MappingProxyType({f"{moment}{SCALE}": CODE_BLOCK for moment in _MOMENTS})

    def __init__(
        self,
        params: Iterable[Any],
        parts: Parts,
        kept: Literal["bf16", "int8"],
        keys: Mapping[Tensor, int],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._parts, self._kept, self._keys = parts, kept, keys
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = self._make_state(parameter)

    def _make_state(self, parameter: Tensor) -> dict[str, Tensor]:
        part = self._parts.local(parameter)
        state = {"step": torch.zeros((), dtype=torch.float32, device=part.device)}
        whole = self._parts.shape(parameter)
        coded = self._kept == "int8" and parameter in self._keys and whole[-1] % CODE_BLOCK == 0
        if coded and part.shape[-1] % CODE_BLOCK:
            raise LayoutError(
                "the tensor axis cuts a matrix within a block of its 8-bit optimizer state",
                got=f"a part of {part.shape[-1]} columns of {list(whole)}",
                allowed=f"a multiple of {CODE_BLOCK}",
                fix="set optim.state_dtype=bf16, or another layout.tensor",
            )
        for moment in _MOMENTS:
            if coded:
                state[moment] = torch.zeros(part.shape, dtype=CODES[moment].dtype, device=part.device)
                scales = (*part.shape[:-1], part.shape[-1] // CODE_BLOCK)
                state[f"{moment}{SCALE}"] = torch.zeros(scales, dtype=torch.float32, device=part.device)
            else:
                rounded = self._kept == "bf16" and parameter in self._keys
                dtype = torch.bfloat16 if rounded else torch.float32
                state[moment] = torch.zeros(part.shape, dtype=dtype, device=part.device)
        return state

    def update(self) -> None:
        """Update the parameters that have a gradient."""
        taken = 1.0 if self.bad is None else (~self.bad).float()
        for group in self.param_groups:
            for parameter in self.with_gradients(group):
                step = self.state[parameter]["step"]
                step += taken
                for start, stop in self._stretches(self._parts.local(parameter)):
                    self._update(group, parameter, start, stop)

    @staticmethod
    def _stretches(part: Tensor) -> Iterator[tuple[int, int]]:
        """Cut a part along dim 0, so that little of it exists in fp32 at one time."""
        rows = part.shape[0]
        if not part.numel():
            return
        size = rows
        if part.device.type != "xla":  # there the compiler decides, and more graph is more to compile
            size = max(1, _ELEMENTS // (part.numel() // rows))
        for start in range(0, rows, size):
            yield start, min(start + size, rows)

    def _update(self, group: dict[str, Any], parameter: Tensor, start: int, stop: int) -> None:
        state, local = self.state[parameter], self._parts.local
        gradient = local(parameter.grad)[start:stop]  # type: ignore[arg-type]
        beta1, beta2 = group["betas"]
        first = self._read(state, "exp_avg", start, stop).lerp(gradient, 1 - beta1)
        second = self._read(state, "exp_avg_sq", start, stop)
        second = second * beta2 + gradient.square() * (1 - beta2)
        step = state["step"].clamp(min=1.0)  # of a first step that is called off nothing is kept
        rate = group["lr"] / _missing(beta1, step)
        root = second.sqrt() / _missing(beta2, step).sqrt()
        weight = local(parameter)[start:stop]
        decayed = weight * (1 - group["lr"] * group["weight_decay"])
        store(weight, decayed - rate * first / (root + group["eps"]), self.bad)
        self._write(parameter, {"exp_avg": first, "exp_avg_sq": second}, start, stop)

    def _read(self, state: dict[str, Tensor], moment: str, start: int, stop: int) -> Tensor:
        value = self._parts.local(state[moment])[start:stop]
        if (scale := state.get(f"{moment}{SCALE}")) is not None:
            return CODES[moment].decode(value, self._parts.local(scale)[start:stop])
        return value.float()

    def _write(self, parameter: Tensor, moments: dict[str, Tensor], start: int, stop: int) -> None:
        state, local = self.state[parameter], self._parts.local
        bits = None
        if parameter in self._keys:
            first, *rest = self._parts.start(parameter)
            shape = next(iter(moments.values())).shape
            whole = self._parts.shape(parameter)
            bits = draw_bits(self._keys[parameter], state["step"], (first + start, *rest), shape, whole)
        for number, (moment, value) in enumerate(moments.items()):
            target = local(state[moment])[start:stop]
            if bits is None or target.dtype == torch.float32:
                store(target, value, self.bad)
                continue
            drawn = bits & 0xFFFF if number == 0 else bits >> 16
            if target.dtype == torch.bfloat16:
                store(target, to_bf16(value, drawn), self.bad)
            else:
                code, scale = CODES[moment].encode(value, drawn)
                store(target, code, self.bad)
                store(local(state[f"{moment}{SCALE}"])[start:stop], scale, self.bad)


def _missing(beta: float, step: Tensor) -> Tensor:
    """Return 1 - beta^step: the share of a moment that its zero at the start does not have."""
    return -torch.expm1(step * math.log(beta)) if beta > 0 else torch.ones_like(step)
