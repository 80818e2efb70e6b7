"""Does a model learn as well in exact arithmetic as in floats?

    python benchmarks/exact_convergence.py          # three seeds, some ten minutes of one core

Four workers train a byte-level transformer with Psyche's settings, at equal seeds: in floats, exactly, and in floats
from first weights that are disturbed by a millionth, which shows how far any rounding moves the end of a run.
"""

from __future__ import annotations

import argparse
import math
import statistics

import torch
from learners.base import Method
from learners.swarm import DistroWorkers
from learners.tasks import BYTES, data_of
from rich.console import Console
from rich.table import Table

from distro_optim.compress import Arithmetic

METHOD = Method("DisTrO k=8 1-bit overlap", lr=1e-3, topk=8, decay=0.99, quantize=True, overlap=True)
WORKERS = 4
BATCH_SIZE = 2
DISTURBANCE = 1e-6


def final_loss(arithmetic: Arithmetic, seed: int, steps: int, *, disturbed: bool = False) -> float:
    """Held-out loss in nats per byte."""
    torch.manual_seed(seed)
    workers = DistroWorkers(BYTES, METHOD, WORKERS, torch.float32, arithmetic)
    if disturbed:
        with torch.no_grad():
            for first, *others in zip(*workers.weights, strict=True):
                first.mul_(1 + DISTURBANCE * torch.randn_like(first))
                for other in others:
                    other.copy_(first)
    data = data_of(BYTES.name, seed)
    for step in range(steps):
        rate = METHOD.lr * min((step + 1) / 20, 1 - step / steps)
        workers.step([data.batch(step, worker, BATCH_SIZE) for worker in range(WORKERS)], rate)
    with torch.no_grad():
        return BYTES.loss(workers.model(), *data.held_out(256)).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds: dict[str, tuple[Arithmetic, bool]] = {
        "float": ("float", False),
        "exact": ("exact", False),
        "float, disturbed": ("float", True),
    }
    losses: dict[str, list[float]] = {name: [] for name in kinds}
    console = Console()
    for seed in range(args.seeds):
        for name, (arithmetic, disturbed) in kinds.items():
            losses[name].append(final_loss(arithmetic, seed, args.steps, disturbed=disturbed))
            console.print(f"seed {seed}, {name}: {losses[name][-1]:.4f}")
    table = Table(title=f"Held-out loss after {args.steps} steps, nats per byte")
    for column in ("", "seeds", "mean", "minus float (standard error)"):
        table.add_column(column)
    for name, own in losses.items():
        apart = [a - b for a, b in zip(own, losses["float"], strict=True)]
        error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else 0.0
        table.add_row(
            name,
            " ".join(f"{loss:.3f}" for loss in own),
            f"{statistics.mean(own):.3f}",
            f"{statistics.mean(apart):+.3f} ({error:.3f})",
        )
    console.print(table)


if __name__ == "__main__":
    main()
