"""Run by a test: one peer, whole on one device or in shards on two, and says what each of them ends with."""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from distro_optim.strategy.config import RunConfig  # noqa: E402
from distro_optim.strategy.psyche import PsycheStrategy  # noqa: E402
from frameworks.lightning_runs import loader, make_module, make_trainer  # noqa: E402


def configure_model(self: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = self.device_mesh["data_parallel"]
    for layer in (self.net[0], self.net[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(self.net, mesh=mesh)


def nothing(self: Any, *_: Any) -> None:
    """In place of what the module notes of its weights, which are shards here."""


def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
    self.log("val_loss", self.loss(batch), sync_dist=True)


def whole(tensor: Any) -> Tensor:
    made: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return made.detach()


def main(folder: str, devices: int) -> None:
    hooks: dict[str, Any] = {"on_train_batch_end": nothing, "validation_step": validation_step}
    size = None if devices == 1 else devices
    module: Any = make_module(pl, **hooks, **({} if devices == 1 else {"configure_model": configure_model}))
    strategy = PsycheStrategy(
        relay="none", config=RunConfig(run_id="shards", global_batch_size=13, min_peers=2), data_parallel_size=size
    )
    trainer = make_trainer(pl, Path(folder), strategy, devices=devices, max_steps=5, max_epochs=-1)
    trainer.fit(module, loader(batch_size=4), loader(16))
    saved = Path(folder) / f"{devices}.ckpt"
    trainer.save_checkpoint(saved)
    weights = b"".join(whole(p).numpy().tobytes() for p in module.parameters())
    digest = hashlib.sha256(weights).hexdigest()[:16]
    samples = sorted({sample for batch in module.samples for sample in batch})
    print(f"rank {trainer.global_rank} of {trainer.world_size} step {trainer.global_step} weights {digest} {samples}")
    if trainer.is_global_zero:
        state = torch.load(saved, weights_only=False)
        saved_weights = b"".join(state["state_dict"][name].numpy().tobytes() for name, _ in module.named_parameters())
        print(f"\nsaved {hashlib.sha256(saved_weights).hexdigest()[:16]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
