"""Record the reference of all certificates: the small training on a CPU, in fp32, by one process with one thread.

Beside it stands what justifies the tolerances: how far the same training is from itself in fp64 (rounding alone), and
how far with matrix products rounded to bf16 (what a certificate has to notice).

    python -m scripts.record_certificate
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from orchestrator.certify.fixture import STEPS, WORDS, batch
from orchestrator.certify.recorded import PATH, batches_digest
from orchestrator.certify.trial import Trial
from orchestrator.config.compose import compose
from orchestrator.distributed.world import World
from orchestrator.hardware.target_table import resolve
from orchestrator.models.decoder import Decoder
from orchestrator.models.init import draw_slice
from orchestrator.optim.schedule import learning_rate
from orchestrator.runs.provenance import software
from orchestrator.training.job import make_strategy
from orchestrator.training.resolved import Resolved, resolve_run


def main() -> None:
    torch.set_num_threads(1)
    config = compose([*WORDS, "hardware=cpu", "hardware.devices=1", "hardware.threads=1", "layout.fsdp=1"]).config
    target = resolve(config.hardware)
    resolved = resolve_run(config, target, 1, 0)
    parallel = make_strategy(resolved, target, World())
    parallel.join()
    trial = Trial(resolved, parallel)
    weights = {
        place[0].removeprefix("model."): hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for place, tensor in trial.state().items()
        if place[0].startswith("model.")
    }
    trial.run(STEPS)
    parallel.leave()
    double = plain_loop(resolved, torch.float64)
    with rounded_products():
        rounded = plain_loop(resolved, torch.float32)
    single = (trial.losses, trial.norms)
    data = {
        "losses": trial.losses,
        "norms": trial.norms,
        "weights": weights,
        "batches": batches_digest(),
        "fp64": distance(single, double),
        "bf16": distance(single, rounded),
        "software": software(),
    }
    PATH.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {PATH}: losses {trial.losses[0]:.4f} to {trial.losses[-1]:.4f}")
    print(f"from fp64 {data['fp64']}, from bf16 {data['bf16']}")


def plain_loop(resolved: Resolved, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    """The training as a loop of a few lines on plain tensors."""
    config = resolved.config
    model = Decoder(config.model)
    for name, init in model.initializers().items():
        parameter = model.get_parameter(name)
        whole = tuple(slice(0, size) for size in parameter.shape)
        parameter.data = draw_slice(init, name, config.seed, tuple(parameter.shape), whole).to(dtype)
    model.to(dtype)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": config.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas, eps=config.optim.eps)
    losses, norms = [], []
    for step in range(STEPS):
        tensors = {name: torch.from_numpy(value) for name, value in batch(step).items()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, config.optim.lr, config.optim.schedule)
        loss = model(**tensors) / tensors["targets"].numel()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms


class _Rounded(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (
            torch.nn.functional.linear,
            torch.matmul,
            torch.Tensor.matmul,
            torch.nn.functional.scaled_dot_product_attention,
        ):
            args = [
                a.bfloat16().to(a.dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
            ]
        return function(*args, **(kwargs or {}))


@contextmanager
def rounded_products() -> Iterator[None]:
    """Within it what is multiplied is rounded to bf16 first, as matrix units do that are told nothing else."""
    with _Rounded():
        yield


def distance(one: tuple[list[float], list[float]], other: tuple[list[float], list[float]]) -> dict[str, float]:
    """The largest relative difference of losses and of norms."""
    names = ("losses", "norms")
    return {
        name: max(abs(a - b) / abs(a) for a, b in zip(mine, theirs, strict=True))
        for name, mine, theirs in zip(names, one, other, strict=True)
    }


if __name__ == "__main__":
    main()
