"""Run by a test: one peer of two devices, and says what each of them ends with."""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import lightning.pytorch as pl  # noqa: E402

from distro_optim.strategy.config import RunConfig  # noqa: E402
from distro_optim.strategy.psyche import PsycheStrategy  # noqa: E402
from frameworks.lightning_runs import loader, make_module, make_trainer  # noqa: E402


def main(folder: str, devices: int, batch_size: int) -> None:
    module: Any = make_module(pl)
    strategy = PsycheStrategy(relay="none", config=RunConfig(run_id="devices", global_batch_size=13))
    trainer = make_trainer(pl, Path(folder), strategy, devices=devices, max_steps=7, max_epochs=-1)
    trainer.fit(module, loader(batch_size=batch_size), loader(16))
    weights = b"".join(p.detach().numpy().tobytes() for p in module.parameters())
    samples = [sorted(batch) for batch in module.samples]
    digest = hashlib.sha256(weights).hexdigest()[:16]
    print(f"rank {trainer.global_rank} of {trainer.world_size} step {trainer.global_step} weights {digest} {samples}")
    print(f"\nlosses {trainer.callback_metrics['val_loss']:.6f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
