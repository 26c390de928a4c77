"""Silent data corruption: devices that must hold the same bits are compared, and what a bad one wrote is set aside."""

from __future__ import annotations

import json
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from orchestrator.checkpoint.run_checkpoints import newest_valid
from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import RunConfig
from orchestrator.distributed.lane import Lane
from orchestrator.errors import CheckpointError, RunFailedError
from orchestrator.runs import resume
from orchestrator.strategies.replicas import HeldPart, bit_sums, compare
from orchestrator.strategies.sharded_parts import local_part
from orchestrator.training.module import LanguageModule
from tests.lab.ranks import run_ranks
from tests.lab.runs import checkpoint, resolved_run, small_config, work_ranks
from tests.lab.slow import cases

WORDS = ["model.dim=32", "train.seq_len=32", "train.global_batch_tokens=384", "train.eval_tokens=128"]
WORDS += ["train.max_steps=7", "checkpoint.every_steps=1", "checkpoint.keep_last=1", "train.check_replicas_every=2"]
LAYOUTS = {
    "replicate2": (2, ["layout.replicate=2", "layout.fsdp=1"]),
    "replicate3": (3, ["layout.replicate=3", "layout.fsdp=1"]),
    "tensor2": (2, ["layout.tensor=2", "layout.fsdp=1"]),
    "fsdp2_context2": (4, ["layout.fsdp=2", "layout.context=2"]),
    "replicate2_fsdp2": (4, ["layout.replicate=2", "layout.fsdp=2"]),
    "replicate2_pipeline2": (4, ["layout.replicate=2", "layout.pipeline=2", "layout.fsdp=1"]),
    "fsdp2": (2, ["layout.fsdp=2"]),
}


def test_sums_see_every_flipped_bit_and_a_majority_names_the_device():
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.float64, torch.int64, torch.bool):
        tensor = torch.arange(12).to(dtype).reshape(3, 4)
        assert bit_sums([tensor]) == bit_sums([tensor.t()])
    numbers = torch.randn(64)
    for bit in range(32):
        flipped = numbers.clone()
        flipped.view(torch.int32)[5] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert bit_sums([numbers]) != bit_sums([flipped])

    def part(device, data):
        return HeldPart("model.norm.weight", (slice(0, 64),), device, data)

    lane = Lane(0, 1)
    assert not compare([part("a", numbers), part("b", numbers)], lane, "here").suspects
    found = compare([part("a", numbers), part("b", flipped), part("c", numbers)], lane, "here")
    assert (found.suspects, found.certain) == (("rank 0 (here, b)",), True)
    found = compare([part("a", numbers), part("b", flipped)], lane, "here")
    assert (len(found.suspects), found.certain) == (2, False)
    assert compare([part("a", numbers)], lane, "here").compared == 0


@contextmanager
def flipped_bit(step, tensor, here):
    """Within it a bit of this rank's part of a weight flips after the update of `step`."""
    training_step = LanguageModule.training_step

    def spoil(self, batch, index):
        training_step(self, batch, index)
        for name, parameter in self.model.named_parameters():
            if here and self.step == step and name == tensor:
                local_part(parameter).view(-1)[:1].view(torch.int32).bitwise_xor_(
                    1 << 12
                )  # the last bit may be rounded away

    with mock.patch.object(LanguageModule, "training_step", spoil):
        yield


def _rank(world, data, run_dir, tensor, rank):
    from orchestrator.launch.run import work

    with flipped_bit(5, tensor, world.rank == rank):
        try:
            return work(resolved_run(from_dict(RunConfig, data), world, run_dir), world)
        except RunFailedError as error:
            return str(error)


CASES = [
    ("replicate3", "layers.0.mlp.up.weight", True),
    ("tensor2", "layers.0.mlp_norm.weight", False),
    ("replicate2", "embed.weight", False),
    ("replicate2_pipeline2", "layers.1.attn.q.weight", False),
]


@pytest.mark.parametrize(("layout", "tensor", "certain"), cases(CASES, quick=CASES[:2]))
def test_a_flipped_bit_stops_the_run_names_the_device_and_taints_no_checkpoint(tmp_path, layout, tensor, certain):
    size, degrees = LAYOUTS[layout]
    config, run_dir = small_config(tmp_path, *WORDS, *degrees), tmp_path / "run"
    run_dir.mkdir()
    bad = size - 1
    said = run_ranks(size, _rank, to_dict(config), run_dir, tensor, bad)
    assert all("one of them computes or stores wrongly" in text for text in said)
    assert f"after step 6: model.{tensor}" in said[0] or "model." in said[0]
    leg = json.loads((run_dir / "run.json").read_text())["legs"][-1]["corrupted"]
    assert (leg["step"], leg["good_step"], leg["certain"]) == (6, 4, certain)
    named = [device.partition(" (")[0] for device in leg["suspects"]]
    assert f"rank {bad}" in named
    assert named == [f"rank {bad}"] if certain else len(named) == 2

    # Step 5 was saved between the checks; the one before it was kept though keep_last=1.
    folder = run_dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000004", "step-00000005"]
    told = []
    assert newest_valid(folder, True, told.append) == checkpoint(run_dir, 4)
    assert "set aside: written with bits that devices did not hold alike" in told[0]
    with pytest.raises(CheckpointError, match="this checkpoint was set aside"):
        resume.find(str(checkpoint(run_dir, 5)), "runs", True, told.append)
    if certain:
        assert work_ranks(config, size, run_dir, checkpoint(run_dir, 4)) == [0] * size
        assert newest_valid(folder, True, told.append) == checkpoint(run_dir, 7)


@pytest.mark.parametrize("layout", cases(list(LAYOUTS), quick=["fsdp2"]))
def test_good_devices_never_differ_and_where_nothing_is_alike_it_is_said(tmp_path, layout, capfd):
    size, degrees = LAYOUTS[layout]
    config = small_config(tmp_path, *WORDS, *degrees, "train.check_replicas_every=1", "optim.state_dtype=int8")
    assert work_ranks(config, size, tmp_path / "run") == [0] * size
    assert ("finds nothing to compare" in capfd.readouterr().out) == (layout in ("fsdp2", "fsdp2_context2"))
