"""A Lightning script of one's own, sharded: `torchrun --nproc-per-node=2 examples/lightning_trainer/train.py`.

Nothing in the module, the data or the callbacks is orchestrator's; only the strategy is. The same script runs on one
process (`python examples/lightning_trainer/train.py`), where it can go on from what two processes have saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning.pytorch as lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from orchestrator import DTensorStrategy

VOCABULARY, LENGTH, WIDTH = 32, 16, 32


class Transformer(nn.Module):
    """A small causal transformer of torch.nn's layers."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        layers = [
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout, batch_first=True, norm_first=True)
            for _ in range(2)
        ]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -torch.inf).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, T, V] for tokens [B, T]."""
        hidden = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        return self.head(hidden)


class Copying(lightning.LightningModule):
    """Learns to continue sequences that repeat themselves."""

    def __init__(self, learning_rate: float = 3e-3, dropout: float = 0.0):
        super().__init__()
        self.save_hyperparameters()
        self.net: Transformer | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Transformer(self.hparams["dropout"])

    def _loss(self, batch: tuple[Tensor]) -> Tensor:
        (tokens,) = batch
        return F.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=True, sync_dist=True)
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), sync_dist=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams["learning_rate"], weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=32)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sequences(lightning.LightningDataModule):
    """Sequences whose second half is their first.

    Args:
        batch_size: of a process.
    """

    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        half = (LENGTH + 2) // 2
        first = torch.randint(VOCABULARY, (160, half), generator=torch.Generator().manual_seed(1))
        tokens = torch.cat((first, first), 1)[:, : LENGTH + 1]
        self.train, self.val = TensorDataset(tokens[:128]), TensorDataset(tokens[128:])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--dir", type=Path, default=Path("runs/lightning_trainer"))
    parser.add_argument("--resume", help="a checkpoint, or 'last'")
    arguments = parser.parse_args()

    lightning.seed_everything(7)
    strategy = DTensorStrategy.from_environment()
    # One global batch on any number of processes.
    data = Sequences(batch_size=16 // strategy.layout.data_parallel)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=strategy.world.local_size,
        strategy=strategy,
        max_epochs=arguments.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=CSVLogger(arguments.dir, name="", version=""),
        callbacks=[
            ModelCheckpoint(arguments.dir / "checkpoints", monitor="val_loss", save_top_k=2, save_last=True),
            LearningRateMonitor("step"),
        ],
    )
    trainer.fit(Copying(), data, ckpt_path=arguments.resume)
    trainer.print(f"val_loss {trainer.callback_metrics['val_loss']:.4f}, on {strategy.layout}")


if __name__ == "__main__":
    main()
