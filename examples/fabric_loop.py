"""A loop of one's own, with Fabric, in a swarm: learns to tell which of four spirals a point belongs to.

python examples/fabric_loop.py                      # hosts a run and prints the line for the others
python examples/fabric_loop.py --run psyche1...     # joins it, from anywhere
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from distro_optim import DisTrO
from distro_optim.strategy.config import RunConfig
from distro_optim.strategy.fabric import FabricPsycheStrategy

ARMS, POINTS = 4, 4000


def spirals() -> TensorDataset:
    """Points on the arms, with a little noise; the same on all peers."""
    generator = torch.Generator().manual_seed(0)
    arm = torch.arange(POINTS) % ARMS
    radius = torch.rand(POINTS, generator=generator).sqrt()
    angle = 4 * radius + arm * (2 * torch.pi / ARMS) + 0.1 * torch.randn(POINTS, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="ticket of a run to join, or host:port/run-id; left out, a run is hosted")
    parser.add_argument("--steps", type=int, default=400, help="of the whole run")
    parser.add_argument("--peers", type=int, default=1, help="how many it takes to begin")
    parser.add_argument("--devices", type=int, default=1, help="of this machine, as one peer")
    parser.add_argument("--relay", default="default", help='"none" for peers on this machine or in this network')
    args = parser.parse_args()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, ARMS))
    strategy = FabricPsycheStrategy(args.run, config=RunConfig(min_peers=args.peers), relay=args.relay)
    fabric = Fabric(strategy=strategy, devices=args.devices)
    fabric.launch()
    optimizer = DisTrO(net.parameters(), lr=1e-2, compression_decay=0.95)
    schedule = CosineAnnealingLR(optimizer, args.steps, eta_min=1e-3)
    model, optimizer = fabric.setup(net, optimizer)

    data = spirals()
    loader = DataLoader(data, batch_size=128)
    for round in strategy.rounds(loader, max_steps=args.steps, schedulers=[schedule]):
        for points, arms in round:
            loss = F.cross_entropy(model(points), arms)
            fabric.backward(loss)
        optimizer.step()
        if round.step % 50 == 0:
            fabric.print(f"step {round.step}: loss {loss.item():.3f}, {strategy.num_peers} peers", flush=True)

    with torch.no_grad():
        points, arms = fabric.to_device(tuple(data.tensors))
        accuracy = (model(points).argmax(-1) == arms).float().mean().item()
    fabric.print(f"{accuracy:.1%} of the points are told apart")


if __name__ == "__main__":
    main()
