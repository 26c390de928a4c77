"""A Lightning user's own module, data and Trainer under the torch-native strategy: examples/lightning_trainer."""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as lightning
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from orchestrator.config.schema import HardwareConfig, ModelConfig
from orchestrator.errors import CheckpointError, ConfigError, LayoutError
from orchestrator.models.decoder import Decoder
from orchestrator.strategies.dtensor import DTensorStrategy
from tests.lab.ranks import run_ranks
from tests.lab.tensors import read_all

ROOT = Path(__file__).parents[2]
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


def example() -> Any:
    name = "lightning_trainer_example"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples/lightning_trainer/train.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Losses(lightning.Callback):
    """What was logged, batch by batch, and a state that JSON has no words for."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, *unused):
        self.train.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.val.append(float(trainer.callback_metrics["val_loss"]))

    def state_dict(self):
        return {"seen": len(self.train), "best": torch.tensor(1.5), "pair": (1, "two"), "thing": object()}

    def load_state_dict(self, state):
        self.loaded = state


def strategy_of(world, **degrees):
    os.environ.update(world.environment())
    return DTensorStrategy.from_environment(**degrees, hardware=HardwareConfig(target="cpu", timeout_seconds=60))


def _fit(strategy, folder, epochs, dropout=0.0, resume=None, module=None, data=None):
    warnings.filterwarnings("ignore", message="(?s).*(returned a view tensor|isinstance|num_workers|not empty).*")
    lightning.seed_everything(7, verbose=False)
    losses = Losses()
    kept = ModelCheckpoint(folder / "kept", monitor="val_loss", save_top_k=1, save_last=True)
    parts = strategy.layout.data_parallel if isinstance(strategy, DTensorStrategy) else 1
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version=f"to{epochs}"),
        callbacks=[kept, losses, EarlyStopping("val_loss", patience=9)],
        **QUIET,
    )
    module = module or example().Copying(dropout=dropout)
    trainer.fit(module, data or example().Sequences(16 // parts), ckpt_path=resume)
    return trainer, losses


def _user(world, folder):
    """Three epochs; two and then, after a new start, the third. Nothing is pickled meanwhile."""
    refuse = mock.Mock(side_effect=AssertionError("pickled"))
    with (
        mock.patch.multiple(torch, save=refuse, load=refuse),
        mock.patch.multiple(dist, broadcast_object_list=refuse, all_gather_object=refuse),
        warnings.catch_warnings(record=True) as said,
    ):
        whole, losses = _fit(strategy_of(world), folder / "whole", 3, dropout=0.1)
        _fit(strategy_of(world), folder / "parts", 2, dropout=0.1)
        resumed, third = _fit(strategy_of(world), folder / "parts", 3, dropout=0.1, resume="last")
        plain, exact = _fit(strategy_of(world), folder / "plain", 2)
    left_out = {str(one.message) for one in said if "left out" in str(one.message)}
    return {
        "whole": (losses.train, losses.val),
        "resumed": (third.train, third.val),
        "plain": (exact.train, exact.val),
        "loaded": {**third.loaded, "best": float(third.loaded["best"])},
        "left_out": left_out,
        "steps": (whole.global_step, resumed.global_step, resumed.current_epoch),
        "world": (
            plain.world_size,
            plain.global_rank,
            plain.strategy.broadcast(Path("x") if world.rank == 0 else None),
        ),
    }


def _alone(world, folder):
    """Lightning's own strategy on one process, and a continuation of what two have saved."""

    class OneOrder(example().Sequences):
        def train_dataloader(self):
            return DataLoader(self.train, self.batch_size, sampler=DistributedSampler(self.train, 1, 0, seed=7))

    _, reference = _fit(SingleDeviceStrategy("cpu"), folder / "single", 3, data=OneOrder(16))
    saved = folder / "plain" / "kept" / "last.ckpt"
    trainer, moved = _fit(strategy_of(world), folder / "moved", 3, resume=saved)
    # Loaded on another layout and saved without a step between: the same bits.
    again = lightning.Trainer(accelerator="cpu", strategy=strategy_of(world), max_epochs=2, logger=False, **QUIET)
    again.fit(example().Copying(), example().Sequences(16), ckpt_path=saved)
    again.save_checkpoint(folder / "again.ckpt")
    return (reference.train, reference.val), (moved.train, moved.val), trainer.global_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def two(folder):
    return run_ranks(2, _user, folder)


@pytest.fixture(scope="module")
def one(folder, two):
    return run_ranks(1, _alone, folder)[0]


