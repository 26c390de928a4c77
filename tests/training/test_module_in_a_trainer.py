"""The product's own training in a Lightning Trainer of the user's: the losses of a run, and exact resume."""

from __future__ import annotations

import os
from pathlib import Path

import lightning.pytorch as lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from orchestrator.config.convert import from_dict, to_dict
from orchestrator.config.schema import HardwareConfig, RunConfig
from orchestrator.strategies.dtensor import DTensorStrategy
from orchestrator.training.data_module import TokenDataModule
from orchestrator.training.module import LanguageModule
from tests.lab import pages
from tests.lab.ranks import run_ranks
from tests.lab.runs import losses, small_config, train
from tests.lab.tensors import read_all

WORDS = ("train.max_steps=8", "train.eval_every=4", "train.micro_batch_size=2", "optim=muon", "model.dropout=0.1")


class Rows(lightning.Callback):
    def __init__(self):
        self.losses, self.val = [], []

    def on_train_batch_end(self, trainer, *unused):
        self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_end(self, trainer, module):
        self.val.append(float(trainer.callback_metrics["val_loss"]))


def _fit(world, data, folder: Path, resume=None):
    config = from_dict(RunConfig, data)
    os.environ.update(world.environment())
    strategy = DTensorStrategy.from_environment(hardware=HardwareConfig(target="cpu"))
    rows, tokens = Rows(), TokenDataModule(config)
    kept = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = lightning.Trainer(
        strategy=strategy,
        max_epochs=1,
        val_check_interval=4,
        num_sanity_val_steps=0,
        callbacks=[rows, kept],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModule(config, tokens.vocab_size), tokens, ckpt_path=resume)
    return rows.losses, rows.val, trainer.global_step


def test_the_module_in_a_users_trainer_is_a_run_of_the_product(tmp_path):
    config = small_config(tmp_path, *WORDS)
    run = train(small_config(tmp_path, *WORDS, "layout.fsdp=2"), 2, tmp_path / "run")
    whole, val, steps = run_ranks(2, _fit, to_dict(config), tmp_path / "whole")[0]
    # Lightning logs fp32.
    assert np.array_equal(np.float32(whole), np.float32(losses(run)))
    assert np.array_equal(np.float32(val), np.float32([row["val_loss"] for row in run if "val_loss" in row]))
    assert steps == 8
    # In the middle of Lightning's one epoch.
    middle = tmp_path / "whole" / "step=4.ckpt"
    again, _, steps = run_ranks(2, _fit, to_dict(config), tmp_path / "again", middle)[0]
    assert (again, steps) == (whole[4:], 8)
    before, after = (read_all(tmp_path / name / "step=8.ckpt") for name in ("whole", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if not key.startswith("rng."))


def test_its_checkpoint_is_one_of_the_product(tmp_path):
    from orchestrator import generate, load_model

    config = small_config(tmp_path, "train.max_steps=4")
    run_ranks(1, _fit, to_dict(config), tmp_path / "saved")
    path = tmp_path / "saved" / "step=4.ckpt"
    model, tokenizer = load_model(path, hardware="cpu")
    assert {f"model.{name}" for name, _ in model.named_parameters()} <= read_all(path).keys()
    assert tokenizer is not None
    assert len(generate("def ", path, tokens=3, hardware="cpu").ids) == 3


def _page(world):
    names = {}
    for block in pages.blocks(pages.ROOT / "docs/lightning.md"):
        if block.language == "python" and not block.note:
            exec("\n".join(block.lines), names)
    return names["trainer"].strategy is names["strategy"], names["data"].config.train.max_steps


def test_the_python_of_the_page_runs():
    assert run_ranks(1, _page) == [(True, 100)]
