"""What a rank holds of the gradients between the micro-batches of a step, and what it sends for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.data.sequences import blank_batch
from orchestrator.hardware.target_table import get_target
from orchestrator.models.decoder import Decoder
from orchestrator.rehearsal.traced_strategy import is_split
from orchestrator.strategies.parallel_strategy import local_parameters
from orchestrator.training.job import make_strategy, make_trainer
from orchestrator.training.module import LanguageModule
from tests.lab.ranks import run_ranks
from tests.lab.runs import resolved_run, small_config

# Shards of the parameters, copies of the model, ranks.
LAYOUTS = {
    "layout.fsdp=4": (4, 1, 4),
    "layout.replicate=2,layout.fsdp=2": (2, 2, 4),
    "layout.context=2": (2, 1, 2),
    "layout.replicate=2,layout.fsdp=1": (1, 2, 2),
}
FEW = 64  # elements: what shards are filled up with, and scalars that ranks sum


@dataclass
class Seen:
    """Of one rank and step, in elements: gradients after each micro-batch, what was reduced, the parameters."""

    held: list[int]
    scattered: int
    summed: int
    owned: int
    whole: int


@pytest.mark.parametrize("layout", LAYOUTS)
def test_between_micro_batches_a_rank_holds_its_shard_of_the_gradients_or_all_of_them(tmp_path, layout):
    shards, copies, size = LAYOUTS[layout]

    def step(when: str) -> list[Seen]:
        words = ["train.global_batch_tokens=1024", "train.micro_batch_size=1", f"train.reduce_gradients={when}"]
        return run_ranks(size, _step, to_dict(small_config(tmp_path, *words, *layout.split(","))))

    for each, last in zip(step("each"), step("last"), strict=True):
        assert each.whole == pytest.approx(shards * each.owned, abs=shards * FEW)
        assert len(each.held) == len(last.held) >= 4
        assert max(each.held) <= each.owned + FEW
        assert min(last.held[:-1]) == last.whole
        assert last.held[-1] <= last.owned + FEW
        for seen, times in ((each, len(each.held) if shards > 1 else 1), (last, 1)):
            assert seen.scattered == pytest.approx(times * seen.owned if shards > 1 else 0, abs=times * FEW)
            assert seen.summed == pytest.approx(seen.owned if copies > 1 else 0, abs=FEW), "copies are summed once"


def _step(world: Any, data: dict[str, Any]) -> Seen:
    resolved = resolved_run(from_dict(RunConfig, data), world, vocab_size=257)
    config, parallel = resolved.config, make_strategy(resolved, get_target("cpu"), world)
    parallel.join()
    module = LanguageModule(config, parallel=parallel)
    module.configure_model()
    model = module.model
    parallel.initialize(model, config.seed)
    module.make_optimizer()
    held, reductions, around = [], _Reductions(), parallel.backward_context

    @contextmanager
    def look(model: Decoder, last: bool) -> Iterator[None]:
        with around(model, last):
            yield
        held.append(_gradients(model))

    parallel.backward_context = look
    sequences = config.train.global_batch_tokens // config.train.seq_len // parallel.data_share[1]
    batch = blank_batch(sequences, config.train.seq_len, document_mask=True)
    with reductions:
        make_trainer(parallel, [], deterministic=False).fit(module, iter([batch]))
    owned = sum(parameter.to_local().numel() for _, parameter in local_parameters(model))
    whole = sum(parameter.numel() for _, parameter in local_parameters(model))
    parallel.leave()
    return Seen(held, reductions.scattered, reductions.summed, owned, whole)


def _gradients(model: Decoder) -> int:
    """Elements of all gradients that FSDP keeps, whole and reduced."""
    found = [parameter.grad.to_local() for _, parameter in local_parameters(model) if parameter.grad is not None]
    for module in model.modules():
        for group in module._get_fsdp_state()._fsdp_param_groups if isinstance(module, FSDPModule) else ():
            found.append(group._partial_reduce_output)  # summed over the shard group and not yet over the copies
            for part in group.fsdp_params:
                found += [part.unsharded_accumulated_grad, part.unsharded_param.grad]
    return sum(part.numel() for part in found if part is not None)


class _Reductions(TorchDispatchMode):
    """Elements that reductions leave on this rank."""

    scattered = summed = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_split(types):
            return NotImplemented  # it comes back as what it does to the local parts
        name = str(func).partition(".")[2].partition(".")[0]
        if name == "_reduce_scatter_base_":
            self.scattered += args[0].numel()
        elif name == "allreduce_":
            self.summed += sum(tensor.numel() for tensor in args[0])
        return func(*args, **(kwargs or {}))
