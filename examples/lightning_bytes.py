"""Trains a byte-level transformer on the Python standard library's source files, with everybody who has the ticket.

    python examples/lightning_bytes.py                                  # hosts a run and prints its ticket
    DISTRO_OPTIM_RUN=psyche1... python examples/lightning_bytes.py      # joins it: the same script, anywhere
    make demo                                                           # three peers here; one is killed, one joins

An ordinary Lightning script. Its only unusual line is the strategy.
"""

import sys

import lightning as L
from byte_data import SourceWindows
from byte_model import ByteTransformer, next_byte_loss
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from distro_optim import DisTrO, PsycheStrategy

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 600
WARMUP_STEPS = 40


class BytePredictor(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.transformer = ByteTransformer()

    def training_step(self, batch, batch_index):
        loss = next_byte_loss(self.transformer, *batch)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = DisTrO(self.parameters(), lr=3e-3, direction="orthogonal", update="rms")
        schedule = LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


if __name__ == "__main__":
    L.seed_everything(0)
    trainer = L.Trainer(
        max_steps=STEPS,
        strategy=PsycheStrategy(),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        log_every_n_steps=10,
    )
    trainer.fit(BytePredictor(), DataLoader(SourceWindows(), batch_size=4, shuffle=True))
