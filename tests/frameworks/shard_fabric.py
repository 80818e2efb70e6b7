"""Run by a test: as ``shard_devices.py``, in a loop with Fabric."""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from lightning.fabric import Fabric  # noqa: E402
from torch import nn  # noqa: E402

from distro_optim import DisTrO  # noqa: E402
from distro_optim.strategy.config import RunConfig  # noqa: E402
from distro_optim.strategy.fabric import FabricPsycheStrategy  # noqa: E402
from frameworks.lightning_runs import loader  # noqa: E402
from frameworks.shard_devices import whole  # noqa: E402


def parallelize(net: Any, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh["data_parallel"])
    module: nn.Module = net
    return module


def main(folder: str, devices: int) -> None:
    several = devices > 1
    config = RunConfig(run_id="shards", global_batch_size=13, min_peers=2)
    strategy = FabricPsycheStrategy(
        relay="none",
        config=config,
        data_parallel_size=devices if several else None,
        parallelize_fn=parallelize if several else None,
    )
    fabric: Any = Fabric(strategy=strategy, accelerator="cpu", devices=devices)
    fabric.launch()
    torch.manual_seed(devices)  # the one that joins gets the other's weights
    net = fabric.setup_module(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3)))
    optimizer = fabric.setup_optimizers(DisTrO(net.parameters(), lr=1e-3))
    step = 0
    with strategy.rounds(loader(batch_size=4), max_steps=5) as rounds:
        for round_ in rounds:
            for _, x, y in round_:
                fabric.backward(F.cross_entropy(net(x), y))
            optimizer.step()
            step = round_.step
    weights = b"".join(whole(p).numpy().tobytes() for p in net.parameters())
    digest = hashlib.sha256(weights).hexdigest()[:16]
    print(f"rank {fabric.global_rank} of {fabric.world_size} step {step} weights {digest}", flush=True)
    saved = Path(folder) / f"{devices}.ckpt"
    fabric.save(saved, {"net": net})
    fabric.load(saved, {"net": net})
    assert b"".join(whole(p).numpy().tobytes() for p in net.parameters()) == weights
    if fabric.is_global_zero:
        state = torch.load(saved, weights_only=False)["net"]
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()[:16]
        print(f"\nsaved {digest}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