def test_losses_are_those_of_lightnings_own_strategy_on_one_process(two, one):
    (train, val), _, _ = one
    assert len(two[0]["plain"][0]) == 16, "two epochs of 8 micro-batches"
    np.testing.assert_allclose(two[0]["plain"][0], train[:16], rtol=1e-5)
    np.testing.assert_allclose(two[0]["plain"][1], val[:2], rtol=1e-5)
    assert two[0]["plain"] == two[1]["plain"], "logged values are of all processes"
    assert [rank["world"] for rank in two] == [(2, 0, Path("x")), (2, 1, Path("x"))]


def test_a_resumed_training_is_bitwise_the_one_that_was_not_stopped(two, folder):
    train, val = two[0]["whole"]
    assert two[0]["resumed"] == (train[16:], val[2:])
    assert two[0]["steps"] == (12, 12, 3)
    before, after = (read_all(folder / name / "kept" / "last.ckpt") for name in ("whole", "parts"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(key.startswith("optimizer.exp_avg.") for key in before)


def test_what_callbacks_keep_travels_as_json_and_what_cannot_is_named_once(two, folder):
    assert two[0]["loaded"] == {"seen": 16, "best": 1.5, "pair": (1, "two")}
    (said,) = two[0]["left_out"]
    assert "callbacks.Losses.thing: a object" in said
    assert not two[1]["left_out"], "one process speaks"
    files = {path.suffix for path in (folder / "whole").rglob("*.ckpt/*")}
    assert files == {".safetensors", ".json", ".yaml"}
    assert len(list((folder / "whole" / "kept").iterdir())) == 2, "the best one and the last one"
    rows = (folder / "whole" / "to3" / "metrics.csv").read_text().splitlines()
    assert sum(",train_loss" in row or row[0].isdigit() for row in rows) >= 12 + 3


def test_a_checkpoint_of_two_processes_goes_on_in_one(two, one, folder):
    (train, val), moved, steps = one
    np.testing.assert_allclose(moved[0], train[16:], rtol=1e-5)
    np.testing.assert_allclose(moved[1], val[2:], rtol=1e-5)
    assert steps == 12
    before, after = read_all(folder / "plain" / "kept" / "last.ckpt"), read_all(folder / "again.ckpt")
    tensors = [key for key in before if not key.startswith("rng.")]
    assert len(tensors) > 60
    assert all(torch.equal(before[key], after[key]) for key in tensors)


# --- models of other kinds ------------------------------------------------------------------------------


class FeedForward(nn.Module):
    """Of Lightning's documentation of tensor parallelism."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.w1, self.w2, self.w3 = nn.Linear(8, 24, bias=False), nn.Linear(24, 8, bias=False), nn.Linear(8, 24)

    def forward(self, x):
        y = self.norm(x)
        return x + self.w2(nn.functional.silu(self.w1(y)) * self.w3(y))


class Regression(lightning.LightningModule):
    """The rest of it: tensor parallelism and FSDP2, by the user, over `self.device_mesh`."""

    def configure_model(self):
        torch.manual_seed(3)
        self.model = FeedForward()
        if self.device_mesh is not None:
            tp, dp = self.device_mesh["tensor_parallel"], self.device_mesh["data_parallel"]
            plan = {"w1": ColwiseParallel(), "w2": RowwiseParallel(), "w3": ColwiseParallel()}
            parallelize_module(self.model, tp, plan)
            fully_shard(self.model, mesh=dp)

    def training_step(self, batch):
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", self.training_step(batch), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 0.01)


class Words(Regression):
    """A model of the sharding rules under an attribute of the user's, and a head beside it."""

    def configure_model(self):
        with torch.device("meta"):
            self.language = Decoder(DECODER)
        torch.manual_seed(3)
        self.scale = nn.Linear(1, 1)

    def training_step(self, batch):
        (tokens,) = batch
        loss = self.language(tokens[:, :-1], targets=tokens[:, 1:]) / tokens[:, 1:].numel()
        loss = self.scale(loss.view(1, 1)).squeeze() if type(self) is Scaled else loss
        self.log("train_loss", loss, sync_dist=True)
        return loss


class Scaled(Words):
    """Its loss goes through a parameter that no rule knows."""


DECODER = ModelConfig(vocab_size=64, dim=32, layers=2, heads=4, kv_heads=2, mlp_dim=48, max_seq_len=64)


def _data(kind, size):
    generator = torch.Generator().manual_seed(5)
    if kind is Regression:
        tensors = (torch.randn(32, 8, generator=generator), torch.randn(32, 8, generator=generator))
    else:
        tensors = (torch.randint(64, (32, 17), generator=generator),)
    loader = DataLoader(TensorDataset(*tensors), size)
    return _Both(loader)


class _Both(lightning.LightningDataModule):
    def __init__(self, loader):
        super().__init__()
        self.loader = loader

    def train_dataloader(self):
        return self.loader

    val_dataloader = train_dataloader


def _kinds(world, folder, layouts):
    found = {}
    for kind, degrees in layouts:
        strategy = strategy_of(world, **degrees)
        module, size = kind(), 8 // strategy.layout.data_parallel
        name = f"{kind.__name__}-{world.size}"
        trainer, losses = _fit(strategy, folder / name, 2, module=module, data=_data(kind, size))
        found[kind.__name__] = (losses.train, list(losses.val))
        # On the other layout.
        saved = folder / f"{kind.__name__}-4" / "kept" / "last.ckpt"
        if world.size == 1:
            (moved,) = trainer.validate(kind(), _data(kind, size), ckpt_path=saved, verbose=False)
            found[f"{kind.__name__}-moved"] = moved["val_loss"]
    return found


def test_users_sharding_and_the_rules_agree_with_one_process(tmp_path):
    layouts = [
        (Regression, {"fsdp": 2, "tensor": 2}),
        (Words, {"fsdp": 2, "tensor": 2}),
        (Scaled, {"replicate": 2, "fsdp": 2}),
    ]
    four = run_ranks(4, _kinds, tmp_path, layouts)[0]
    single = run_ranks(1, _kinds, tmp_path, [(kind, {}) for kind, _ in layouts])[0]
    for kind, _ in layouts:
        name = kind.__name__
        np.testing.assert_allclose(four[name][0], single[name][0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(four[name][1], single[name][1], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(single[f"{name}-moved"], four[name][1][-1], rtol=1e-5, err_msg=name)
        assert single[name][0][0] != single[name][0][-1]


# --- what is refused ---------------------------------------------------------------------------------------


class Loose(Regression):
    def configure_model(self):
        self.model, self.bias = FeedForward(), nn.Parameter(torch.zeros(8))


class HalfSharded(Regression):
    def configure_model(self):
        self.model, self.other = FeedForward(), nn.Linear(8, 8)
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def _refused(world, folder):
    said = {}

    def note(name, kind, action):
        try:
            action()
        except kind as error:
            said[name] = str(error)

    def trainer(**arguments):
        return lightning.Trainer(
            accelerator="cpu", strategy=strategy_of(world), max_epochs=1, logger=False, **QUIET, **arguments
        )

    note("loose", LayoutError, lambda: trainer().fit(Loose(), _data(Regression, 4)))
    note("half", LayoutError, lambda: trainer().fit(HalfSharded(), _data(Regression, 4)))
    note("precision", ConfigError, lambda: trainer(precision="16-true"))
    note("degrees", LayoutError, lambda: strategy_of(world, fsdp=3))
    pickled = folder / "pickled.ckpt"
    pickled.write_bytes(b"\x80")
    note("pickled", CheckpointError, lambda: trainer().fit(Regression(), _data(Regression, 4), ckpt_path=pickled))
    one = trainer()
    note("object", ConfigError, lambda: one.strategy.broadcast(object()))
    note("io", ConfigError, lambda: setattr(one.strategy, "checkpoint_io", object()))
    return said


def test_what_cannot_be_right_is_one_clear_error_on_every_process(tmp_path):
    said = run_ranks(2, _refused, tmp_path)
    assert "bias" in said[0]["loose"]
    assert "docs/lightning.md" in said[0]["loose"]
    assert "other.weight, other.bias" in said[0]["half"]
    assert "bf16-mixed" in said[0]["precision"]
    assert "fsdp 3" in said[0]["degrees"]
    assert "pickled.ckpt" in said[0]["pickled"]
    assert "the value: a object" in said[0]["object"]
    assert "CheckpointIO" in said[0]["io"]
    assert said[1].keys() == said[0].keys()


def test_one_strategy_serves_several_trainers():
    strategy = DTensorStrategy.from_environment(fsdp=1)
    for _ in range(2):
        trainer = lightning.Trainer(strategy=strategy, accelerator="cpu", logger=False, enable_checkpointing=False)
        assert trainer.strategy is strategy
        assert trainer.num_devices == 1
