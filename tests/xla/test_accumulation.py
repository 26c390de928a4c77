"""What a device holds of the gradients between the micro-batches of a step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from orchestrator.config.compose import compose
from orchestrator.data.sequences import blank_batch
from orchestrator.distributed.world import World
from orchestrator.strategies.parallel_strategy import local_parameters
from orchestrator.training.job import make_strategy, make_trainer
from orchestrator.training.module import LanguageModule
from tests.lab.runs import resolved_run

WORDS = ["hardware=tpu", "hardware.simulate=4", "model.vocab_size=512", "train.seq_len=64", "train.micro_batch_size=1"]
WORDS += ["train.global_batch_tokens=1024"]


@pytest.mark.parametrize("layout", ["fsdp=4", "replicate=2 fsdp=2", "fsdp=2 tensor=2"])
def test_they_are_cut_as_the_parameters_are(layout):
    words = [*WORDS, *(f"layout.{degree}" for degree in layout.split())]
    environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.xla.test_accumulation", *words]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    steps = json.loads(result.stdout.splitlines()[-1])
    assert len(steps) >= 3
    assert all(gradients == parameters for gradients, parameters in steps), steps


def main(words: list[str]) -> None:
    """Print the elements that one device holds after each micro-batch: of the gradients, of the parameters."""
    import torch_xla.core.xla_model as xm

    config = compose(words).config
    resolved = resolved_run(config, World(), vocab_size=int(config.model.vocab_size))
    config, parallel = resolved.config, make_strategy(resolved, resolved.target(), World())
    parallel.join()
    module = LanguageModule(config, parallel=parallel)
    module.configure_model()
    parallel.initialize(module.model, config.seed)
    module.make_optimizer()
    around, held = parallel.backward_context, []

    @contextmanager
    def look(model: Any, last: bool) -> Iterator[None]:
        with around(model, last):
            yield
        if last:
            return
        xm.wait_device_ops()
        parameters = [parameter for _, parameter in local_parameters(model)]
        held.append([sum(map(_on_a_device, tensors)) for tensors in ([p.grad for p in parameters], parameters)])

    parallel.backward_context = look  # type: ignore[method-assign]
    sequences = config.train.global_batch_tokens // config.train.seq_len
    batch = blank_batch(sequences, config.train.seq_len, config.data.document_mask)
    make_trainer(parallel, [], deterministic=False).fit(module, iter([batch]))
    print(json.dumps(held))


def _on_a_device(tensor: Any) -> int:
    import torch_xla.distributed.spmd as xs

    return int(xs.wrap_if_sharded(tensor.data).local_shards[0].unpadded_data.numel())


if __name__ == "__main__":
    main(sys.argv[1:])
