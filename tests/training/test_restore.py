"""Restoring together: what one process alone cannot read leaves none of them waiting."""

from __future__ import annotations

import pytest
import torch

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from tests.lab.checkpoints import write_whole
from tests.lab.ranks import run_ranks
from tests.lab.runs import resolved_run, small_config


def _open(world, data, path, blind):
    """The step of the checkpoint that this rank has opened, or the error; rank `blind` cannot read its state."""
    from orchestrator.checkpoint.signing import Trust
    from orchestrator.errors import CheckpointError, DamagedError
    from orchestrator.training import restore
    from orchestrator.training.job import make_strategy

    resolved = resolved_run(from_dict(RunConfig, data), world)
    parallel = make_strategy(resolved, resolved.target(), world)
    parallel.join()

    class Blind(restore.Checkpoint):
        def state(self):
            raise CheckpointError("this rank sees nothing", got=path)

    if world.rank == blind:
        restore.Checkpoint = Blind
    try:
        return restore.open_together(path, Trust(), parallel).step
    except DamagedError as error:
        return str(error)
    finally:
        parallel.leave()


@pytest.mark.parametrize("blind", [None, 0, 1])
def test_all_open_it_or_none(tmp_path, blind):
    path = write_whole(tmp_path, {"model.a": torch.ones(3)}, step=7, state={"data": {}})
    config = small_config(tmp_path, "hardware.devices=2", "layout.fsdp=2")
    found = run_ranks(2, _open, to_dict(config), path, blind)
    if blind is None:
        assert found == [7, 7]
    else:
        said = ["this rank sees nothing" if rank == blind else "another process cannot read" for rank in range(2)]
        assert [text in answer for text, answer in zip(said, found, strict=True)] == [True, True], found
