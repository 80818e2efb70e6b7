"""Handwritten digits with Lightning, in a swarm.

    python examples/lightning_digits.py                      # hosts a run and prints the line for the others
    python examples/lightning_digits.py --run psyche1...     # joins it, from anywhere

What makes it a swarm is ``strategy=PsycheStrategy(...)`` and the optimizer. Needs scikit-learn, which has the data.
"""

from __future__ import annotations

import argparse
import hashlib

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

from distro_optim import DisTrO
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.psyche import PsycheStrategy

Batch = tuple[Tensor, Tensor]


class Digits(pl.LightningModule):
    """A small convolutional network for images of 8 by 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(32 * 3 * 3, 10),
        )  # fmt: skip

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(-1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = DisTrO(self.parameters(), lr=6e-3, compression_decay=0.95)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps, eta_min=5e-4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits() -> tuple[Dataset[tuple[Tensor, ...]], Dataset[tuple[Tensor, ...]]]:
    """1438 images to train with and 359 to validate; the same on all peers."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    whole = TensorDataset(images, torch.tensor(bunch.target))
    train, held_out = random_split(whole, [0.8, 0.2], torch.Generator().manual_seed(0))
    return train, held_out


def digest(model: nn.Module) -> str:
    """A hash of all weights, to compare with those of others."""
    weights = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="ticket of a run to join, or host:port/run-id; left out, a run is hosted")
    parser.add_argument("--steps", type=int, default=300, help="of the whole run")
    parser.add_argument("--peers", type=int, default=1, help="how many it takes to begin")
    parser.add_argument("--relay", default="default", help='"none" for peers on this machine or in this network')
    args = parser.parse_args()

    pl.seed_everything(0)
    train, held_out = digits()
    trainer = pl.Trainer(
        strategy=PsycheStrategy(args.run, config=RunConfig(min_peers=args.peers), relay=args.relay),
        max_steps=args.steps,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model := Digits(), DataLoader(train, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=360))
    [result] = trainer.validate(model, DataLoader(held_out, batch_size=360), verbose=False)
    print(f"step {trainer.global_step}: {result['accuracy']:.1%} of the images held out are recognized")
    print(f"weights {digest(model)}: the same on all peers")


if __name__ == "__main__":
    main()
