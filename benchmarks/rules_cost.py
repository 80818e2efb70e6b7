"""What a step costs by the published rules and by the recipe, in seconds of a core, beside forward and backward passes.

    python benchmarks/rules_cost.py          # the Llama of 20 million parameters, some 30 seconds

CPU time of one thread, so that other programs on the machine change little. One peer, which sends and looks ahead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from shapes import MODELS, make_params

from distro_optim import DisTrO
from distro_optim.comm.memory import MemoryExchange
from distro_optim.optim.orthogonal import orthogonalize
from distro_optim.optim.rules import PUBLISHED

RULES: dict[str, dict[str, Any]] = {
    "published rules": PUBLISHED,
    "direction alone": {"direction": "orthogonal", "update": "sign"},
    "step alone": {"direction": "momentum", "update": "rms"},
    "recipe": {"direction": "orthogonal", "update": "rms"},
}


def seconds(work: Callable[[], object], times: int) -> float:
    """Of a core, median; the first time is left out."""
    found = []
    for _ in range(times + 1):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), default="20M")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = MODELS[args.model]()
    table = Table(title=f"A step of {args.model}, seconds of a core")
    for heading in ("", "seconds"):
        table.add_column(heading)
    for name, rules in RULES.items():
        optimizer = DisTrO(make_params(shapes), lr=1e-3, exchange=MemoryExchange.group(1)[0], **rules)
        table.add_row(name, f"{seconds(optimizer.step, args.steps):.2f}")
        del optimizer
    matrices = [torch.randn(1, *shape) for shape in shapes if len(shape) == 2]
    table.add_row("Newton and Schulz alone", f"{seconds(lambda: orthogonalize(matrices), args.steps):.2f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
